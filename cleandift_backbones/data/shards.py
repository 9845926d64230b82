"""WebDataset shards on disk: which there are, and the images and captions in each.

One index of a shard serves extraction and training, so that both see the same images under the same keys. A key is a
file's path up to the first dot of its name, as WebDataset says. An image whose name has more dots ("img_0.5.png",
"x.left.png") counts for itself, under its path without the last suffix, where its sample has no image of one suffix.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..utils.atomic import check_plain
from ..utils.errors import InputError
from .decoding import endings
from .listing import CAPTION_ENDINGS, HIDDEN, METADATA, counted, expand, is_hidden, list_names, suffix_of

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COMPRESSED = {rb"\x1f\x8b": gzip.open, rb"BZh[1-9]1AY&SY": bz2.open, rb"\xfd7zXZ\0": lzma.open}  # by their first bytes
LABEL_ENDING = ".cls"  # of the file with an image's class, as WebDataset has it
_OWN = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes
FURTHER, TWICE = "further images of a sample", "names that come twice"


class Member(NamedTuple):
    """A file in a shard: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """An image in a shard, what may be its caption, in the order of CAPTION_ENDINGS, and its .cls file."""

    key: str
    image: Member
    captions: list[Member]
    label: Member | None = None


@dataclass
class Shard:
    """What is in a shard.

    Attributes:
        samples: in the order of their images.
        damage: a sentence about what is wrong with it, or "". Samples are those in front of the damage.
        left_out: count of other files, by suffix or reason; .cls files too, which most readers ignore.
        compressed: as a whole: its members cannot be read at their places.
    """

    path: str
    samples: list[Sample] = field(default_factory=list)
    damage: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    compressed: bool = False


def shards_of(text: str | Path) -> list[str]:
    """The shards that a path or pattern stands for (see `listing.expand`): a file, a folder's .tar files, or several.

    Returns:
        Paths, sorted; [] for what stands for images: a folder without .tar files or with a metadata file, or a file
        with another suffix.

    Raises:
        InputError: nothing there; a folder of both shards and images; a pattern of other files.
    """
    text = os.fspath(text)
    found = expand(text)
    missing = [path for path in found if not os.path.exists(path)]
    if missing or not found:
        raise InputError(f"no shard {missing[0]}" if missing else f"no .tar shards in {text}: give a folder or pattern")
    if found == [text]:
        if not os.path.isdir(text):
            return found if text.lower().endswith(TAR_ENDINGS) else []
        found = list_names(text, ".tar")
        if found and list_names(text, METADATA):
            return []
        if found and (images := list_names(text, endings())):
            raise InputError(
                f"{text} holds {counted(len(found), '.tar shard')} and {counted(len(images), 'image')}, such as "
                f"{images[0]}: give {os.path.join(text, '*.tar')} for the shards, or move the images elsewhere"
            )
        return found
    strange = [path for path in found if not path.lower().endswith(TAR_ENDINGS) or os.path.isdir(path)]
    if strange:
        raise InputError(f"{text}: {strange[0]} is no .tar shard; patterns are for shards, give a folder of images")
    return found


def find_shards(text: str | Path) -> list[str]:
    """The shards of `shards_of`. Raises InputError if there are none."""
    found = shards_of(text)
    if not found:
        raise InputError(f"no .tar shards in {text}: give a folder or a pattern")
    return found


