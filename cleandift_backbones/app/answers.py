"""From what a visitor wants to what they see: which features that needs, and the result made of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from ..evaluation.features import ModelError
from ..images import ImageError
from .comparing import compare_entries, main_directions, two_specs
from .extracting import Cancelled, Features, Spec, Watch, how_to_get
from .mapping import map_entries
from .matching import match_entries
from .pictures import Picture
from .results import Result
from .sessions import Session, Settings
from .store import Entry

POLL = 0.15  # seconds between two looks at work under way
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


@dataclass
class Progress:
    """How far the work is: a share of 0..1 and what is being done."""

    share: float
    text: str


class Answers:
    """Makes results for sessions out of features."""

    def __init__(self, features: Features):
        self.features = features

    def at_once(self, session: Session) -> Result | None:
        """The result, if everything that takes long is there already; None otherwise. Call with the session's lock."""
        job = Job(session.settings, tuple(session.pictures))
        entries = [self.features.kept(spec, job.pictures, session.token) for spec in job.specs]
        if None in entries:
            return None
        if job.settings.tab == "maps" and job.settings.show == "segments" and not session.remembers("maps", job.key):
            return None
        return self._result(session, job, entries)

    def _result(self, session: Session, job: Job, entries: list[list[Entry]], watch: Watch | None = None) -> Result:
        s, pictures = job.settings, job.pictures
        if s.tab == "match":
            points = session.numbered_points()
            result = match_entries(pictures, entries[0], job.specs[0].settled(), s.map, points, s.mutual_only)
        elif s.tab == "maps":
            spec = job.specs[0].settled()
            given = (pictures, entries[0], spec, s.maps, s.show, s.shared, s.clusters, watch)
            result = session.remember("maps", job.key, lambda: map_entries(*given))
        else:
            given = (pictures, *entries, job.specs, s.map)
            directions = session.remember("directions", job.key, lambda: main_directions(*given))
            result = compare_entries(*given, session.numbered_points(), directions)
        session.results[s.tab] = result
        return result

    def work(self, session: Session) -> Iterator[Progress | Result | None]:
        """Computes what the session wants, however often that changes meanwhile.

        Yields:
            Progress now and then; at the end the Result, or None if there is none: the session's notice says why.
        """
        with session.lock:
            if session.working:
                return  # whoever works already looks at what is wanted when it is done
            session.working = True
        try:
            while True:
                with session.lock:
                    session.cancelled.clear()
                    job = Job(session.settings, tuple(session.pictures))
                attempt = _Attempt(self, session, job)
                while attempt.is_alive():
                    attempt.join(POLL)
                    if attempt.is_alive():
                        yield attempt.progress
                with session.lock:
                    if not session.closed and not attempt.wanted():
                        continue
                    if isinstance(attempt.error, Cancelled):
                        session.tell("Stopped. Change anything, or click, to go on.")
                    elif attempt.error is not None:
                        session.tell(explain(attempt.error), True)
                    result = None
                    if attempt.error is None:
                        result = self._result(session, job, attempt.entries)
                    session.working = False
                yield result
                return
        finally:
            with session.lock:
                session.working = False
                if session.closed:  # features that came in after the page was closed
                    self.features.store.forget(session.token)


class _Attempt(threading.Thread):
    """One job in a thread of its own, which stops as soon as the session wants something else."""

    def __init__(self, answers: Answers, session: Session, job: Job):
        super().__init__(daemon=True)
        self.answers, self.session, self.job = answers, session, job
        self.entries: list[list[Entry]] = []
        self.error: Exception | None = None
        self.progress = Progress(0.0, f"loading {job.settings.model}")
        self.start()

    def wanted(self) -> bool:
        try:
            return Job(self.session.settings, tuple(self.session.pictures)).key == self.job.key
        except PROBLEMS:  # what is wanted now cannot be had, which is to be found out by trying
            return Job(self.session.settings, tuple(self.session.pictures)) == self.job

    def run(self) -> None:
        started = time.perf_counter()
        try:
            specs, pictures = self.job.specs, self.job.pictures
            for number, spec in enumerate(specs):
                self.progress = Progress(number / len(specs), f"{spec.model}: computing features")

                def watch(share: float, number: int = number, text: str = self.progress.text) -> None:
                    self._check()
                    self.progress = Progress((number + share) / len(specs), text + _clock(started))

                self.entries.append(self.answers.features.compute(spec, pictures, self.session.token, watch))
            if self.job.settings.tab == "maps":

                def drawing(share: float) -> None:
                    self._check()
                    self.progress = Progress(share, "finding clusters" + _clock(started))

                self.answers._result(self.session, self.job, self.entries, drawing)
        except Exception as error:  # told to the visitor by whoever waits for this thread
            self.error = error

    def _check(self) -> None:
        if self.session.cancelled.is_set() or not self.wanted():
            raise Cancelled


def _clock(started: float) -> str:
    seconds = time.perf_counter() - started
    return f", {seconds:.0f} s" if seconds >= 2 else ""


def explain(error: Exception) -> str:
    """An error in words for a visitor; one that nobody foresaw is raised."""
    if isinstance(error, ModelError):
        return how_to_get(error)
    if isinstance(error, PROBLEMS):
        return str(error)
    raise error
