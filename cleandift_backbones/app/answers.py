"""From what a visitor wants to what they see: which features that needs, and the result made of them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from ..data.images import ImageError
from ..features.extractor import ModelError
from ..visualize.comparison import compare_entries, main_directions, two_specs
from ..visualize.feature_maps import map_entries
from ..visualize.features import Cancelled, FeatureProvider, Spec, Watch, how_to_get
from ..visualize.matches import match_entries
from ..visualize.memory import Entry
from ..visualize.pictures import Picture
from ..visualize.results import Result
from .sessions import Session, Settings

_logger = logging.getLogger(__name__)
QUICK_MAPS, QUICK_PRODUCTS = 12, 2e8  # maps, and products for their main directions, of a tenth of a second
PROBLEMS = (ModelError, ImageError, ValueError)


@dataclass(frozen=True)
class Job:
    """What a tab needs before it can be shown; two that are equal need the same."""

    settings: Settings
    pictures: tuple[Picture, ...]

    @property
    def specs(self) -> tuple[Spec, ...]:
        s = self.settings
        if s.tab == "compare":
            return two_specs(s.model, s.prompt, s.timestep, s.ensemble_size)
        return (Spec(s.model, s.prompt),)

    @property
    def key(self) -> Hashable:
        """What the tab's features depend on, and what is drawn from them alone."""
        s = self.settings
        shown = (s.maps, s.show, s.shared, s.clusters) if s.tab == "maps" else (s.map,)
        return s.tab, self.specs, tuple(picture.key for picture in self.pictures), shown


@dataclass(frozen=True)
class Progress:
    """How far the work is: a share of 0..1 and what is being done."""

    share: float
    text: str


class Answers:
    """Makes results for sessions out of features, which are computed in the background, one thread a session."""

    def __init__(self, features: FeatureProvider):
        self.features = features
        self.threads = torch.get_num_threads()

    def get(self, session: Session, begin: bool = True) -> Result | Progress | None:
        """What the session's tab shows. Call with the session's lock.

        Args:
            begin: whether work that is not there yet is begun.

        Returns:
            The result, if everything that takes long is there; otherwise how far the work is, which is begun if need
            be: ask again a moment later. None if that work was stopped, or failed: the session was told.

        Raises:
            ImageError, ModelError, ValueError: something that is unavailable.
        """
        if session.closed:
            return None
        job = Job(session.settings, tuple(session.pictures))
        key = job.key
        ready = session.ready[1] if session.ready and session.ready[0] == key else None
        session.ready = None
        entries = ready or [self.features.kept(spec, job.pictures, session.token) for spec in job.specs]
        if None not in entries and (_is_quick(job, entries) or session.remembers(job.settings.tab, key)):
            result = self.features.stamp(self._result(session, job, entries))
            session.result = result
            return result
        if session.given_up == key or (session.work is None and not begin):
            return None
        if session.work is None:
            session.work = Work(self, session, job)
        return session.work.progress

    def _result(self, session: Session, job: Job, entries: list[list[Entry]]) -> Result:
        s, pictures = job.settings, job.pictures
        if s.tab == "match":
            points = session.numbered_points()
            return match_entries(pictures, entries[0], job.specs[0].settled(), s.map, points, s.mutual_only)
        drawn = self._drawn(session, job, entries)
        if s.tab == "maps":
            return drawn
        return compare_entries(pictures, *entries, job.specs, s.map, session.numbered_points(), drawn)

    def _drawn(self, session: Session, job: Job, entries: list[list[Entry]], watch: Watch | None = None) -> Any:
        """Of maps all, of a comparison its main directions: made once, as they may take long."""
        s, pictures = job.settings, job.pictures
        if s.tab == "maps":
            given = (pictures, entries[0], job.specs[0].settled(), s.maps, s.show, s.shared, s.clusters, watch)
            return session.remember("maps", job.key, lambda: map_entries(*given))
        return session.remember("compare", job.key, lambda: main_directions(pictures, *entries, job.specs, s.map))


