"""Pictures to look at: samples, files, or bytes that somebody sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from ..data.decoding import ImageError, opened, read_image
from ..utils.errors import InputTypeError

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
BACKGROUND = (224, 224, 224)  # behind transparent pictures: white parts must stay visible
LARGEST = 1024  # pixels of the longer side: figures and models make no use of more
SMALLEST = 16  # pixels of the shorter side after that
UPLOAD = 2**27  # pixels of an upload: larger ones take gigabytes while they are decoded
WORKING = 256  # longer side at which points are matched: finer than any map


@dataclass(frozen=True)
class Picture:
    """A picture as models and figures get it.

    Attributes:
        name: for people, and for the lines of Python that make a result again.
        image: RGB, longer side at most LARGEST.
        note: what was done to the original, or "".
        key: hash of the pixels.
    """

    name: str
    image: Image.Image = field(repr=False, compare=False)
    note: str = ""
    key: str = ""

    @property
    def working_size(self) -> tuple[int, int]:
        """(height, width) in which points are matched."""
        scale = WORKING / max(self.image.size)
        return max(1, round(self.image.height * scale)), max(1, round(self.image.width * scale))

    def pixels(self, fractions: torch.Tensor) -> torch.Tensor:
        """Points P x 2, as fractions of width and height -> pixels at working size, whole numbers being centres."""
        height, width = self.working_size
        size = torch.tensor([width, height])
        return torch.minimum((fractions * size - 0.5).clamp_min(0), size - 1)

    def fractions(self, pixels: torch.Tensor) -> torch.Tensor:
        """The way back."""
        height, width = self.working_size
        return (pixels + 0.5) / torch.tensor([width, height])


@lru_cache(1)
def sample_names() -> tuple[str, ...]:
    """File names of the pictures that come with the package."""
    return tuple(sorted(path.name for path in SAMPLES.iterdir() if path.suffix in (".png", ".jpg")))


@lru_cache(64)
def open_sample(name: str) -> Picture:
    """A sample by its name, read once."""
    return open_picture(SAMPLES / name)


def open_picture(source: str | os.PathLike | bytes | Picture, name: str | None = None) -> Picture:
    """Reads a picture: a file, the bytes of one (called `name`), or a sample by its name.

    Raises:
        ImageError: not a picture that can be used; the message names it and says why.
    """
    if isinstance(source, Picture):
        return source
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.exists() and (SAMPLES / path.name).is_file() and path.parent == Path():
            path = SAMPLES / path.name
        source, name = path, name or path.name
    image = read_image(source, BACKGROUND, name=name, limit=UPLOAD if isinstance(source, bytes) else None)
    note = _note(source, image, name)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    if min(image.size) < SMALLEST:
        raise ImageError(f"{name}: too long and narrow; cut a part out of it")
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=f"{image.size}".encode()).hexdigest()
    return Picture(name or "picture", image, note, digest)


def open_pictures(sources: Sequence[str | os.PathLike | bytes | Picture]) -> list[Picture]:
    """Reads pictures.

    Raises:
        ImageError: one that cannot be used, or none.
        InputTypeError: something else than a list of files or their bytes.
    """
    listed = isinstance(sources, Sequence) and not isinstance(sources, (str, bytes))
    wrong = [s for s in sources if not isinstance(s, (str, os.PathLike, bytes, Picture))] if listed else [sources]
    if wrong:
        raise InputTypeError(
            f"pictures must be a list of paths, or of the bytes of image files, not {type(wrong[0]).__name__}: save "
            "what is in memory as a PNG file first, and give one picture as a list of one"
        )
    if not len(sources):
        raise ImageError("no pictures to look at; give at least one")
    return [open_picture(source) for source in sources]


def _note(source: Path | bytes, image: Image.Image, name: str | None) -> str:
    notes = []
    if max(image.size) > LARGEST:
        scale = LARGEST / max(image.size)
        small = f"{round(image.width * scale)} x {round(image.height * scale)}"
        megapixels = image.width * image.height / 1e6
        notes.append(f"scaled down from {image.width} x {image.height} ({megapixels:.0f} megapixels) to {small}")
    # What comes after the first picture, which was read, may be damaged in any way.
    with suppress(ImageError), opened(source, name, load=False) as header:
        if getattr(header, "is_animated", False):
            moves = header.format in ("GIF", "PNG", "WEBP", "AVIF")
            notes.append("animated: its first frame" if moves else f"the first of its {header.n_frames} pictures")
    with suppress(ImageError), opened(source, name, load=False) as header:
        if header.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in header.info:
            with opened(source, name) as stored:
                alpha = stored.getchannel("A") if stored.mode == "RGBA" else stored.convert("RGBA").getchannel("A")
                notes += ["transparent: drawn on grey"] if alpha.getextrema()[0] < 255 else []
    return "; ".join(notes)
