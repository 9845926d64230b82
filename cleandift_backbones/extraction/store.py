"""The folder that features are written to: shards, their index, what they were made with, and what failed.

Whatever is in the folder is whole: files are written aside and renamed, and a shard holds its own rows. `index.jsonl`
gathers the rows of all shards; those of shards that it does not know yet are read from the shards. Processes write
shards and failures of their own, and share nothing but a lock that dies with its holder.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import replacing, write_text
from .formats import FORMATS, Computed, ShardError

META, INDEX, FAILURES = "meta.json", "index.jsonl", "failures.jsonl"
SHARD_SECONDS = 600.0  # of work that an interruption may lose
LEFT_SECONDS = 3600.0  # since the last byte: nobody writes that file any more


class StoreError(InputError):
    """A folder that cannot be used; the message says why and what to give."""


def read_meta(folder: Path) -> dict:
    """What the features of a folder were made with. Raises StoreError if there is nothing of that kind."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "settings" not in found:
            raise InputError("no settings")
        return found
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no features ({META} is missing); make some with tools/extract.py") from None
    except ValueError as error:
        raise StoreError(f"{folder / META} is damaged ({error}); extract into another folder") from None


def read_rows(folder: Path, format: str) -> list[dict]:
    """The rows of all shards (see `formats`), with the name of their `shard`; each key once, sorted.

    Raises:
        ShardError: a shard is damaged.
    """
    kind = FORMATS[format]
    shards = {path.name for path in folder.glob(f"*{kind.suffix}") if not path.name.startswith(".")}
    rows = [row for row in _read_lines(folder / INDEX) if row["shard"] in shards]
    for name in sorted(shards - {row["shard"] for row in rows}):
        rows += [row | dict(shard=name) for row in kind(folder / name).rows()]
    rows.sort(key=lambda row: (row["key"], row["shard"]))
    return [row for i, row in enumerate(rows) if not i or rows[i - 1]["key"] != row["key"]]


def read_failures(folder: Path, done: set[str]) -> list[dict]:
    """Pictures that could not be read and are not among those done: dicts of key, path, error."""
    found = {}
    for path in [folder / FAILURES, *sorted(folder.glob("failures-*.jsonl"))]:
        found |= {line["key"]: line for line in _read_lines(path) if line["key"] not in done}
    return [found[key] for key in sorted(found)]


def _read_lines(path: Path) -> list[dict]:
    try:
        # Not splitlines: keys may hold what Unicode calls a line's end.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); remove it") from None


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class Store:
    """Takes features and failures of one process.

    Args:
        folder: may hold features of the same settings, which stay.
        settings: all that the features depend on; compared with those of the folder. info: what else is worth telling.
        shard_bytes, shard_items: a shard is written when it has so many bytes or pictures, or after ten minutes.
        rank: of this process, for the names of its files.

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
    ):
        self.folder, self.format = Path(folder), settings["format"]
        self.shard_bytes, self.shard_items = shard_bytes, shard_items
        self.kind = FORMATS[self.format]
        self.name = f"{rank:05d}-{uuid.uuid4().hex[:8]}"  # no other process, or later run, has that name
        self.own_failures = self.folder / f"failures-{self.name}.jsonl"
        self.failures: list[dict] = []
        self.batches: list[Computed] = []
        self.shards, self.items, self.written = 0, 0, 0
        self.last = time.monotonic()
        existed = self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._settle(settings, info, existed)

    def _lock(self) -> FileLock:
        try:
            return FileLock(self.folder / ".lock", timeout=300).acquire()
        except Timeout:
            raise StoreError(f"{self.folder} is locked by another process for five minutes; stop it first") from None

    def _settle(self, settings: dict, info: dict, existed: bool) -> None:
        """Writes down the settings, or compares them with those that are there."""
        path = self.folder / META
        if not path.is_file():
            others = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")] if existed else []
            if others:
                raise StoreError(
                    f"{self.folder} holds other files ({', '.join(sorted(others)[:3])}); give another --out"
                )
            write_text(path, json.dumps(dict(settings=settings, info=info), indent=1, ensure_ascii=False) + "\n")
            return
        old = read_meta(self.folder)["settings"]
        new = json.loads(json.dumps(settings))
        differ = [
            f"{name} {old.get(name)!r}, now {new.get(name)!r}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if differ:
            raise StoreError(
                f"{self.folder} holds features made with other settings: {'; '.join(differ)}. "
                "Give the same settings, or another --out"
            )

    def done(self) -> tuple[set[str], list[str]]:
        """Keys of the pictures that are there, of all processes; and sentences about damaged shards, which go."""
        told = []
        for path in sorted(self.folder.glob(f"*{self.kind.suffix}")):
            if path.name.startswith("."):
                continue
            try:
                self.kind(path)
            except ShardError as error:
                path.unlink(missing_ok=True)
                told.append(f"{error}; its features are computed again")
        return {row["key"] for row in read_rows(self.folder, self.format)}, told

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
        for path in [*self.folder.glob(f".*{self.kind.suffix}.*.part"), *self.folder.glob("failures-*.jsonl")]:
            with suppress(FileNotFoundError):  # renamed meanwhile
                if now - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()
