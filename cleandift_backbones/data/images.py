"""Images as tensors: preprocessing for models. `decoding` reads the files.

`to_input` turns an image into a normalised tensor; `cut_resized` resizes only the region that is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..utils.atomic import exists, is_folder, is_text
from ..utils.errors import FileError, InputError
from .decoding import LARGE, MIN_SIDE, ImageError, read_image, to_rgb

__all__ = [
    "LARGE",
    "MIN_SIDE",
    "MODES",
    "ImageError",
    "check_folder",
    "cut_resized",
    "read_image",
    "to_input",
    "to_tensor",
]

STRIP = 128  # rows
HUGE = 2**26  # pixels; larger images are resized in strips in training too
THIN = 16  # images whose resized side exceeds this many crop sides are cropped before they are resized
MODES = ("squash", "pad", "crop", "keep")


def check_folder(path: str | os.PathLike) -> None:
    """Raises OSError unless a folder is at `path`, or can be made there, and can be written to. Makes nothing."""
    if not is_text(os.fspath(path)):
        raise FileError(f"{path}: the name holds bytes that are no UTF-8, which safetensors refuses; give another")
    folder = Path(path).absolute()
    while not exists(folder):
        folder = folder.parent
    if not is_folder(folder):
        raise FileError(f"{path}: {folder} is a file, not a folder; give another folder")
    if not os.access(folder, os.W_OK | os.X_OK) or str(folder).startswith(("/proc", "/sys")):
        raise FileError(f"{path}: nothing can be written to {folder}; give another folder")


def to_tensor(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """A picture as a float32 tensor 3 x H x W in 0..1.

    Takes a Pillow image of any mode, a uint8 or float (0..1) array H x W x 3 or H x W, or a float (0..1) or uint8
    tensor 3 x H x W.

    Raises:
        ImageError: another shape, pixels that are not finite, or floats outside 0..1.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"an array of shape {image.shape} is no picture; give H x W x 3 (or H x W for grey)")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != 3:
        raise ImageError(f"a tensor of shape {tuple(image.shape)} is no picture; give 3 x H x W")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ImageError(f"pixels of type {image.dtype} are not understood; give uint8 (0..255) or floats (0..1)")
    if not torch.isfinite(image).all():
        raise ImageError(
            f"{int((~torch.isfinite(image)).sum())} pixel values are not finite (NaN or infinite); repair them"
        )
    if image.min() < 0 or image.max() > 1:
        raise ImageError(f"pixel values run from {image.min():g} to {image.max():g}; scale them to 0..1")
    return image.float()


def to_input(
    image: Image.Image | np.ndarray | torch.Tensor,
    size: int | tuple[int, int] | None = None,
    mode: str = "squash",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> torch.Tensor:
    """A picture as a model's input: float32, 3 x H x W, (pixel - mean) / std with pixels in 0..1.

    Args:
        image: what `to_tensor` takes.
        size: height and width of the result in pixels, or one number for a square. Unused, and may be None, with mode
            "keep".
        mode: "squash" resizes both sides regardless of aspect; "pad" fits the whole picture in, centred, and fills the
            rest with `mean` (zeros after normalisation); "crop" covers the size and cuts the centre out; "keep" does
            not resize.

    Raises:
        ImageError: see `to_tensor`.
        ValueError: an unknown mode, or a size that is missing or not positive.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    large = isinstance(image, Image.Image) and image.mode == "RGB" and image.width * image.height > LARGE
    pixels = None if large and mode != "keep" else to_tensor(image)
    shift, scale = (torch.tensor(tuple(values), dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    if mode == "keep":
        return (pixels - shift) / scale
    height, width = (size, size) if isinstance(size, int) else (size or (0, 0))
    if min(height, width) < 1:
        raise InputError(f"size {size!r} must be one or two positive numbers of pixels with mode {mode!r}")
    h, w = (image.height, image.width) if pixels is None else pixels.shape[-2:]
    if mode == "squash":
        new = (height, width)
    else:
        ratio = (min if mode == "pad" else max)(height / h, width / w)
        new = (max(1, round(h * ratio)), max(1, round(w * ratio)))
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    if mode == "crop":
        pixels = cut_resized(image if pixels is None else pixels, new, -top, -left, (height, width))
        return (pixels - shift) / scale
    if pixels is None:
        pixels = _resize_large(image, new)
    elif new != (h, w):
        pixels = _resize(pixels, new).clamp(0, 1)
    pixels = (pixels - shift) / scale
    return F.pad(pixels, (left, width - new[1] - left, top, height - new[0] - top)) if mode == "pad" else pixels


def cut_resized(
    image: Image.Image | torch.Tensor, size: tuple[int, int], top: int, left: int, cut: tuple[int, int]
) -> torch.Tensor:
    """A crop of a resized image: 3 x h x w in 0..1.

    Memory is bounded for any aspect ratio: if the resized image would be much longer than the crop (an image of
    2000 x 1 pixels), only the region that the crop needs is resized. The result equals the crop of the whole resized
    image to 1e-4, the rounding of torch's sampling positions.

    Args:
        image: RGB, or 3 x H x W in 0..1.
        size: height and width of the whole resized image.
        top, left: position of the crop in the resized image.
        cut: height and width of the crop.
    """
    height, width = cut
    if max(size) > THIN * max(cut):
        return _cut_thin(image, size, top, left, cut)
    if isinstance(image, Image.Image):
        pixels = _resize_large(image, size)
    else:
        pixels = image if tuple(size) == tuple(image.shape[-2:]) else _resize(image, size).clamp(0, 1)
    return pixels[:, top : top + height, left : left + width]


def _cut_thin(image, size, top: int, left: int, cut: tuple[int, int]) -> torch.Tensor:
    whole = (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])
    (y, rows), (x, columns) = (_taps(*side) for side in zip(whole, size, (top, left), cut))
    if isinstance(image, Image.Image):
        pixels = to_tensor(image.crop((x, y, x + columns.shape[1], y + rows.shape[1])))
    else:
        pixels = image[:, y : y + rows.shape[1], x : x + columns.shape[1]]
    return (rows @ (pixels @ columns.T)).clamp(0, 1)


def _taps(whole: int, size: int, start: int, count: int) -> tuple[int, torch.Tensor]:
    """Weights of `_resize` along one side, from `whole` to `size` pixels, for outputs start..start+count.

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


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def _resize_large(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """`_resize` of an RGB picture, in strips of rows and scaled to 0..1 at the end.

    torch resizes rows, then columns; so do the strips: the same numbers up to rounding (1e-6), without ever holding the
    whole picture as floats.
    """
    narrow = []
    for top in range(0, image.height, STRIP):  # cut by Pillow: NumPy would copy the whole picture, twice
        strip = np.array(image.crop((0, top, image.width, min(top + STRIP, image.height))))
        narrow.append(_resize(torch.from_numpy(strip).permute(2, 0, 1).float(), (len(strip), size[1])))
    return (_resize(torch.cat(narrow, dim=1), size) / 255).clamp(0, 1)
