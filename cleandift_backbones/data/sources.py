"""Which pictures to take: of a folder, of WebDataset shards, of a list. Nothing is decoded here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..utils.atomic import is_text
from ..utils.errors import InputError
from ..utils.progress import tqdm
from ..utils.records import TABLES, read_records, read_text, split_lines
from .decoding import endings, read_image
from .listing import left_out_report, list_folder
from .shards import Member, check_places, read_image_at, scan, shards_of


class SourceError(InputError):
    """Data that cannot be used; the message says what was found and what to give."""


class Entry(NamedTuple):
    """A picture to be read.

    Attributes:
        key: its name in the output, unlike that of any other.
        path: its file, or the shard that holds it.
        offset, size: its bytes in a shard; size -1 for a file of its own.
        prompt: text for the models that take one.
    """

    key: str
    path: str
    offset: int = 0
    size: int = -1
    prompt: str = ""

    def read(self) -> Image.Image:
        """The picture, 8-bit RGB. Raises ImageError if it cannot be read."""
        if self.size < 0:
            return read_image(self.path, min_side=1)
        return read_image_at(self.path, Member(self.key, self.offset, self.size))


def list_entries(
    data: str, shard_names: bool = False, left_out: Counter[str] | None = None
) -> tuple[list[Entry], list[str]]:
    """The pictures of a folder (see `listing.list_folder`), of .tar shards (see `shards.shards_of`), or of a list.

    A list is a text file with a path per line, or a table (.jsonl, .csv, .parquet) with `path` (or `file_name`), and
    perhaps `key` and `prompt`. Paths are relative to the list's folder. Keys are paths below the folder, the shards'
    own keys (with `shard_names` behind the name of their shard), or paths as the list has them.

    Args:
        left_out: counts the files that are no pictures, by suffix or reason.

    Returns:
        The entries, in the order of the list or sorted; and sentences about what is left out though it should not be:
        damaged shards, folders that cannot be read, names that are no text.

    Raises:
        SourceError: nothing there, or a key twice.
    """
    path, left_out = Path(data), Counter() if left_out is None else left_out
    try:
        if os.path.exists(data) and not path.is_dir() and path.suffix.lower() in endings():
            raise SourceError(f"{data} is a picture; give its folder, or a list of pictures")
        if not os.path.exists(data) and not any(sign in data for sign in ("*", "?", "[", "{", ".tar")):
            raise SourceError(f"{data}: no such folder, shards or list")
        if shards := shards_of(data):
            entries, told = _shards(shards, shard_names, left_out)
        elif path.is_dir():
            entries, told = _folder(path, left_out)
        else:
            entries, told = list(_list(path)), []
    except SourceError:
        raise
    except InputError as error:
        raise SourceError(str(error)) from None
    nameless = [entry for entry in entries if not entry.key or not is_text(entry.key)]
    if nameless:
        told.append(f"{len(nameless)} names are no UTF-8 and are left out, e.g. {nameless[0].key!r}; rename them")
        entries = [entry for entry in entries if entry.key and is_text(entry.key)]
    if not entries:
        reasons = "; ".join([*told, *filter(None, [left_out_report(left_out)])])
        raise SourceError(
            f"{data} holds no pictures ({', '.join(endings())}, or .tar shards of them) {reasons}".strip()
        )
    seen: dict[str, Entry] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.key, entry)) is not entry:
            several = "rename one of the shards" if shard_names else "give --shard-names"
            inside = several if entry.path != other.path else "give each file in it a name of its own"
            remedy = inside if entry.size >= 0 else "give each a key of its own"
            raise SourceError(f"{data}: two pictures have the key {entry.key!r} ({other.path}, {entry.path}); {remedy}")
    return entries, told


def _folder(root: Path, left_out: Counter[str]) -> tuple[list[Entry], list[str]]:
    told: list[str] = []
    found = list_folder(root, lambda error: told.append(f"{error}: its pictures are left out"))
    left_out.update(found.left_out)
    return [Entry(path.relative_to(root).as_posix(), str(path)) for path in found.images], told


def _list(path: Path) -> Iterator[Entry]:
    if path.suffix.lower() in TABLES:
        lines = read_records(path)
    elif path.suffix.lower() in (".json", ".tsv"):
        raise SourceError(f"{path}: a list is a text file with a path per line, or a table: .jsonl or .csv")
    else:
        lines = ((n, {"path": line.strip()}) for n, line in enumerate(split_lines(read_text(path)), 1) if line.strip())
    for number, told in lines:
        name, prompt, key = told.get("path") or told.get("file_name"), told.get("prompt") or "", told.get("key")
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise SourceError(f"{path}, line {number}: expected a path (and text), got {str(told)[:80]}")
        key = name if key in (None, "") else key
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise SourceError(f"{path}, line {number}: the key {key!r} is no text and no whole number")
        yield Entry(str(key), str(path.parent / name), prompt=prompt)


def _shards(shards: list[str], shard_names: bool, left_out: Counter[str]) -> tuple[list[Entry], list[str]]:
    with ThreadPoolExecutor(8) as pool:  # mostly waits for the disk
        found = list(
            tqdm(pool.map(scan, shards), desc="listing", unit="shard", total=len(shards), disable=len(shards) < 50)
        )
    entries, told = [], []
    for shard in found:
        left_out.update(shard.left_out)
        if shard.damage:
            told.append(shard.damage)
        front = f"{Path(shard.path).stem}/" if shard_names else ""
        entries += [Entry(front + s.key, shard.path, s.image.offset, s.image.size) for s in shard.samples]
        check_places(shard)
    return entries, told
