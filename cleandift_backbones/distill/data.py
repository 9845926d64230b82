"""Pictures and captions for the distillation: a folder, or shards (see `shards`), in a seeded order that resumes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..images import ENDINGS, ImageError, find_pictures, read_image, to_tensor
from .compose import Compositor, compose_plain
from .trainer import batch_indices, step_generator

SPARE = 10  # pictures tried where none of a batch can be read


class Picture(NamedTuple):
    """A picture that is not decoded yet: its name for messages, a path or the file's bytes, its caption."""

    name: str
    source: Path | bytes
    caption: str


class Batch(NamedTuple):
    """images: B x 3 x size x size in [-1, 1]; captions; names; broken: what could not be read, with the reason."""

    images: Tensor
    captions: list[str]
    names: list[str]
    broken: list[str]


@dataclass(frozen=True)
class DecodeOptions:
    """size: side in pixels. crop: "center" or "random", after the shorter side is resized. flip: mirror half of them.
    background: "white", or "random" for a `Compositor` on transparent square pictures (placement, colours)."""

    size: int
    crop: str = "center"
    flip: bool = True
    background: str = "white"


def caption_of_json(told: object) -> str:
    """The caption in a JSON side-car: its "caption" (img2dataset), "text" or "prompt"; a bare string is one itself.

    Raises:
        ValueError: there is none that is a string.
    """
    if isinstance(told, str):
        return told.strip()
    found = (
        next((told[key] for key in ("caption", "text", "prompt") if told.get(key)), "") if isinstance(told, dict) else 0
    )
    if not isinstance(found, str):
        raise InputError(f"a caption must be a string under caption, text or prompt, got {str(told)[:80]!r}")
    return found.strip()


def list_pictures(folder: str | Path, without: str | Path | None = None) -> list[Picture]:
    """The pictures of a folder with their captions.

    By metadata.jsonl (Hugging Face imagefolder: file_name, and text or caption), else every picture below the folder,
    sorted (`images.find_pictures`), with the caption of its side-car .txt or .json; without one the caption is "". What
    lies below `without`, a run's own folder, is left out.

    Raises:
        ValueError: no pictures there, a line of metadata.jsonl without file_name, a caption that is no string.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    try:
        if table.is_file():
            where = table
            entries = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not all(isinstance(entry, dict) and isinstance(entry.get("file_name"), str) for entry in entries):
                raise InputError("every line needs a file_name, a string")
            found = [(folder / entry["file_name"], caption_of_json(entry)) for entry in entries]
        else:
            found = []
            own = Path(without).resolve() if without else None
            paths = find_pictures(folder) if folder.is_dir() else []
            for path in (p for p in paths if own is None or own not in p.resolve().parents):
                where, caption = path.with_suffix(".txt"), ""
                if where.is_file():
                    caption = where.read_text(encoding="utf-8").strip()
                elif (where := path.with_suffix(".json")).is_file():
                    caption = caption_of_json(json.loads(where.read_text(encoding="utf-8")))
                found.append((path, caption))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    if not found:
        raise InputError(
            f"no pictures in {folder}: give data.path a folder of {', '.join(ENDINGS)} files, or .tar shards"
        )
    return [Picture(str(path), path, caption) for path, caption in found]


def decode(picture: Picture, options: DecodeOptions, generator: torch.Generator) -> Tensor:
    """A picture as 3 x size x size in [-1, 1]: shorter side resized to the size, never squashed, then cut out.

    Raises:
        ImageError: it cannot be read.
    """
    size = options.size
    image = to_tensor(read_image(picture.source, min_side=1, name=picture.name)) * 2 - 1
    height, width = image.shape[-2:]
    new = (max(size, round(height * size / min(height, width))), max(size, round(width * size / min(height, width))))
    if new != (height, width):
        image = F.interpolate(image[None], new, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
    top, left = ((length - size) // 2 for length in new)
    if options.crop == "random":
        top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in new)
    image = image[:, top : top + size, left : left + size]
    if options.flip and torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    return image


def decode_batch(
    pictures: Sequence[Picture], options: DecodeOptions, *seed: int, spare: Iterable[Picture] = ()
) -> Batch:
    """Decodes pictures; in the place of a broken one stands another of the batch, and `broken` names it.

    Args:
        seed: of the first picture's crop and mirror; the last of these numbers counts up from picture to picture.
        spare: tried one after the other where all of the batch are broken.

    Raises:
        ImageError: all are broken.
    """
    if options.background == "random" and all(is_transparent(picture) for picture in pictures):
        with suppress(ImageError):  # a broken one is told below
            rgba = torch.stack([read_rgba(picture, options.size) for picture in pictures])
            images = Compositor()(rgba, step_generator(torch.device("cpu"), *seed))
            return Batch(images, [p.caption for p in pictures], [p.name for p in pictures], [])
    good, broken = [], []
    for number, picture in enumerate(itertools.chain(pictures, spare)):
        if number >= len(pictures) and good:
            break
        generator = step_generator(torch.device("cpu"), *seed[:-1], seed[-1] + number)
        try:
            good.append((decode(picture, options, generator), picture))
        except ImageError as error:
            broken.append(str(error))
    if not good:
        raise ImageError(f"no picture of a batch can be read: {'; '.join(broken[:3])}")
    good = [good[number % len(good)] for number in range(len(pictures))]
    images, chosen = zip(*good)
    return Batch(torch.stack(images), [p.caption for p in chosen], [p.name for p in chosen], broken)


class OrderedBatches(Dataset):
    """Training batches by their place in the run: item n is batch start + n of process `rank`.

    A batch depends on the seed and its place alone, so that a resumed run goes on where it stopped, whatever the
    number of workers; the batches of all processes together are those of one process with the joint batch size. Give
    it to a DataLoader with batch_size=None. Subclasses say what a `batch` is.

    Args:
        pictures: of `list_pictures`. seed.
        batch_size: of one process. batches: length of the run, of which `start` are done. rank, world: of the process.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        seed: int,
        batch_size: int,
        batches: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.pictures, self.seed, self.batch_size = pictures, seed, batch_size
        self.batches, self.start, self.rank, self.world = batches, start, rank, world

    def __len__(self) -> int:
        return self.batches - self.start

    def __getitem__(self, number: int):
        if not 0 <= number < len(self):
            raise IndexError(number)
        place, joint, mine = number + self.start, self.batch_size * self.world, self.rank * self.batch_size
        chosen = batch_indices(place, joint, len(self.pictures), self.seed)[mine:][: self.batch_size]
        return self.batch([self.pictures[i] for i in chosen.tolist()], place * joint + mine)

    def batch(self, pictures: Sequence[Picture], first: int):
        """What the model gets; `first` numbers the first picture among all draws of the run, for its random choices."""
        raise NotImplementedError