class Work(threading.Thread):
    """Computes what a session wants, however often that changes meanwhile, until it is there."""

    def __init__(self, answers: Answers, session: Session, job: Job):
        super().__init__(daemon=True)
        self.answers, self.session, self.job = answers, session, job
        self.progress = Progress(0.0, f"{job.settings.model}: loading")
        session.cancelled.clear()
        self.start()

    def run(self) -> None:
        torch.set_num_threads(self.answers.threads)  # a new thread may have begun while another one asked for one
        session = self.session
        while True:
            entries, error = [], None
            try:
                entries = self._compute()
            except Exception as caught:  # told to the visitor below
                error = caught
            with session.lock:
                wanted = self._wanted()
                if wanted is False and not session.closed and not session.cancelled.is_set():
                    self.job = Job(session.settings, tuple(session.pictures))
                    continue
                session.work = None
                if session.closed:
                    self.answers.features.store.forget(session.token)
                elif wanted is None:
                    pass
                elif error is None:
                    session.ready = (self.job.key, entries)
                else:
                    self._give_up(error)
                return

    def _compute(self) -> list[list[Entry]]:
        started, specs, pictures = time.perf_counter(), self.job.specs, self.job.pictures
        entries = []
        for number, spec in enumerate(specs):

            def watch(share: float, doing: str, number: int = number, model: str = spec.model) -> None:
                self._check()
                self.progress = Progress((number + share) / len(specs), f"{model}: {doing}" + _clock(started))

            entries.append(self.answers.features.compute(spec, pictures, self.session.token, watch))
        if not _is_quick(self.job, entries):

            def drawing(share: float, doing: str) -> None:
                self._check()
                self.progress = Progress(share, doing + _clock(started))

            drawing(0.0, "drawing maps")
            self.answers._drawn(self.session, self.job, entries, drawing)
        return entries

    def _check(self) -> None:
        if self.session.cancelled.is_set() or not self._wanted():
            raise Cancelled

    def _wanted(self) -> bool | None:
        """Whether the session still wants this job. None if what it wants now is unavailable, which was reported."""
        wanted = Job(self.session.settings, tuple(self.session.pictures))
        try:
            return wanted.key == self.job.key
        except PROBLEMS:
            return None

    def _give_up(self, error: Exception) -> None:
        with contextlib.suppress(*PROBLEMS):
            self.session.given_up = self.job.key
        if isinstance(error, Cancelled):
            self.session.tell("Stopped. Change anything, or click, to go on.")
        elif isinstance(error, PROBLEMS):
            tell_problem(self.session, error)
        else:
            self.session.tell(f"This went wrong ({type(error).__name__}); the server's log says more.", True)
            _logger.error("computing features failed", exc_info=error)


def _is_quick(job: Job, entries: list[list[Entry]]) -> bool:
    """Whether the result takes no time worth speaking of, now that the features are there."""
    s = job.settings
    if s.tab == "match":
        return True
    names = s.maps if s.tab == "maps" else (s.map,)
    maps = [entry.maps[name] for side in entries for entry in side for name in names if name in entry.maps]
    products = sum(x.shape[0] * x.numel() for x in maps)  # C x C for each place
    clustered = s.tab == "maps" and s.show == "segments"
    return not clustered and len(maps) <= QUICK_MAPS and products <= QUICK_PRODUCTS


def _clock(started: float) -> str:
    seconds = time.perf_counter() - started
    return f", {seconds:.0f} s" if seconds >= 2 else ""


def tell_problem(session: Session, error: Exception) -> None:
    """Tells a visitor of one of PROBLEMS: in one sentence; how to get missing weights is folded away."""
    told = how_to_get(error) if isinstance(error, ModelError) else str(error)
    model, missing, _ = told.partition(" cannot be loaded, because of")  # the noisy twin's may be missing
    if missing or isinstance(error.__cause__, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        told += (
            "\nFor this page: start it with --download where there is a network, or with the folder: --models "
            "local-dir:FOLDER"
        )
        name = model if missing else session.settings.model
        return session.tell(f"The weights of {name} are not on this machine: choose another model.", True, told)
    session.tell(told, True)
