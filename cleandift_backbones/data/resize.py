"""Resizing of image tensors: the one bicubic filter of this package, and what is made with it.

`stretch` changes both sides regardless of the aspect ratio, `pad` fits the whole image in, `center_crop` covers the
size and cuts its centre out. All are antialiased and keep the values' range. Memory is bounded for large and for thin
images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .decoding import LARGE

STRIP = 128  # rows
HUGE = 2**26  # pixels; larger images are resized in strips in training too
THIN = 16  # images whose resized side exceeds this many crop sides are cropped before they are resized
Size = tuple[int, int]  # height, width
Pixels = Image.Image | torch.Tensor  # 8-bit RGB, or 3 x H x W in 0..1


def resize(pixels: torch.Tensor, size: Size, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """3 x H x W, or B x 3 x H x W, of any range at another size: bicubic, antialiased, clamped to low..high.

    Pixels of that size already come back as they are.
    """
    return pixels if tuple(pixels.shape[-2:]) == tuple(size) else _filter(pixels, size).clamp(low, high)


def size_of(image: Pixels) -> Size:
    """(height, width)"""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])


def covering(size: Size, target: Size) -> Size:
    """The size, of the aspect ratio of `size`, that just covers `target`."""
    return _scaled(size, max(t / s for s, t in zip(size, target)))


def fitting(size: Size, target: Size) -> Size:
    """The size, of the aspect ratio of `size`, that just fits into `target`."""
    return _scaled(size, min(t / s for s, t in zip(size, target)))


def _scaled(size: Size, ratio: float) -> Size:
    return tuple(max(1, round(side * ratio)) for side in size)


def stretch(image: Pixels, size: Size, fill: Sequence[float] = ()) -> torch.Tensor:
    """3 x height x width in 0..1, regardless of the aspect ratio."""
    return resize_rows(image, size) if isinstance(image, Image.Image) else resize(image, size)


def pad(image: Pixels, size: Size, fill: Sequence[float] = (0.5, 0.5, 0.5)) -> torch.Tensor:
    """The whole image in the middle of 3 x height x width in 0..1; `fill` (0..1 per channel) around it."""
    pixels = stretch(image, new := fitting(size_of(image), size))
    if new == tuple(size):
        return pixels
    top, left = ((side - length) // 2 for side, length in zip(size, new))
    canvas = torch.tensor(tuple(fill), dtype=torch.float32).view(3, 1, 1).repeat(1, *size)
    canvas[:, top : top + new[0], left : left + new[1]] = pixels
    return canvas


def center_crop(image: Pixels, size: Size, fill: Sequence[float] = ()) -> torch.Tensor:
    """The centre of the image resized to just cover `size`: 3 x height x width in 0..1."""
    new = covering(size_of(image), size)
    top, left = (-((side - length) // 2) for length, side in zip(new, size))
    return cut_resized(image, new, top, left, size)


#: modes of `images.to_input` and of extraction; "keep" does not resize
MODES = {"squash": stretch, "pad": pad, "crop": center_crop}


def cut_resized(image: Pixels, size: Size, top: int, left: int, cut: Size) -> torch.Tensor:
    """A crop of a resized image: 3 x h x w in 0..1.

    Memory is bounded for any aspect ratio: if the resized image would be much longer than the crop (an image of
    2000 x 1 pixels), only the region that the crop needs is resized. The result equals the crop of the whole resized
    image to 1e-4, the rounding of torch's sampling positions.

    Args:
        image: RGB, or 3 x H x W in 0..1.
        size: height and width of the whole resized image.
        top: first row of the crop in the resized image.
        left: first column of the crop in the resized image.
        cut: height and width of the crop.
    """
    height, width = cut
    if max(size) > THIN * max(cut):
        return _cut_thin(image, size, top, left, cut)
    return stretch(image, size)[:, top : top + height, left : left + width]


def _cut_thin(image: Pixels, size: Size, top: int, left: int, cut: Size) -> torch.Tensor:
    (y, rows), (x, columns) = (_taps(*side) for side in zip(size_of(image), size, (top, left), cut))
    if isinstance(image, Image.Image):
        pixels = _floats(image.crop((x, y, x + columns.shape[1], y + rows.shape[1]))) / 255
    else:
        pixels = image[:, y : y + rows.shape[1], x : x + columns.shape[1]]
    return (rows @ (pixels @ columns.T)).clamp(0, 1)


def _taps(whole: int, size: int, start: int, count: int) -> tuple[int, torch.Tensor]:
    """Weights of `resize` along one side, from `whole` to `size` pixels, for outputs start..start+count.

    The filter is torch's antialiased bicubic one: Keys' cubic with a = -0.5, widened when downsampling.

    Returns:
        The first input pixel that is used, and weights, count x pixels.
    """
    step = whole / size
    reach = max(step, 1.0)
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * step
    low = (centres - 2 * reach + 0.5).long().clamp(min=0)
    high = (centres + 2 * reach + 0.5).long().clamp(max=whole)
    first = int(low.min())
    place = torch.arange(first, int(high.max()))
    x = ((place + 0.5 - centres[:, None]) / reach).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((place >= low[:, None]) & (place < high[:, None]))
    return first, (weights / weights.sum(1, keepdim=True)).float()


def _filter(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    batch = pixels if pixels.ndim == 4 else pixels[None]
    found = F.interpolate(batch, tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return found if pixels.ndim == 4 else found[0]


def _floats(image: Image.Image) -> torch.Tensor:
    """3 x H x W, float32, in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def is_large(image: object) -> bool:
    """Whether an image is one of Pillow's, RGB, that is handled in strips of rows."""
    return isinstance(image, Image.Image) and image.mode == "RGB" and image.width * image.height > LARGE


def resize_rows(image: Image.Image, size: Size) -> torch.Tensor:
    """`resize` of an RGB image of Pillow's, in strips of rows and scaled to 0..1 at the end.

    torch resizes rows, then columns; so do the strips: the same numbers up to rounding (1e-6), without ever holding the
    whole image as floats.
    """
    narrow = []
    for top in range(0, image.height, STRIP):  # cut by Pillow: NumPy would copy the whole image, twice
        strip = _floats(image.crop((0, top, image.width, min(top + STRIP, image.height))))
        narrow.append(_filter(strip, (strip.shape[1], size[1])))
    return (_filter(torch.cat(narrow, dim=1), size) / 255).clamp(0, 1)
