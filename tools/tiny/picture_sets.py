"""What the small VAE and its teacher learn from: emoji and photographs, mixed in each batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cleandift_backbones.data.captioned import sources_of
from cleandift_backbones.data.compositing import Compositor, compose_plain
from cleandift_backbones.data.decoding import read_image
from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.utils.errors import InputError
from cleandift_backbones.utils.progress import tqdm
from cleandift_backbones.utils.seeding import batch_indices, step_generator
from tools.tiny.emoji_folder import load_pictures

__all__ = ["Photos", "PictureSets", "fit"]

LONGEST = 1.5  # longer side of a kept photograph, in shorter sides; of longer ones the middle is kept


class Photos:
    """Photographs in memory, cut out at random on any device.

    Each is resized to a shorter side of `size`. A training picture is, half of the time, the whole photograph stretched
    to a square, as evaluation takes it; otherwise a random square of `scale` of its shorter side. Half are mirrored.

    Args:
        pictures: what to read. size: side of the training pictures in pixels.
        scale: smallest and largest side of a cut, in shorter sides.

    Raises:
        ImageError: a picture cannot be read.
    """

    def __init__(self, pictures: Sequence[ImageSource], size: int, scale: tuple[float, float] = (0.5, 1.0)):
        self.size, self.scale = size, scale
        side = round(LONGEST * size)
        self.images = torch.zeros(len(pictures), 3, side, side, dtype=torch.uint8)  # in the top left corner
        self.sizes = torch.zeros(len(pictures), 2)  # height, width
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            read = pool.map(partial(_read_photo, size=size), pictures)
            for index, image in enumerate(tqdm(read, total=len(pictures), desc="reading photographs", unit="picture")):
                height, width = image.shape[1:]
                self.images[index, :, :height, :width] = image
                self.sizes[index] = torch.tensor([height, width])

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Photos:
        self.images, self.sizes = self.images.to(device), self.sizes.to(device)
        return self

    def cut(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Training pictures of the photographs `index` (B): float32 B x 3 x size x size in [-1, 1]."""
        device, sizes = self.images.device, self.sizes[index]
        whole, side, top, left, flip = torch.rand(5, len(index), 1, device=device, generator=generator)
        low, high = self.scale
        side = (low + (high - low) * side) * sizes.amin(1, keepdim=True)
        extent = torch.where(whole < 0.5, sizes, side)
        corner = torch.cat([top, left], 1) * (sizes - extent)
        return self._sample(index, corner, extent, flip[:, 0] < 0.5)

    def centers(self, index: Tensor) -> Tensor:
        """The squares in the middle, without any chance: float32 B x 3 x size x size in [-1, 1]."""
        sizes = self.sizes[index]
        extent = sizes.amin(1, keepdim=True).expand(-1, 2)
        return self._sample(index, ((sizes - extent) / 2).floor(), extent, torch.zeros_like(index, dtype=torch.bool))

    def _sample(self, index: Tensor, corner: Tensor, extent: Tensor, flip: Tensor) -> Tensor:
        """Boxes of corner (y, x) and extent (height, width) in pixels, both B x 2, by bilinear interpolation."""
        step = (torch.arange(self.size, device=corner.device) + 0.5) / self.size
        places = corner[:, :, None] + extent[:, :, None] * step  # B x 2 x size
        # Beyond the outermost pixels' centres lies the canvas, not the picture.
        places = places.clamp(0.5).minimum(self.sizes[index][:, :, None] - 0.5)
        places = places * (2 / self.images.shape[-1]) - 1
        y, x = places[:, 0], torch.where(flip[:, None], places[:, 1].flip(1), places[:, 1])
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
        images = self.images[index].float()
        return F.grid_sample(images, grid, align_corners=False).mul(2 / 255).sub(1)


