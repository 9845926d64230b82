"""Images with their captions: of a folder, by its metadata files or side-cars; and what there is, in numbers."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..utils.atomic import is_folder
from ..utils.errors import InputError
from ..utils.records import decode_text, parse_json, read_bytes, read_records
from .decoding import endings
from .listing import Listing, counted, left_out_report, list_folder
from .shards import open_shard, read_member, scan, shards_of

_logger = logging.getLogger(__name__)
CAPTION_KEYS = ("caption", "text", "prompt")  # of a JSON side-car or a line of metadata, the first that is there
PEEK = 10_000  # files in shards that are looked at before a run
NOT_NAMED = "not in the metadata file"


class Picture(NamedTuple):
    """An image that is not decoded yet: its name for messages, a path or the file's bytes, its caption."""

    name: str
    source: Path | bytes
    caption: str


def caption_of_json(told: object) -> str:
    """The caption in a JSON side-car: its "caption" (img2dataset), "text" or "prompt"; a bare string is one itself.

    Raises:
        InputError: there is none that is a string.
    """
    if isinstance(told, str):
        return told.strip()
    found = next((told[key] for key in CAPTION_KEYS if told.get(key)), "") if isinstance(told, dict) else 0
    if not isinstance(found, str):
        raise InputError(f"a caption must be a string under caption, text or prompt, got {str(told)[:80]!r}")
    return found.strip()


def read_caption(name: str, data: bytes) -> str:
    """The caption in a side-car file .txt, .caption or .json, in a folder or in a shard.

    Raises:
        InputError: no UTF-8, no JSON, or no caption in it that is a string; `name` is in the message.
    """
    text = decode_text(name, data)
    if not name.lower().endswith(".json"):
        return text.strip()
    told = parse_json(name, text)
    try:
        return caption_of_json(told)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def list_pictures(
    folder: str | Path, without: str | Path | Iterable[str | Path] | None = None, left_out: Counter[str] | None = None
) -> list[Picture]:
    """The images of a folder with their captions.

    Every image below it (`listing.list_folder`), sorted, with the caption of its side-car: .txt, else .caption, else
    .json; without one the caption is "". Folders with a metadata file (Hugging Face's imagefolder: metadata.jsonl, .csv
    or .parquet with file_name, and text or caption) come after these, and hold just what it names, in its order.

    Args:
        without: folders that are not looked into, such as a run's own.
        left_out: counts files that are no images, see `listing.Listing`, and images that metadata leave out.

    Raises:
        InputError: no images there, a line of metadata without file_name, a caption that is no string.
    """
    folder, found = Path(folder), Listing()
    skip = [without] if isinstance(without, (str, os.PathLike)) else list(without or ())
    if is_folder(folder):
        found = list_folder(folder, without=skip)
    images, tables = [], {place: _read_metadata(files) for place, files in sorted(found.metadata.items())}
    named = {image.source for table in tables.values() for image in table}
    for path in found.images:
        if any(place in tables for place in path.parents):
            found.left_out[NOT_NAMED] += path not in named
            continue
        beside = found.captions.get(path)
        caption = read_caption(str(beside[0]), read_bytes(beside[0])) if beside else ""
        images.append(Picture(str(path), path, caption))
    images += [image for table in tables.values() for image in table]
    if left_out is not None:
        left_out.update(+found.left_out)
    if not images:
        suffixes, report = ", ".join(endings()), left_out_report(+found.left_out)
        raise InputError(f"no pictures in {folder}: give a folder of {suffixes} files, or .tar shards {report}".strip())
    return images


def read_shard(path: str, notes: list[str], chosen: Iterable[int] | None = None) -> Iterator[Picture]:
    """The images of a shard with their captions, in its order, as bytes; what cannot be read is reported in `notes`.

    Args:
        chosen: numbers of the samples to read, ascending; None: all.
    """
    shard = scan(path)
    if shard.damage:
        notes.append(shard.damage)
    try:
        with open_shard(path) as file:
            for sample in shard.samples if chosen is None else [shard.samples[number] for number in chosen]:
                name, data, caption = f"{path}:{sample.key}", b"", ""
                try:
                    data = read_member(file, sample.image)
                    if sample.captions:
                        beside = sample.captions[0]
                        caption = read_caption(f"{path}:{beside.name}", read_member(file, beside))
                except InputError as error:
                    notes.append(str(error))
                yield Picture(name, data, caption)
    except (OSError, EOFError) as error:
        notes.append(f"{path}: cannot be read ({error})")


