"""Decoding of image files, the same in every tool: formats, size limits, and errors that name the file.

All of Pillow is behind `opened`. `read_image` turns whatever it opens (grey, palette, RGBA, 16-bit, float, CMYK,
rotated by EXIF, animated) into plain 8-bit RGB or says in one sentence why it cannot.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from ..utils.errors import CleanDIFTError, InputError, is_out_of_memory

MIN_SIDE = 64
LARGE = 2**20  # pixels; larger images are handled in strips
# Plain images, as Pillow calls them: none of the formats that run another program. Files of the last ones begin with
# no clear mark, so the others are tried first. HEIF and JXL are there where a plugin of Pillow is.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "MPO", "BMP", "PPM", "QOI", "ICO", "HEIF", "JXL", "DIB",
    "TGA",
)  # fmt: skip
_CODECS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
_FIRST = (".jpg", ".jpeg", ".png", ".webp")  # of several images of one sample, in this order
_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that say which way up an image is


class ImageError(InputError):
    """An image that cannot be used; the message names the file and what to do about it."""


def formats() -> tuple[str, ...]:
    """Those of FORMATS that the Pillow of this machine decodes."""
    Image.init()
    return _known(len(Image.OPEN))  # plugins may come later


def endings() -> tuple[str, ...]:
    """Suffixes of image files, lower case with their dot: what every tool looks for. The commonest come first."""
    found = {suffix for suffix, name in Image.registered_extensions().items() if name in formats()}
    return (*(suffix for suffix in _FIRST if suffix in found), *sorted(found - set(_FIRST)))


@lru_cache(8)
def _known(_plugins: int) -> tuple[str, ...]:
    return tuple(n for n in FORMATS if n in Image.OPEN and (n not in _CODECS or features.check(_CODECS[n])))


@contextmanager
def opened(
    source: str | os.PathLike | bytes, name: str | None = None, load: bool = True, limit: int | None = None
) -> Iterator[Image.Image]:
    """An image file, or the bytes of one, opened by Pillow: its first image decoded, or the header alone.

    Whatever Pillow raises, here or in the block, becomes an ImageError with the file's name.

    Args:
        name: stands for bytes in messages.
        load: decode the pixels; otherwise the block must not.
        limit: of pixels, before any is decoded; None: that of Pillow, twice Image.MAX_IMAGE_PIXELS.

    Raises:
        ImageError: the file is missing, empty, no image, too large, or damaged.
    """
    if isinstance(source, bytes):
        path, file, size = name or "image", io.BytesIO(source), len(source)
    else:
        path, file = name or os.fspath(source), Path(source)
        try:
            about = file.stat()
        except (OSError, ValueError) as error:  # also of a name that is too long, or holds a zero byte
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            what = "no such file" if missing else f"cannot be opened ({getattr(error, 'strerror', error)})"
            raise ImageError(f"{path}: {what}; check the path") from None
        if not stat.S_ISREG(about.st_mode):
            what = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
            raise ImageError(f"{path}: {what}, not an image file; check the path")
        size = about.st_size
    if size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes); fetch or export it again")
    try:
        try:
            image = _open(file, path, load, limit)
        except ImageError:
            raise
        except ValueError:  # of a PNG whose texts are longer than Pillow takes
            if (plain := _without_texts(source)) is None:
                raise
            image = _open(plain, path, load, limit)
        with image:
            yield image
    except CleanDIFTError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(formats())
        raise ImageError(f"{path}: not an image in a supported format ({known}); save it as PNG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too large to be safe ({error}); shrink it first") from None
    except MemoryError:
        raise _too_large(path) from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it; change the file's permissions") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ValueError, ... on damaged files
        raise ImageError(f"{path}: truncated or damaged ({error}); fetch or export it again") from None


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name}: too large for this machine's memory; shrink it first")


@contextmanager
def memory_named(name: str) -> Iterator[None]:
    """A block that makes tensors of an image: where memory is out, ImageError with its name."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(name) from None


def _open(file: Path | io.BytesIO, path: str, load: bool, limit: int | None) -> Image.Image:
    image = Image.open(file, formats=formats())
    try:
        if limit is not None and image.width * image.height > limit:
            raise ImageError(
                f"{path}: too large: {image.width} x {image.height} pixels are more than the {limit / 1e6:.0f} million "
                "that are taken; shrink it first"
            )
        if load:
            image.seek(0)
            if image.format == "TIFF":
                _check_strips(image, path)
            image.load()
    except BaseException:
        image.close()
        raise
    return image


