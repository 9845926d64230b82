"""Images with their captions, for training: of shards as they are read, in memory, and what there is, in numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import InputError
from .captions import read_caption
from .listing import counted, left_out_report
from .shards import open_shard, read_member, scan, shards_of
from .sources import ImageSource, list_training_sources

_logger = logging.getLogger(__name__)
PEEK = 10_000  # files in shards that are looked at before a run


def read_shard(path: str, notes: list[str], chosen: Iterable[int] | None = None) -> Iterator[ImageSource]:
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
                data, caption = b"", ""
                try:
                    data = read_member(file, sample.image)
                    if sample.captions:
                        beside = sample.captions[0]
                        caption = read_caption(f"{path}:{beside.name}", read_member(file, beside))
                except InputError as error:
                    notes.append(str(error))
                yield ImageSource(sample.key, path, caption=caption, data=data)
    except (OSError, EOFError) as error:
        notes.append(f"{path}: cannot be read ({error})")


def sources_of(
    place: str | Path, most: int | None = None, without: str | Path | None = None, left_out: Counter[str] | None = None
) -> list[ImageSource]:
    """The images of a folder, or of shards (`shards.shards_of`), with their captions; those of shards in memory.

    Args:
        most: at most so many, evenly spread.
        without, left_out: see `list_training_sources`; of folders.

    Raises:
        InputError: no images there, see also `list_training_sources`.
    """
    shards = shards_of(place)
    if not shards:
        return spread(list_training_sources(place, without, left_out), most)
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


def summarize(images: list[ImageSource], heldout: int, left_out: Counter[str]) -> DataSummary:
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