@contextmanager
def open_shard(path: str | Path) -> Iterator[BinaryIO]:
    """A shard's bytes, decompressed where it is compressed."""
    check_plain(path)
    with open(path, "rb") as file:
        opener = next((opener for mark, opener in _COMPRESSED.items() if re.match(mark, file.peek(16))), None)
        if opener is None:
            yield file
        else:
            with opener(file) as inside:
                yield inside


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes of a member of an opened shard. Raises InputError if they are not all there."""
    try:
        file.seek(member.offset)
        data = file.read(member.size)
    except (OverflowError, MemoryError):  # of a size that a damaged header tells
        data = b""
    if len(data) < member.size:
        raise InputError(f"{member.name} is cut short")
    return data


def check_places(shard: Shard) -> None:
    """Raises InputError for a shard whose images cannot be read at their places."""
    if shard.compressed and shard.samples:
        raise InputError(f"{shard.path} is compressed, and images are read at their places: unpack it (gunzip)")


def scan(path: str | Path, most: int | None = None) -> Shard:
    """An index of a shard: only headers are read, and damage is reported in the result, not raised.

    Several archives in one file, as `cat a.tar b.tar` makes, are read to the end.

    Args:
        most: look at so many files only.
    """
    shard, known = Shard(str(path)), frozenset(endings())
    images: dict[tuple[int, str], list[Member]] = {}
    captions: dict[tuple[int, str], dict[str, Member]] = {}
    labels: dict[tuple[int, str], Member] = {}
    seen: set[tuple[int, str]] = set()
    try:
        with open_shard(path) as file:
            shard.compressed = not isinstance(file, io.BufferedReader)
            for archive, info in _members(file):
                if most is not None and len(seen) >= most:
                    break
                name = info.name
                if info.isdir() or _OWN.match(name):
                    continue
                if any(map(is_hidden, name.split("/"))):
                    shard.left_out[HIDDEN] += 1
                elif not info.isfile():
                    shard.left_out["links"] += 1
                elif info.issparse():  # tar -S: the bytes do not lie there as they are
                    shard.left_out["sparse files"] += 1
                elif (archive, name) in seen:
                    shard.left_out[TWICE] += 1
                else:
                    seen.add((archive, name))
                    member = Member(name, info.offset_data, info.size)
                    stem, suffix = os.path.splitext(name)
                    if (suffix := suffix.lower()) in known:
                        images.setdefault((archive, _key(name)), []).append(member)
                    elif suffix in CAPTION_ENDINGS:
                        captions.setdefault((archive, stem), {})[suffix] = member
                    else:
                        shard.left_out[suffix_of(name)] += 1
                        if suffix == LABEL_ENDING:
                            labels[archive, stem] = member
    except Exception as error:  # tarfile raises nearly anything on damaged files
        shard.damage = f"{path} is damaged or no plain .tar ({error}): what follows cannot be read; fetch it again"
    _pair(shard, images, captions, labels)
    return shard


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _pair(shard: Shard, images: dict, captions: dict, labels: dict) -> None:
    """Fills in the samples, and counts the files that are in none."""
    rank, used = {suffix: place for place, suffix in enumerate(endings())}, set()
    for (archive, key), members in images.items():
        plain = [member for member in members if os.path.splitext(member.name)[0] == key]
        if plain:
            plain = [min(plain, key=lambda member: rank[os.path.splitext(member.name)[1].lower()])]
            shard.left_out[FURTHER] += len(members) - 1
        for member in plain or members:
            stem = os.path.splitext(member.name)[0]
            place = next((place for place in ((archive, stem), (archive, key)) if place in captions), None)
            beside = captions.get(place, {})
            used.add(place)
            label = labels.get((archive, stem)) or labels.get((archive, key))
            shard.samples.append(Sample(stem, member, [beside[s] for s in CAPTION_ENDINGS if s in beside], label))
    for place in captions.keys() - used:
        shard.left_out.update(captions[place].keys())
    shard.left_out = +shard.left_out  # without zeros


def _members(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """(number of the archive, header) of all archives that lie one after the other in a file.

    Raises:
        InputError: damage that tarfile takes for an end. Others: what tarfile raises.
    """
    archive, start = 0, 0
    end = os.fstat(file.fileno()).st_size if isinstance(file, io.BufferedReader) else None
    while start is not None:
        file.seek(start)
        tar = tarfile.TarFile(fileobj=file)
        last = start
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            held = 0 if info.issparse() else info.size
            if info.size < 0 or (end is not None and info.offset_data + held > end):
                raise InputError(f"unexpected end of data in {info.name}")
            yield archive, info
            if tar.offset <= last:
                raise InputError(f"a header behind byte {last} points back")
            last = tar.offset
        archive, start = archive + 1, _next_archive(file, tar.offset)


def _next_archive(file: BinaryIO, offset: int) -> int | None:
    """Where another archive begins behind the end of one, or None: zeros come between."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise InputError("it ends without the mark of an end: it may be cut short")
    if block.strip(b"\0"):
        raise InputError(f"no header at byte {offset}")
    place = offset + len(block)
    while chunk := file.read(2**20):
        if rest := chunk.lstrip(b"\0"):
            place += len(chunk) - len(rest)
            return place - place % tarfile.BLOCKSIZE
        place += len(chunk)
    return None
