"""What one visitor has before them: pictures, points, settings. Nobody else's, and gone when the page closes."""

from __future__ import annotations

import secrets
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..data.images import ImageError
from ..models.architectures import NOT_PHOTOGRAPHS, spec_of
from ..publish.training_data import training_data
from ..utils.errors import InputError
from ..visualize.feature_maps import SHOWS
from ..visualize.pictures import Picture, open_picture, open_sample, sample_names
from ..visualize.results import Result

MOST_PICTURES, MOST_POINTS, MOST_SESSIONS, LONGEST_PROMPT, LONGEST_NAME = 8, 8, 50, 300, 80
TABS = ("match", "maps", "compare")
FIRST_MODEL = "cleandift_tiny"
_FIRST = spec_of(FIRST_MODEL).arch.defaults
FIRST_PICTURES = ("cat-face_noto.png", "cat-face_fluentflat.png", "tiger-face_fluent3d.png")
FIRST_POINT = (0.19, 0.17)  # the first picture's left ear

trained_on = lru_cache(maxsize=256)(training_data)  # each card is read once


@dataclass(frozen=True)
class Settings:
    """What the page's controls say."""

    tab: str = "match"
    model: str = FIRST_MODEL
    map: str = _FIRST.map
    prompt: str = ""
    mutual_only: bool = False
    maps: tuple[str, ...] = _FIRST.shown
    show: str = "pca"
    shared: bool = True
    clusters: int = 6
    timestep: int = int(_FIRST.timestep)
    ensemble_size: int = _FIRST.ensemble_size

    def __post_init__(self):
        if self.tab not in TABS or self.show not in SHOWS:
            raise InputError(f"tab {self.tab!r} or show {self.show!r} is unknown")
        if len(self.prompt) > LONGEST_PROMPT:
            raise InputError(f"a prompt of {len(self.prompt)} characters is too long; give at most {LONGEST_PROMPT}")