def _check_strips(image: Image.Image, path: str) -> None:
    """A damaged header may tell of a million rows where there is one strip: Pillow would give the rest as zeros."""
    held = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
    if held < image.width * image.height:
        declared = f"{image.width} x {image.height} pixels are declared, the file has {held} of them"
        raise ImageError(f"{path}: truncated or damaged ({declared}); fetch or export it again")


def _without_texts(source: str | os.PathLike | bytes) -> io.BytesIO | None:
    """A PNG without its texts, or None for another file. Pillow refuses texts of more than 1 MB decompressed, and its
    limits hold for the whole process."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in _PNG_TEXTS or data.startswith(_ORIENTATION, place + 8):
            kept.append(data[place:end])
        place = end
    return io.BytesIO(b"".join(kept))


def read_image(
    path: str | os.PathLike | bytes,
    background: Sequence[int] = (255, 255, 255),
    min_side: int = MIN_SIDE,
    name: str | None = None,
    limit: int | None = None,
) -> Image.Image:
    """Reads an image file, or the bytes of one, as an 8-bit RGB Pillow image.

    Transparency is composited on `background` (RGB, 0..255); 16-bit and 0..1 float pixels are scaled to 0..255; EXIF
    orientation is applied; the first frame of an animation is taken. `name` and `limit`: see `opened`.

    Raises:
        ImageError: the file is missing, empty, no image, truncated, too large, holds pixels that are not finite or out
            of range, or has a side shorter than `min_side` pixels.
    """
    label = name or ("image" if isinstance(path, bytes) else os.fspath(path))
    with opened(path, name, limit=limit) as image:
        ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(image, label, background)
    if min(rgb.size) < min_side:
        raise ImageError(
            f"{label}: {rgb.width}x{rgb.height} pixels, but both sides must be at least {min_side}; give a larger one"
        )
    return rgb


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header. Raises ImageError for what is no image."""
    with opened(path, load=False) as image:
        if image.format != "PNG":
            return _upright_size(image)
    with opened(path) as image:  # in a PNG the orientation may stand behind the pixels
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # read_image turns these upright
    return image.size if sideways else image.size[::-1]


def to_rgb(image: Image.Image, path: str = "image", background: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """A Pillow image of any mode as 8-bit RGB, see `read_image`; `path` names it in messages."""
    if image.mode.startswith(("I", "F")):  # one channel of 16-bit or 32-bit integers, or of floats
        return Image.fromarray(_to_uint8(np.asarray(image), path)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on(image, background)
    if image.mode == "RGB" and image.width * image.height > 16 * LARGE:  # half a gigabyte, perhaps: not once more
        return image
    try:
        return image.convert("RGB")
    except ValueError:
        raise ImageError(f"{path}: colour mode {image.mode} cannot be turned into RGB; save it as an RGB PNG") from None


def _on(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """A transparent image composited, in strips: the same, without three copies of a large one."""
    result = Image.new("RGB", image.size)
    rows = max(1, LARGE // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        canvas = Image.new("RGBA", strip.size, (*background, 255))
        result.paste(Image.alpha_composite(canvas, strip).convert("RGB"), (0, top))
    return result


def _to_uint8(pixels: np.ndarray, path: str) -> np.ndarray:
    """Grey values of more than 8 bits as uint8: integers count as 16-bit, floats as 0..1 or, if larger, 0..255."""
    floating = np.issubdtype(pixels.dtype, np.floating)
    if floating and (strange := pixels.size - int(np.isfinite(pixels).sum())):
        raise ImageError(f"{path}: {strange} pixels are not finite (NaN or infinite); repair them")
    low, high = float(pixels.min()), float(pixels.max())
    limit = 255 if floating else 65535
    if low < 0 or high > limit:
        raise ImageError(
            f"{path}: pixel values run from {low:g} to {high:g}; scale them to 0..{'1' if floating else limit}"
        )
    factor = (255 if high <= 1 else 1) if floating else 255 / 65535
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, LARGE // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        result[top : top + rows] = np.rint(pixels[top : top + rows].astype(np.float64) * factor)
    return result
