"""Images and captions for training, in batches: of a list of sources, in a seeded order that resumes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.seeding import batch_indices, step_generator
from .compositing import Compositor, compose_plain, rgba_tensor
from .decoding import ImageError, memory_named, opened, read_image
from .images import to_tensor
from .resize import HUGE, THIN, cut_resized, resize
from .sources import ImageSource

_logger = logging.getLogger(__name__)
SPARE = 10  # pictures tried where none of a batch can be read


class TrainingBatch(NamedTuple):
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


def decode(picture: ImageSource, options: DecodeOptions, generator: torch.Generator) -> Tensor:
    """A picture as 3 x size x size in [-1, 1]: shorter side resized to the size, never squashed, then cut out.

    Raises:
        ImageError: it cannot be read.
    """
    size = options.size
    image = read_image(picture.source, min_side=1, name=picture.name)
    width, height = image.size
    new = (max(size, round(height * size / min(height, width))), max(size, round(width * size / min(height, width))))
    top, left = ((length - size) // 2 for length in new)
    if options.crop == "random":
        top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in new)
    with memory_named(picture.name):
        if height * width > HUGE or max(new) > THIN * size:
            image = cut_resized(image, new, top, left, (size, size)) * 2 - 1
        else:  # bit-equal in all versions: resumed runs depend on it
            image = resize(to_tensor(image) * 2 - 1, new, -1, 1)
            image = image[:, top : top + size, left : left + size]
    if options.flip and torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    return image


def decode_batch(
    pictures: Sequence[ImageSource], options: DecodeOptions, *seed: int, spare: Iterable[ImageSource] = ()
) -> TrainingBatch:
    """Decodes pictures; in the place of a broken one stands another of the batch, and `broken` names it.

    Args:
        seed: of the first picture's crop and mirror; the last of these numbers counts up from picture to picture.
        spare: tried one after the other where all of the batch are broken.

    Raises:
        ImageError: all are broken.
    """
    composed = _composed(pictures, options, *seed) if options.background == "random" else {}
    good, broken = [], []
    for number, picture in enumerate(itertools.chain(pictures, _unless(good, spare))):
        generator = step_generator(torch.device("cpu"), *seed[:-1], seed[-1] + number)
        try:
            image = composed[number] if number in composed else decode(picture, options, generator)
            good.append((image, picture))
        except ImageError as error:
            broken.append(str(error))
    if not good:
        raise ImageError(f"no picture of a batch can be read: {'; '.join(broken[:3])}")
    good = [good[number % len(good)] for number in range(len(pictures))]
    images, chosen = zip(*good)
    return TrainingBatch(torch.stack(images), [p.caption for p in chosen], [p.name for p in chosen], broken)


def _composed(pictures: Sequence[ImageSource], options: DecodeOptions, *seed: int) -> dict[int, Tensor]:
    """Place in the batch -> training image, of the transparent ones that can be read."""
    rgba = {}
    for number, picture in enumerate(pictures):
        if is_transparent(picture):
            with suppress(ImageError):  # told where it is decoded
                rgba[number] = read_rgba(picture, options.size)
    if not rgba:
        return {}
    images = Compositor()(torch.stack([*rgba.values()]), step_generator(torch.device("cpu"), *seed))
    return dict(zip(rgba, images))


def _unless(good: list, spare: Iterable[ImageSource]) -> Iterator[ImageSource]:
    """Spare pictures while none is good; not one is fetched where they are not needed."""
    spare = iter(spare)
    while not good and (picture := next(spare, None)) is not None:
        yield picture


class OrderedBatches(Dataset):
    """Training batches by their place in the run: item n is batch start + n of process `rank`.

    A batch depends on the seed and its place alone, so that a resumed run goes on where it stopped, whatever the
    number of workers; the batches of all processes together are those of one process with the joint batch size. Give
    it to a DataLoader with batch_size=None. Subclasses say what a `batch` is.

    Args:
        pictures: of `sources.list_training_sources`. seed.
        batch_size: of one process. batches: length of the run, of which `start` are done. rank, world: of the process.
    """

    def __init__(
        self,
        pictures: Sequence[ImageSource],
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

    def batch(self, pictures: Sequence[ImageSource], first: int):
        """What the model gets; `first` numbers the first picture among all draws of the run, for its random choices."""
        raise NotImplementedError


class FolderBatches(OrderedBatches):
    """Batches decoded from pictures. Args: options: how to decode them; others: see `OrderedBatches`."""

    def __init__(self, pictures: Sequence[ImageSource], options: DecodeOptions, *args, **kwargs):
        super().__init__(pictures, *args, **kwargs)
        self.options = options

    def batch(self, pictures: Sequence[ImageSource], first: int) -> TrainingBatch:
        following = (self.pictures[(first + number) % len(self.pictures)] for number in range(SPARE))
        return decode_batch(pictures, self.options, self.seed, 7, first, spare=following)


def is_transparent(picture: ImageSource) -> bool:
    """Whether an image has an alpha channel, from its header; False for what cannot be opened."""
    try:
        with opened(picture.source, picture.name, load=False) as image:
            return image.mode in ("RGBA", "LA") or "transparency" in image.info
    except ImageError:
        return False


def read_rgba(picture: ImageSource, size: int) -> Tensor:
    """A transparent image, uint8 4 x size x size; one that is not square is padded with transparent pixels.

    Raises:
        ImageError: it cannot be read.
    """
    with opened(picture.source, picture.name) as image:
        image = image.convert("RGBA")
    if image.width != image.height:
        if max(image.size) ** 2 > HUGE:  # a thin image, padded to a square, would not fit into memory
            image = image.resize([max(1, round(side * size / max(image.size))) for side in image.size])
        image = ImageOps.pad(image, [max(image.size)] * 2, color=(0, 0, 0, 0))
    return rgba_tensor(image, size)


def plain_images(pictures: Sequence[ImageSource], options: DecodeOptions) -> tuple[Tensor, list[ImageSource]]:
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
        except ImageError as error:
            _logger.warning(f"left out of validation: {error}")
    if not images:
        raise ImageError(f"none of the {len(pictures)} pictures for validation can be read, e.g. {pictures[0].name}")
    return torch.stack(images), kept
