"""The folder that features are written to: shards, their index, what they were made with, and what failed.

Whatever is in the folder is whole: files are written aside and renamed, and a shard holds its own rows. `index.jsonl`
gathers the rows of all shards; those of shards that it does not know yet are read from the shards. Processes write
shards and failures of their own, and share nothing but a lock, which they take for moments. Files are known by their
names: those of others are neither read nor touched. Damaged shards are renamed to NAME.damaged.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ..utils.atomic import is_file, is_folder, leftovers, reading, replacing, set_aside, write_text
from ..utils.errors import InputError
from ..utils.locks import hold, tidy
from ..utils.records import read_json
from .formats import FORMATS, Computed, ShardError, is_row

META, INDEX, FAILURES = "meta.json", "index.jsonl", "failures.jsonl"
PROCESS = r"\d{5,}-[0-9a-f]{8}"  # names of processes, see `Store`
WEIGHTS_DEPEND_ON = {"model", "model_args", "maps", "timestep", "prompt", "compute_dtype", "size"}  # their hash
LOCK_SECONDS = 300.0  # to wait for another process that gathers the index
SHARD_SECONDS = 600.0  # of work that an interruption may lose
LEFT_SECONDS = 3600.0  # since the last byte: nobody writes that file any more


class StoreError(InputError):
    """A folder that cannot be used; the message says why and what to give."""


def read_meta(folder: Path) -> dict:
    """What the features of a folder were made with. Raises StoreError if there is nothing of that kind."""
    try:
        found = read_json(folder / META)
        settings = found.get("settings")
        if not isinstance(settings, dict) or str(settings.get("format")) not in FORMATS:
            raise InputError("no settings with a format")
        if not isinstance(settings.get("maps"), list) or not all(isinstance(name, str) for name in settings["maps"]):
            raise InputError("no names of maps")
        return found
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no features ({META} is missing); `cleandift extract` makes some") from None
    except ValueError as error:
        raise StoreError(f"{folder / META} is damaged ({error}); extract into another folder") from None


def list_shards(folder: Path, format: str) -> tuple[list[Path], list[str]]:
    """The shards of a folder, sorted, and the names of other files that end like shards."""
    suffix = FORMATS[format].suffix
    shards, others = [], []
    with reading(folder):
        for path in sorted(folder.glob(f"*{suffix}")):
            if re.fullmatch(rf"features-{PROCESS}-\d{{5,}}{re.escape(suffix)}", path.name):
                shards.append(path)
            elif not path.name.startswith("."):
                others.append(path.name)
    return shards, others


def read_rows(folder: Path, format: str) -> list[dict]:
    """The rows of all shards (see `formats`), with the name of their `shard`; each key once, sorted.

    Raises:
        ShardError: a shard is damaged.
    """
    shards = {path.name: path for path in list_shards(folder, format)[0]}
    rows = [row for row in _read_lines(folder / INDEX) if row.get("shard") in shards]
    if not all(map(is_row, rows)):
        raise StoreError(f"{folder / INDEX} is damaged (a line without all fields); move it away: it is made anew")
    for name in sorted(shards.keys() - {row["shard"] for row in rows}):
        rows += [row | dict(shard=name) for row in FORMATS[format](shards[name]).rows()]
    rows.sort(key=lambda row: (row["key"], row["shard"]))
    return [row for i, row in enumerate(rows) if not i or rows[i - 1]["key"] != row["key"]]


def _failure_files(folder: Path) -> list[Path]:
    """Of processes, as they write them."""
    with reading(folder):
        found = sorted(folder.glob("failures-*.jsonl"))
    return [path for path in found if re.fullmatch(rf"failures-{PROCESS}\.jsonl", path.name)]


def read_failures(folder: Path, done: set[str]) -> list[dict]:
    """Pictures that could not be read and are not among those done: dicts of key, path, error."""
    found = {}
    for path in [folder / FAILURES, *_failure_files(folder)]:
        found |= {line["key"]: line for line in _read_lines(path) if line["key"] not in done}
    return [found[key] for key in sorted(found)]


def _read_lines(path: Path) -> list[dict]:
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        # Not splitlines: keys may hold what Unicode calls a line's end.
        lines = [json.loads(line) for line in text.split("\n") if line]
        if not all(isinstance(line, dict) and isinstance(line.get("key"), str) for line in lines):
            raise InputError("a line without a key")
        if not all(isinstance(line.get("shard", ""), str) for line in lines):
            raise InputError("a shard that is no name")
        return lines
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); move it away: it is made anew") from None


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def remove_store(folder: Path) -> None:
    """Removes the files that a store wrote, and the folder if it is empty then; files of others stay."""
    shards = list_shards(folder, read_meta(folder)["settings"]["format"])[0]
    for path in (*shards, *_failure_files(folder), *(folder / name for name in (INDEX, FAILURES, META))):
        path.unlink(missing_ok=True)
    tidy(folder)
    with suppress(OSError):  # others' files
        folder.rmdir()


def check_out(folder: str | Path) -> None:
    """Raises StoreError for a folder of other files, in which nothing must be made, not even a lock."""
    folder = Path(folder)
    if is_file(folder / META) or not is_folder(folder):
        return
    with reading(folder):
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others:
        raise StoreError(f"{folder} holds other files ({', '.join(others[:3])}); give another --out")


class Store:
    """Takes features and failures of one process.

    Args:
        folder: may hold features of the same settings, which stay.
        settings: all that the features depend on; compared with those of the folder. info: what else is worth telling.
        shard_bytes, shard_items: a shard is written when it has so many bytes or pictures, or after ten minutes.
        rank: of this process, for the names of its files.
        log: called with messages.

    Raises:
        StoreError: the folder holds other files, or features of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict,
        info: dict,
        shard_bytes: int = 2**28,
        shard_items: int = 50_000,
        rank: int = 0,
        log: Callable[[str], None] | None = None,
    ):
        self.folder, self.format = Path(folder), settings["format"]
        self.shard_bytes, self.shard_items = shard_bytes, shard_items
        self.kind = FORMATS[self.format]
        self.name = f"{rank:05d}-{uuid.uuid4().hex[:8]}"  # no other process, or later run, has that name
        self.own_failures = self.folder / f"failures-{self.name}.jsonl"
        self.failures: list[dict] = []
        self.batches: list[Computed] = []
        self.shards, self.items, self.written = 0, 0, 0
        self.last, self.log = time.monotonic(), log
        check_out(self.folder)
        with self._lock():
            self._settle(settings, info)

    def _lock(self) -> AbstractContextManager[None]:
        return hold(self.folder, "index", LOCK_SECONDS, self.log)

    def _settle(self, settings: dict, info: dict) -> None:
        """Writes down the settings, or compares them with those that are there."""
        path = self.folder / META
        if not path.is_file():
            check_out(self.folder)
            write_text(path, json.dumps(dict(settings=settings, info=info), indent=1, ensure_ascii=False) + "\n")
            return
        old = read_meta(self.folder)["settings"]
        new = json.loads(json.dumps(settings))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if WEIGHTS_DEPEND_ON & set(names):  # other maps need fewer or more layers, whose hash says nothing then
            names = [name for name in names if name != "weights"]
        differ = [f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names]
        if differ:
            raise StoreError(
                f"{self.folder} holds features made with other settings: {'; '.join(differ)}. "
                "Give the same settings, or another --out"
            )

    def done(self) -> tuple[set[str], list[str]]:
        """Keys of the pictures that are there, of all processes; and messages about shards that do not count.

        Raises:
            FileError: a shard cannot be opened at the moment. It is left as it is.
        """
        shards, others = list_shards(self.folder, self.format)
        messages = []
        if others:
            messages.append(f"{self.folder} holds other files, which are not read: {', '.join(others[:3])}")
        for path in shards:
            try:
                self.kind(path)
            except ShardError as error:
                messages.append(f"{error}; kept as {set_aside(path).name}, its features are computed again")
            except FileNotFoundError:  # another process has set it aside
                pass
        return {row["key"] for row in read_rows(self.folder, self.format)}, messages

    def add(self, batch: Computed) -> None:
        """Takes features; writes a shard when there are enough."""
        self.batches.append(batch)
        self.items += len(batch.keys)
        size = sum(held.nbytes for held in self.batches)
        if size >= self.shard_bytes or self.items >= self.shard_items or time.monotonic() - self.last > SHARD_SECONDS:
            self.flush()

    def fail(self, key: str, path: str, error: str) -> None:
        """Notes a picture that could not be read."""
        self.failures.append(dict(key=key, path=path, error=error))

    def flush(self) -> None:
        """Writes a shard of what there is, and the failures.

        Raises:
            OSError: the disk does not take them. Nothing half-written remains.
        """
        batches, self.batches, self.items = self.batches, [], 0
        if batches:
            path = self.folder / f"features-{self.name}-{self.shards:05d}{self.kind.suffix}"
            with replacing(path) as aside:
                self.written += len(self.kind.write(aside, batches))
            self.shards += 1
        if self.failures:
            _write_lines(self.own_failures, self.failures)
        self.last = time.monotonic()

    def merge(self) -> tuple[set[str], list[dict]]:
        """Gathers the index and the failures of all processes as far as they are; returns keys and failures."""
        with self._lock():
            rows = read_rows(self.folder, self.format)
            _write_lines(self.folder / INDEX, rows)
            done = {row["key"] for row in rows}
            failures = read_failures(self.folder, done)
            if failures or (self.folder / FAILURES).exists():
                _write_lines(self.folder / FAILURES, failures)
            self.own_failures.unlink(missing_ok=True)
        return done, failures

    def clean(self) -> None:
        """Removes what killed processes left: half-written shards, and failures, which `merge` has gathered.

        Other processes may be writing, here or on another machine. Locks do not tell: not every shared disk has them.
        What was last written to an hour ago does, by the disk's own clock: that of the index, which is new.
        """
        now = (self.folder / INDEX).stat().st_mtime
        halves = leftovers(self.folder, rf"features-{PROCESS}-\d{{5,}}{re.escape(self.kind.suffix)}")
        for path in [*halves, *_failure_files(self.folder)]:
            with suppress(FileNotFoundError):  # renamed meanwhile
                if now - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()
        tidy(self.folder)