def _read_photo(picture: ImageSource, size: int) -> Tensor:
    image = fit(read_image(picture.source, min_side=1, name=picture.name), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fit(image: Image.Image, size: int, longest: float = LONGEST) -> Image.Image:
    """An image with a shorter side of `size` and a longer one of at most `longest` times that, of which the middle is
    kept. One that is so already is returned itself."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    most = round(longest * size)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


class PictureSets:
    """Emoji and photographs, each with its training and its held-out half.

    Args:
        emoji: folder of tools/tiny/make_pictures.py or tools/tiny/pack_pictures.py with train/ and heldout/, or None.
        photos, photos_heldout: folders or shards of photographs with captions, or None.
        share: part of each batch that is photographs, where there are both.
        size: side of the pictures in pixels; None: that of the emoji, 128 without any.

    Attributes:
        entries, heldout_entries: (dict with text and style, "" of a photograph) of the pictures, emoji first.
        size: side of the training pictures in pixels.

    Raises:
        InputError: neither of the two, photographs without held-out ones, a strange share; see also `load_pictures`,
            `sources_of`.
    """

    def __init__(
        self,
        emoji: str | None,
        photos: str | None,
        photos_heldout: str | None,
        share: float = 0.75,
        size: int | None = None,
    ):
        if not emoji and not photos:
            raise InputError("nothing to learn from: give --data, --photos, or both")
        if bool(photos) != bool(photos_heldout):
            raise InputError("--photos and --photos-heldout belong together: give both")
        if not 0 < share < 1:
            raise InputError(f"--photo-share {share}: give a number between 0 and 1")
        self.rgba = self.heldout_rgba = self.photos = self.heldout_photos = None
        self.entries: list[dict] = []
        self.heldout_entries: list[dict] = []
        if emoji:
            self.rgba, self.entries = load_pictures(Path(emoji) / "train", size)
            self.heldout_rgba, self.heldout_entries = load_pictures(Path(emoji) / "heldout", size)
            size = self.rgba.shape[-1]
        self.size = size or 128
        self.share = share if emoji and photos else float(bool(photos))
        if photos:
            for name, place, entries in (
                ("photos", photos, self.entries),
                ("heldout_photos", photos_heldout, self.heldout_entries),
            ):
                pictures = sources_of(place)
                setattr(self, name, Photos(pictures, self.size))
                entries.extend(dict(text=picture.caption, style="") for picture in pictures)
        self.compositor = Compositor()
        self.render = self.compositor.render

    @property
    def shares(self) -> dict[str, float]:
        """Kind ("emoji", "photos") -> its part of each batch."""
        return {"emoji": 1 - self.share, "photos": self.share}

    @property
    def emoji_count(self) -> int:
        return 0 if self.rgba is None else len(self.rgba)

    def __len__(self) -> int:
        return len(self.entries)

    def to(self, device: torch.device) -> PictureSets:
        """Moves the training pictures to a device."""
        self.device = device
        if self.rgba is not None:
            self.rgba = self.rgba.to(device)
        if self.photos is not None:
            self.photos.to(device)
        return self

    def batch(self, step: int, count: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The training pictures of a step, float32 count x 3 x size x size in [-1, 1], and their places in `entries`.

        The number of photographs is the same in every step; `generator` lives on the device of the pictures. Autocast
        is off in here: in bf16 the places that a picture is sampled at are off by up to 0.7 pixels.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self._batch(step, count, seed, generator)

    def _batch(self, step: int, count: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        photos = round(count * self.share)
        photos = min(max(photos, 1), count - 1) if 0 < self.share < 1 and count > 1 else photos
        parts, places = [], []
        if count - photos:
            index = batch_indices(step, count - photos, len(self.rgba), seed).to(self.device)
            draws = self.compositor.draw(len(index), self.device, generator)
            parts.append(self.render(self.rgba[index], draws))
            places.append(index)
        if photos:
            index = batch_indices(step, photos, len(self.photos), seed + 1).to(self.device)
            parts.append(self.photos.cut(index, generator))
            places.append(index + self.emoji_count)
        return torch.cat(parts), torch.cat(places)

    def heldout(self, count: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Kind ("emoji", "photos") -> held-out pictures, and their places in `heldout_entries`; always the same.

        At most `count` of a kind, evenly spread. The first half of the emoji lies on plain white, the rest is composed
        as in training; photographs are cut out in the middle.
        """
        chosen = {}
        if self.heldout_rgba is not None:
            index = spread_places(len(self.heldout_rgba), count, seed)
            rgba = self.heldout_rgba[index].to(self.device)
            half = len(index) // 2
            composed = self.compositor(rgba[half:], step_generator(self.device, seed, 1, 2))
            chosen["emoji"] = torch.cat([compose_plain(rgba[:half]), composed]), index
        if self.heldout_photos is not None:
            index = spread_places(len(self.heldout_photos), count, seed)
            first = 0 if self.heldout_rgba is None else len(self.heldout_rgba)
            chosen["photos"] = self.heldout_photos.centers(index).to(self.device), index + first
        return chosen


def spread_places(total: int, count: int, seed: int) -> Tensor:
    """At most `count` of `total` places, evenly spread, in a seeded order."""
    chosen = torch.linspace(0, total - 1, min(count, total)).long()
    return chosen[batch_indices(0, len(chosen), len(chosen), seed)]
