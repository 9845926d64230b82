"""Pictures of a data set before they are read: what every reader of a layout gives, and what the cache takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images import ENDINGS, ImageError, read_image

__all__ = ["ENDINGS", "DataError", "Item", "file_item", "read_lines", "require", "require_folder"]


class DataError(ValueError):
    """A data set that cannot be used; the message says what was expected, what was found, and what to do."""


@dataclass(frozen=True)
class Item:
    """A picture to be read.

    Attributes:
        name: unlike that of any other item of the data set; its path below the data set's folder.
        read: gives the picture, 8-bit RGB.
        stamp: changes when the picture does (size and time of its file).
        prompt: text for the models that take one; "" for none.
    """

    name: str
    read: Callable[[], Image.Image]
    stamp: str = ""
    prompt: str = ""


def file_item(path: Path, root: Path, prompt: str = "", size: tuple[int, int] | None = None) -> Item:
    """An item of a picture file; `size` is the (height, width) that its annotation says, checked when it is read."""

    def read() -> Image.Image:
        image = read_image(path, min_side=1)
        if size and (image.height, image.width) != size:
            found = f"{image.width}x{image.height} pixels, but its annotation says {size[1]}x{size[0]}"
            raise ImageError(f"{path}: {found}; use the data set's own files")
        return image

    facts = path.stat()
    return Item(path.relative_to(root).as_posix(), read, f"{facts.st_size} {facts.st_mtime_ns}", prompt)


def require(paths: Iterable[Path], what: str, layout: str) -> None:
    """Raises DataError if files are missing: names the first, and how many of how many."""
    paths = list(dict.fromkeys(paths))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} {what} are missing, first {missing[0]}; expected {layout}")


def require_folder(root: str | os.PathLike, parts: Sequence[str], layout: str) -> Path:
    """The folder as a Path; DataError, which tells what is there instead, unless it holds all parts."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected {layout}")
    lacking = [part for part in parts if not (root / part).exists()]
    if lacking:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataError(f"{root} has no {' and no '.join(lacking)} (found {found}); expected {layout}")
    return root


def read_lines(path: Path, layout: str) -> list[str]:
    """The lines of a split file that are not empty; DataError if it is missing or has none."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.*"))[:8]) if path.parent.is_dir() else ""
        raise DataError(f"split file {path} is missing (found {there or 'nothing'} there); expected {layout}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"split file {path} is empty; expected {layout}")
    return lines