class FolderBatches(OrderedBatches):
    """Batches decoded from pictures. Args: options: how to decode them; others: see `OrderedBatches`."""

    def __init__(self, pictures: Sequence[Picture], options: DecodeOptions, *args, **kwargs):
        super().__init__(pictures, *args, **kwargs)
        self.options = options

    def batch(self, pictures: Sequence[Picture], first: int) -> Batch:
        following = (self.pictures[(first + number) % len(self.pictures)] for number in range(SPARE))
        return decode_batch(pictures, self.options, self.seed, 7, first, spare=following)


def is_transparent(picture: Picture) -> bool:
    if isinstance(picture.source, bytes):
        return False
    try:
        with Image.open(picture.source) as image:
            return image.mode in ("RGBA", "LA") or "transparency" in image.info
    except OSError:
        return False


def read_rgba(picture: Picture, size: int) -> Tensor:
    """A transparent square picture: uint8 4 x size x size."""
    try:
        with Image.open(picture.source) as image:
            image = image.convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{picture.name} is not a readable picture ({error}): replace or remove it") from None
    if image.width != image.height:  # transparent all around, not squashed
        image = ImageOps.pad(image, [max(image.size)] * 2, color=(0, 0, 0, 0))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain_images(pictures: Sequence[Picture], options: DecodeOptions) -> tuple[Tensor, list[Picture]]:
    """Pictures without any chance in them (validation): centre crops, transparent ones on white; broken ones left out.

    Raises:
        ImageError: none can be read.
    """
    plain = DecodeOptions(options.size, flip=False)
    images, kept = [], []
    for picture in pictures:
        try:
            if is_transparent(picture) and options.background == "random":
                images.append(compose_plain(read_rgba(picture, options.size)[None])[0])
            else:
                images.append(decode(picture, plain, torch.Generator()))
            kept.append(picture)
        except ImageError:
            continue
    if not images:
        raise ImageError(f"none of the {len(pictures)} pictures for validation can be read, e.g. {pictures[0].name}")
    return torch.stack(images), kept