class Session:
    """One visitor.

    Attributes:
        token: a secret that the visitor's browser names in addresses of pictures and results.
        pictures: each only once. points: (key of the picture, x, y) as fractions. selected: number of a point.
        tab: the one that is open. settings: what the controls last said.
        notice: what to tell, and whether it is an error. details: what is folded away below it. shown: whether it was
            told.
        warned: whether the notice about photographs was shown at an upload.
        result: the last one, for downloads.
        work: the thread that computes features, if there is one. cancelled: set when the visitor wants that no longer.
        ready: what the work was, and what came of it. given_up: work that was stopped or failed.
        version: counts the views sent, so that the browser can drop one that was overtaken.
        lock: held while any of this changes.
    """

    def __init__(self):
        self.token = secrets.token_urlsafe(18)
        self.pictures: list[Picture] = [open_sample(name) for name in FIRST_PICTURES]
        self.points: list[tuple[str, float, float]] = [(self.pictures[0].key, *FIRST_POINT)]
        self.selected = 0
        self.tab = TABS[0]
        self.settings = Settings()
        self.notice: tuple[str, bool] = ("", False)
        self.details = ""
        self.shown = self.warned = False
        self.result: Result | None = None
        self.closed = False
        self.work: Any = None
        self.ready: tuple[Hashable, Any] | None = None
        self.given_up: Hashable = None
        self.cancelled = threading.Event()
        self.version = 0
        self.lock = threading.RLock()
        self._memo: dict[str, tuple[Hashable, Any]] = {}

    def remember(self, what: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """The last value made of this kind, if its key is still the same; a new one otherwise."""
        if what not in self._memo or self._memo[what][0] != key:
            self._memo[what] = (key, make())
        return self._memo[what][1]

    def remembers(self, what: str, key: Hashable) -> bool:
        return what in self._memo and self._memo[what][0] == key

    def numbered_points(self) -> list[tuple[int, float, float]]:
        """Points with the number of their picture."""
        keys = [picture.key for picture in self.pictures]
        return [(keys.index(key), x, y) for key, x, y in self.points]

    # --- what a visitor can do: each leaves a notice where there is something to say --------------------------------

    def add_point(self, key: str, x: float, y: float) -> None:
        """A click. The ninth point takes the place of the selected one."""
        if key not in [picture.key for picture in self.pictures]:
            return self.tell("That picture is no longer here.", True)
        if not (0 <= x <= 1 and 0 <= y <= 1):
            return self.tell("That was outside the picture: click a point inside it.", True)
        if len(self.points) < MOST_POINTS:
            self.points.append((key, x, y))
            self.selected = len(self.points) - 1
        else:
            self.points[self.selected] = (key, x, y)
            self.tell(f"There are {MOST_POINTS} points: the selected one moved. Clear some to set more.")

    def select_point(self, number: int) -> None:
        if 0 <= number < len(self.points):
            self.selected = number

    def remove_point(self, number: int) -> None:
        if 0 <= number < len(self.points):
            del self.points[number]
            self.selected -= number < self.selected  # the same point stays selected
            self.selected = max(0, min(self.selected, len(self.points) - 1))

    def clear_points(self) -> None:
        self.points, self.selected = [], 0

    def add_sample(self, name: str) -> None:
        if name not in sample_names():  # a name from a browser opens nothing else
            return self.tell("There is no such sample.", True)
        self.add_picture(open_sample(name))

    def add_picture(self, picture: Picture) -> bool:
        """Whether there was room for it, and it is new."""
        if picture.key in [p.key for p in self.pictures]:
            self.tell(f"{picture.name} is already here.")
            return False
        if len(self.pictures) >= MOST_PICTURES:
            self.tell(f"There are {MOST_PICTURES} pictures, which is the most: remove one first.", True)
            return False
        self.pictures.append(Picture(self._free_name(picture.name), picture.image, picture.note, picture.key))
        return True

    def add_upload(self, content: bytes, name: str) -> bool:
        """Reads a picture that was sent, which takes a while, and adds it. Call without the session's lock."""
        name = name.replace("\\", "/").split("/")[-1]  # spaces of all kinds stay: macOS's screenshots have a narrow one
        name = "".join(c for c in name if c.isprintable() or unicodedata.category(c) == "Zs")
        stem, dot, suffix = name.rpartition(".") if len(name.rpartition(".")[2]) < 8 else (name, "", "")
        name = f"{stem[:LONGEST_NAME]}{dot}{suffix}".strip(". ") or "picture.png"
        try:
            picture, wrong = open_picture(content, name), ""
        except ImageError as error:
            picture, wrong = None, str(error)
        with self.lock:
            if self.closed:
                return False
            if wrong:
                self.tell(wrong, True)
            added = not wrong and self.add_picture(picture)
            if added and picture.note:
                self.tell(f"{self.pictures[-1].name}: {picture.note}.")
            known = trained_on(self.settings.model)
            if added and not self.warned and NOT_PHOTOGRAPHS in known:
                self.warned = True
                self.tell(f"{self.settings.model} is trained on {known}.")
            return added

    def remove_picture(self, key: str) -> None:
        self.pictures = [p for p in self.pictures if p.key != key]
        chosen = self.points[self.selected : self.selected + 1]
        self.points = [point for point in self.points if point[0] != key]
        self.selected = self.points.index(chosen[0]) if chosen and chosen[0] in self.points else 0

    def stop(self) -> None:
        """The work, if there is any, is not wanted any more."""
        if self.work is not None:
            self.cancelled.set()

    def tell(self, text: str, error: bool = False, details: str = "") -> None:
        """A line for the visitor, below those that were not shown yet; `details` can be unfolded."""
        before, wrong = ("", False) if self.shown else self.notice
        self.details = details or ("" if self.shown else self.details)
        again = f"\n{text}\n" in f"\n{before}\n"  # of many files the same may be said
        told = before if again else f"{before}\n{text}".strip()
        self.notice, self.shown = (told, wrong or error), False

    def take_notice(self) -> tuple[str, bool]:
        """What there is to tell. It stays until there is something else, or the visitor does something else."""
        self.shown = True
        return self.notice

    def begin_action(self) -> None:
        """What was told of the last action, and that its work was given up, is over."""
        self.given_up = None
        if self.shown:
            self.notice, self.details = ("", False), ""

    def _free_name(self, name: str) -> str:
        names = [picture.name for picture in self.pictures]
        stem, dot, suffix = name.rpartition(".")
        stem, suffix = (stem, dot + suffix) if stem else (name, "")
        number, free = 2, name
        while free in names:
            number, free = number + 1, f"{stem}_{number}{suffix}"
        return free


@dataclass
class Sessions:
    """All visitors, by the name that their page gave itself; the longest silent one goes when there are too many.

    Args:
        on_close: called with a session that is gone.
    """

    on_close: Callable[[Session], None] = lambda session: None
    _by_page: OrderedDict[str, Session] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._by_page)

    def of(self, page: str, begin: bool = True) -> Session:
        """The page's session, a new one if there is none. Unless `begin`, that is a closed one, which nobody keeps."""
        with self._lock:
            if page not in self._by_page:
                session = Session()
                if not begin:
                    session.closed, session.pictures, session.points = True, [], []  # no address leads to them
                    return session
                self._by_page[page] = session
            self._by_page.move_to_end(page)
            crowd: Sequence[str] = list(self._by_page)[: max(0, len(self._by_page) - MOST_SESSIONS)]
            session = self._by_page[page]
        for name in crowd:
            self.close(name)
        return session

    def with_token(self, token: str) -> Session | None:
        said = token.encode(errors="replace")  # whatever stands in an address
        with self._lock:
            return next((s for s in self._by_page.values() if secrets.compare_digest(s.token.encode(), said)), None)

    def close(self, page: str) -> None:
        """Forgets a page, its pictures and its results."""
        with self._lock:
            session = self._by_page.pop(page, None)
        if session is not None:
            session.cancelled.set()
            with session.lock:  # an answer that is being made keeps nothing after this
                session.closed = True
                self.on_close(session)
