"""Images as tensors: preprocessing for models. `decoding` reads the files, `resize` changes their size.

An image tensor is RGB, 3 x H x W, uint8 in 0..255 or float32 in 0..1. Only two things hold normalised pixels: a model's
input, which `Extractor` makes on the device (`to_input` for one image), and the batches of training, in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..utils.atomic import exists, is_folder, is_text
from ..utils.errors import FileError, InputError
from .decoding import LARGE, MIN_SIDE, ImageError, read_image, to_rgb
from .resize import MODES, Size, cut_resized, is_large, size_of

__all__ = [
    "LARGE",
    "MIN_SIDE",
    "MODES",
    "ImageError",
    "check_folder",
    "cut_resized",
    "read_image",
    "stack_pixels",
    "to_input",
    "to_pixels",
    "to_tensor",
    "unit_range",
]


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


def to_pixels(
    image: Image.Image | np.ndarray | torch.Tensor,
    size: Size | None = None,
    mode: str = "squash",
    fill: Sequence[float] = (0.5, 0.5, 0.5),
) -> torch.Tensor:
    """An image at a size, 3 x height x width: uint8 as it is where nothing is resized, else float32 in 0..1.

    Both stand for the same pixels, see `unit_range`; models' own normalisation comes on their device.

    Args:
        image: what `to_tensor` takes.
        size: height and width; None with mode "keep".
        mode: see `to_input`.
        fill: colour that "pad" puts around an image, 0..1 per channel.

    Raises:
        ImageError: see `to_tensor`.
        InputError: an unknown mode.
    """
    if mode not in (*MODES, "keep"):
        raise InputError(f"mode {mode!r} is unknown; choose one of {', '.join((*MODES, 'keep'))}")
    same = mode == "keep" or (size is not None and _size(image) == tuple(size))
    if same and isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    pixels = image if is_large(image) else to_tensor(image)
    return pixels if same else MODES[mode](pixels, tuple(size), fill)


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as float32 in 0..1: of uint8 a 255th, the very numbers on every device; floats are in 0..1 already."""
    if pixels.dtype != torch.uint8:
        return pixels.float()
    return pixels.float() / torch.tensor(255.0, device=pixels.device)  # CUDA multiplies by a rounded 1/255 otherwise


def stack_pixels(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """A batch of one size: uint8 if all images are, else float32 in 0..1."""
    return torch.stack(images if all(x.dtype == torch.uint8 for x in images) else [unit_range(x) for x in images])


def to_input(
    image: Image.Image | np.ndarray | torch.Tensor,
    size: int | tuple[int, int] | None = None,
    mode: str = "squash",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> torch.Tensor:
    """An image as a model's input: float32, 3 x H x W, (pixel - mean) / std with pixels in 0..1.

    Args:
        image: what `to_tensor` takes.
        size: height and width of the result in pixels, or one number for a square. Unused, and may be None, with mode
            "keep".
        mode: "squash" resizes both sides regardless of aspect; "pad" fits the whole image in, centred, and fills the
            rest with `mean` (zeros after normalisation); "crop" covers the size and cuts the centre out; "keep" does
            not resize.
        mean: of each channel, 0..1.
        std: of each channel.

    Raises:
        ImageError: see `to_tensor`.
        InputError: an unknown mode, or a size that is missing or not positive.
    """
    if mode in MODES:
        size = (size, size) if isinstance(size, int) else (size or (0, 0))
        if min(size) < 1:
            raise InputError(f"size {size!r} must be one or two positive numbers of pixels with mode {mode!r}")
    pixels = unit_range(to_pixels(image, size, mode, mean))
    shift, scale = (torch.tensor(tuple(values), dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def _size(image: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, ...]:
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    return size_of(image)