def pictures_of(
    place: str | Path, most: int | None = None, without: str | Path | None = None, left_out: Counter[str] | None = None
) -> list[Picture]:
    """The images of a folder, or of shards (`shards.shards_of`), with their captions; those of shards in memory.

    Args:
        most: at most so many, evenly spread.
        without, left_out: see `list_pictures`; of folders.

    Raises:
        InputError: no images there, see also `list_pictures`.
    """
    shards = shards_of(place)
    if not shards:
        return spread(list_pictures(place, without, left_out), most)
    places = [(path, number) for path in shards for number in range(len(scan(path).samples))]
    by_shard: dict[str, list[int]] = {}
    for path, number in spread(places, most):
        by_shard.setdefault(path, []).append(number)
    notes: list[str] = []
    images = [image for path, numbers in by_shard.items() for image in read_shard(path, notes, numbers)]
    for note in dict.fromkeys(notes):
        _logger.warning(note)
    if not images:
        raise InputError(f"no pictures in {place}: the shards hold no images {'; '.join(notes[:3])}".strip())
    return images


def spread(items: list, most: int | None) -> list:
    """At most `most` of a list, evenly spread; all of it if that is None."""
    return items if most is None else items[:: max(1, len(items) // most)][:most]


def _read_metadata(files: list[Path]) -> list[Picture]:
    if len(files) > 1:
        raise InputError(f"{files[0].parent} has both {files[0].name} and {files[1].name}: keep one of them")
    (path,) = files
    images = []
    for number, line in read_records(path):
        name = line.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{path}: every line needs a file_name, a string; line {number} has none")
        try:
            source = path.parent / name
            images.append(Picture(str(source), source, caption_of_json(line)))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return images


@dataclass
class DataSummary:
    """What a run trains and validates on, in numbers.

    Attributes:
        images: to train on; None for shards, which are not counted.
        heldout: images for validation.
        captioned, looked_at: how many images have a caption that is not empty, of how many that were looked at: all
            of a folder's, the first ones of shards.
        shards: how many.
        left_out: count of files by suffix or reason, in what was looked at.
        damage: sentences about damaged shards, among those looked at.
    """

    images: int | None
    heldout: int
    captioned: int
    looked_at: int
    shards: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Sentences for people."""
        if self.shards:
            looked_at = f"the first {counted(self.looked_at, 'image')}"
            data = f"{counted(self.shards, 'shard')}, {self.captioned:,} of {looked_at} with captions"
        else:
            data = f"{counted(self.images, 'image')}, {self.captioned:,} with captions"
        left_out = left_out_report(self.left_out)
        line = f"data: {data}; {self.heldout:,} held out for validation"
        return [line, *filter(None, [left_out]), *self.damage]

    def warning(self, text: str) -> str:
        """A sentence if a run with this `text` (of the recipe) needs captions and finds none; or ""."""
        if text == "empty" or self.captioned or not self.looked_at:
            return ""
        seen = f"none of the first {counted(self.looked_at, 'image')} has" if self.shards else "no image has"
        return (
            f"text={text}, but {seen} a caption: prompts are empty. Captions are read from .txt, .caption or .json "
            "files beside the images, or from metadata.jsonl or metadata.csv; without any, give text=empty"
        )


def summarize(images: list[Picture], heldout: int, left_out: Counter[str]) -> DataSummary:
    """Of a folder."""
    return DataSummary(len(images), heldout, sum(bool(p.caption) for p in images), len(images), left_out=left_out)


def peek(shards: list[str], heldout: int, most: int = PEEK) -> DataSummary:
    """Of shards: the first ones, as many as hold `most` files. No image is read."""
    summary, files = DataSummary(None, heldout, 0, 0, len(shards)), 0
    for path in shards:
        if files >= most:
            break
        shard = scan(path, most - files)
        files += sum(1 + len(sample.captions) for sample in shard.samples) + shard.left_out.total()
        summary.looked_at += len(shard.samples)
        summary.left_out.update(shard.left_out)
        summary.damage += [shard.damage] if shard.damage else []
        with suppress(OSError, EOFError), open_shard(path) as file:  # reported in training
            for sample in shard.samples:
                with suppress(InputError):
                    beside = sample.captions[:1]
                    summary.captioned += any(read_caption(each.name, read_member(file, each)) for each in beside)
    return summary
