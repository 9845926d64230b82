"""Nothing half-written: files and folders are written aside, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import file_errors

if TYPE_CHECKING:
    from PIL import Image


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path`, to be written as a file or filled as a folder; at the end it takes that place.

    If the block raises, what it wrote is removed, and `path` is as it was. Missing parent folders are created.

    Raises:
        FileError: the file system did not take it (full disk, no permission, a file in place of a folder).
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _swapped(path, aside):
            yield aside


@contextmanager
def _swapped(path: Path, aside: Path) -> Iterator[None]:
    try:
        yield
        if aside.is_dir() and path.exists():
            # A folder cannot be renamed over another: the old one steps aside for the moment.
            old = aside.with_suffix(".old")
            os.replace(path, old)
            try:
                os.replace(aside, path)
            except OSError:
                os.replace(old, path)
                raise
            _remove(old)
        else:
            os.replace(aside, path)
    finally:
        _remove(aside)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8), aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a picture as PNG, aside and renamed."""
    with replacing(path) as aside:
        image.save(aside, format="PNG", compress_level=5)
