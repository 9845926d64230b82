"""Which pictures to take: of a folder, of WebDataset shards, of a list. Nothing is decoded here."""

from __future__ import annotations

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import InputError
from ..images import ENDINGS, ImageError, find_pictures, read_image
from ..progress import tqdm
from ..tars import SUFFIXES, find_shards

_ENDINGS = (*ENDINGS, ".gif")


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
        name = f"{self.path}:{self.key}"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error}); check the shard") from None
        return read_image(data, min_side=1, name=name)


def list_entries(data: str, shard_names: bool = False) -> tuple[list[Entry], list[str]]:
    """The pictures of a folder (see `images.find_pictures`), of .tar shards (see `tars.find_shards`), or of a list.

    A list is a text file with a path per line, or .jsonl with an object per line: `path` (or `file_name`), and perhaps
    `key` and `prompt`. Paths are relative to the list's folder. Keys are paths below the folder, the shards' own keys
    (with `shard_names` behind the name of their shard), or paths as the list has them.

    Returns:
        The entries, in the order of the list or sorted; and sentences about what is left out: damaged shards, folders
        that cannot be read, names that are no text.

    Raises:
        SourceError: nothing there, or a key twice.
    """
    path, told = Path(data), []
    if path.suffix == ".tar" or any(sign in data for sign in "{*?["):
        entries, told = _shards(data, shard_names)
    elif path.is_dir():
        entries, told = _folder(path)
        if not entries and any(path.glob("*.tar")):
            entries, told = _shards(data, shard_names)
    elif path.is_file():
        if path.suffix.lower() in _ENDINGS:
            raise SourceError(f"{data} is a picture; give its folder, or a list of pictures")
        if path.suffix.lower() in (".csv", ".tsv", ".json", ".parquet"):
            raise SourceError(f"{data}: a list is a text file with a path per line, or .jsonl with an object per line")
        entries = _list(path)
    else:
        raise SourceError(f"{data}: no such folder, shards or list")
    nameless = [entry for entry in entries if not _is_text(entry.key)]
    if nameless:
        told.append(f"{len(nameless)} names are no UTF-8 and are left out, e.g. {nameless[0].key!r}; rename them")
        entries = [entry for entry in entries if _is_text(entry.key)]
    if not entries:
        raise SourceError(f"{data} holds no pictures ({', '.join(_ENDINGS)}, or .tar shards of them) {'; '.join(told)}")
    seen: dict[str, Entry] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.key, entry)) is not entry:
            remedy = "give --shard-names" if entry.size >= 0 else "give each a key of its own"
            raise SourceError(f"{data}: two pictures have the key {entry.key!r} ({other.path}, {entry.path}); {remedy}")
    return entries, told


def _is_text(key: str) -> bool:
    try:
        return bool(key.encode())
    except UnicodeEncodeError:
        return False


def _folder(root: Path) -> tuple[list[Entry], list[str]]:
    told: list[str] = []
    paths = find_pictures(root, _ENDINGS, lambda error: told.append(f"{error}: its pictures are left out"))
    return [Entry(path.relative_to(root).as_posix(), str(path)) for path in paths], told


def _list(path: Path) -> list[Entry]:
    entries = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not (line := line.strip()):
                continue
            told = json.loads(line) if path.suffix == ".jsonl" else {"path": line}
            name = told.get("path") or told.get("file_name") if isinstance(told, dict) else None
            if not isinstance(name, str) or not isinstance(told.get("prompt") or "", str):
                raise SourceError(f"{path}, line {number}: expected an object with a path (and text), got {line[:80]}")
            key = name if told.get("key") in (None, "") else told["key"]
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise SourceError(f"{path}, line {number}: the key {key!r} is no text and no whole number")
            entries.append(Entry(str(key), str(path.parent / name), prompt=told.get("prompt") or ""))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no text ({error}); give a folder, .tar shards, or a list of paths") from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}, line {number}: no JSON ({error})") from None
    return entries


def _shards(data: str, shard_names: bool) -> tuple[list[Entry], list[str]]:
    try:
        shards = find_shards(data)
    except ValueError as error:
        raise SourceError(str(error)) from None
    with ThreadPoolExecutor(8) as pool:  # mostly waits for the disk
        found = list(
            tqdm(pool.map(_scan, shards), desc="listing", unit="shard", total=len(shards), disable=len(shards) < 50)
        )
    entries = [
        entry._replace(key=f"{Path(shard).stem}/{entry.key}") if shard_names else entry
        for shard, (part, _) in zip(shards, found)
        for entry in part
    ]
    return entries, [told for _, told in found if told]


def _scan(shard: str) -> tuple[list[Entry], str]:
    """Where the pictures of a shard lie, and what is wrong with it."""
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, tuple[int, Entry]] = {}  # of several pictures of a sample the first kind of SUFFIXES counts
    told = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, suffix = base_plus_ext(member.name)
                if key and member.isfile() and suffix.lower() in SUFFIXES:
                    rank = SUFFIXES.index(suffix.lower())
                    if key not in samples or rank < samples[key][0]:
                        samples[key] = rank, Entry(key, shard, member.offset_data, member.size)
                tar.members = []  # it would keep them all
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
                told = f"{shard} is damaged behind byte {tar.offset}: what follows is left out; fetch it again"
    except (tarfile.TarError, OSError) as error:
        told = f"{shard} is damaged or no plain .tar ({error}): what follows is left out; fetch it again"
    return [entry for _, entry in samples.values()], told
