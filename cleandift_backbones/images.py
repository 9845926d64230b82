"""Pictures from disk, read the same way by every tool, and their way into a model.

`read_image` turns whatever Pillow can open (grey, palette, RGBA, 16-bit, float, CMYK, rotated by EXIF, animated) into
plain 8-bit RGB or says in one sentence why it cannot; `to_input` turns a picture into a normalised tensor.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .errors import FileError, InputError

MIN_SIDE = 64
LARGE = 2**20  # pixels; larger pictures are resized in strips
STRIP = 128  # rows
MODES = ("squash", "pad", "crop", "keep")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")  # of pictures in folders


class ImageError(InputError):
    """A picture that cannot be used; the message names the file and what to do about it."""


def find_pictures(
    root: str | os.PathLike,
    endings: Sequence[str] = ENDINGS,
    unreadable: Callable[[OSError], None] | None = None,
) -> list[Path]:
    """Paths of the picture files below a folder, at any depth, sorted. Nothing is opened.

    Links to folders are followed, but not into a folder that they lie in. Names that begin with a dot are left out:
    other systems leave such files behind.

    Args:
        unreadable: is told of folders that cannot be read, which are left out; None: the error is raised.

    Raises:
        OSError: no such folder, or one that cannot be read.
    """
    found: list[Path] = []
    waiting: list[tuple[str, frozenset[str]]] = [(os.fspath(root), frozenset())]
    while waiting:
        folder, above = waiting.pop()
        inside = above | {os.path.realpath(folder)}
        if inside == above:
            continue
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            if unreadable is None:
                raise
            unreadable(error)
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                waiting.append((entry.path, inside))
            elif os.path.splitext(entry.name)[1].lower() in endings and not entry.name.startswith("."):
                found.append(Path(entry.path))
    return sorted(found)


def read_image(
    path: str | os.PathLike | bytes,
    background: Sequence[int] = (255, 255, 255),
    min_side: int = MIN_SIDE,
    name: str | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """Reads a picture file, or the bytes of one, as an 8-bit RGB Pillow image.

    Transparency is composited on `background` (RGB, 0..255); 16-bit and 0..1 float pixels are scaled to 0..255; EXIF
    orientation is applied; the first frame of an animation is taken. `name` stands for bytes in messages. `formats`
    are those that may be read, as Pillow names them; None: all.

    Raises:
        ImageError: the file is missing, empty, no image, truncated, holds pixels that are not finite or out of range,
            or has a side shorter than `min_side` pixels.
    """
    if isinstance(path, bytes):
        file, size, path = io.BytesIO(path), len(path), Path(name or "image")
    else:
        file = path = Path(path)
        if not path.is_file():
            raise ImageError(
                f"{path}: {'a folder, not a picture file' if path.is_dir() else 'no such file'}; check the path"
            )
        size = path.stat().st_size
    if size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes); fetch or export it again")
    try:
        with Image.open(file, formats=formats) as opened:
            opened.seek(0)
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image that Pillow can read; give a PNG, JPEG, WebP, TIFF, GIF or BMP"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large to be safe ({error}); shrink it first") from None
    except MemoryError:
        raise ImageError(f"{path}: too large for this machine's memory; shrink it first") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it; change the file's permissions") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ... on damaged files
        raise ImageError(f"{path}: truncated or damaged ({error}); fetch or export it again") from None
    rgb = _to_rgb(image, path, background)
    if min(rgb.size) < min_side:
        raise ImageError(
            f"{path}: {rgb.width}x{rgb.height} pixels, but both sides must be at least {min_side}; give a larger one"
        )
    return rgb


def check_folder(path: str | os.PathLike) -> None:
    """Raises OSError unless a folder is at `path`, or can be made there, and can be written to. Makes nothing."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise FileError(f"{path}: {folder} is a file, not a folder; give another folder")
    if not os.access(folder, os.W_OK | os.X_OK) or str(folder).startswith(("/proc", "/sys")):
        raise FileError(f"{path}: nothing can be written to {folder}; give another folder")


def _to_rgb(image: Image.Image, path: Path, background: Sequence[int]) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # one channel of 16-bit or 32-bit integers, or of floats
        return Image.fromarray(_to_uint8(np.asarray(image), path)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise ImageError(f"{path}: colour mode {image.mode} cannot be turned into RGB; save it as an RGB PNG") from None


def _to_uint8(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Grey values of more than 8 bits as uint8: integers count as 16-bit, floats as 0..1 or, if larger, 0..255."""
    if not np.isfinite(pixels).all():
        raise ImageError(
            f"{path}: {int((~np.isfinite(pixels)).sum())} pixels are not finite (NaN or infinite); repair them"
        )
    low, high = float(pixels.min()), float(pixels.max())
    floating = np.issubdtype(pixels.dtype, np.floating)
    limit = 255 if floating else 65535
    if low < 0 or high > limit:
        raise ImageError(
            f"{path}: pixel values run from {low:g} to {high:g}; scale them to 0..{'1' if floating else limit}"
        )
    factor = (255 if high <= 1 else 1) if floating else 255 / 65535
    return np.rint(pixels.astype(np.float64) * factor).astype(np.uint8)


def to_tensor(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """A picture as a float32 tensor 3 x H x W in 0..1.

    Takes a Pillow image of any mode, a uint8 or float (0..1) array H x W x 3 or H x W, or a float (0..1) or uint8
    tensor 3 x H x W.

    Raises:
        ImageError: another shape, pixels that are not finite, or floats outside 0..1.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(_to_rgb(image, Path("image"), (255, 255, 255)))
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
    if pixels is None:
        pixels = _resize_large(image, new)
    elif new != (h, w):
        pixels = _resize(pixels, new).clamp(0, 1)
    pixels = (pixels - shift) / scale
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    if mode == "pad":
        return F.pad(pixels, (left, width - new[1] - left, top, height - new[0] - top))
    return pixels[:, -top : -top + height, -left : -left + width]


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def _resize_large(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """`_resize` of an RGB picture, in strips of rows and scaled to 0..1 at the end.

    torch resizes rows, then columns; so do the strips: the same numbers up to rounding (1e-6), without ever holding the
    whole picture as floats.
    """
    rows = torch.from_numpy(np.array(image)).split(STRIP)
    narrow = [_resize(strip.permute(2, 0, 1).float(), (len(strip), size[1])) for strip in rows]
    return (_resize(torch.cat(narrow, dim=1), size) / 255).clamp(0, 1)
