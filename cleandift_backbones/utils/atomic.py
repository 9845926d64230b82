"""Nothing half-written, nothing lost: files and folders are written aside and renamed, damaged ones are kept aside."""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FileError, FileTakenError, InputError, file_errors

if TYPE_CHECKING:
    from PIL import Image
    from safetensors import safe_open


class DamagedFileError(InputError):
    """A file whose content cannot be what was written: cut, or no safetensors file."""


# --- reading ---


def open_tensors(path: str | Path, framework: str = "pt") -> safe_open:
    """Opens a safetensors file, and tells a damaged one from one that cannot be read at the moment.

    Raises:
        DamagedFileError: its content is damaged.
        MissingFileError: there is no such file.
        FileError: the system could not open it (too many open files, a lost disk): nothing is known of its content.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not is_text(str(path)):  # safetensors takes no such path; the file is sound
        raise FileError(f"{path}: the name holds bytes that are no UTF-8, which safetensors refuses; rename it")
    with reading(path):
        with open(path, "rb"):  # first: older safetensors report every failure to open as a missing file
            pass
        try:
            return safe_open(path, framework)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, SafetensorError) and "os error" not in reason:
                raise DamagedFileError(f"{path} is damaged ({reason})") from error
            raise OSError(reason) from error


def reading(path: str | Path) -> AbstractContextManager[None]:
    """`errors.file_errors` around reading: its messages say that nothing was changed."""
    return file_errors(path, "cannot be read", "nothing was changed: correct that and start again")


def exists(path: str | os.PathLike) -> bool:
    """`Path.exists`, but a path that the system refuses to look at (no permission, a name too long) is a FileError."""
    with reading(path):
        return Path(path).exists()


def is_file(path: str | os.PathLike) -> bool:
    """`Path.is_file`; FileError as in `exists`."""
    with reading(path):
        return Path(path).is_file()


def is_folder(path: str | os.PathLike) -> bool:
    """`Path.is_dir`; FileError as in `exists`."""
    with reading(path):
        return Path(path).is_dir()


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8. Names of files may hold any bytes; Python reads others as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_plain(path: str | os.PathLike) -> None:
    """Raises FileError for a named pipe, socket or device: reading it may wait forever. /dev/fd/N, which shells give
    for <(command), may be a pipe."""
    mode = os.stat(path).st_mode
    shells = os.fspath(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or shells):
        raise FileError(f"{os.fspath(path)} is a pipe, socket or device, no file; give a file")


def set_aside(path: str | Path, ending: str = "damaged") -> Path:
    """Renames a file to NAME.damaged, or NAME.damaged-2 and so on where that exists; returns the new path.

    That another process has done so meanwhile is no error.
    """
    path = Path(path)
    for number in count(1):
        target = path.with_name(f"{path.name}.{ending}{f'-{number}' if number > 1 else ''}")
        if not os.path.lexists(target):
            try:
                os.rename(path, target)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise FileError(f"{path} is {ending}, but cannot be renamed ({error}); move it away") from error
            return target


def readable_size(count: int) -> str:
    """A number of bytes as it is read: "640 bytes", "1.4 MB", "23 GB"."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 9.95 else f"{value:.1f} {unit}"


# --- writing ---


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path, name: str) -> Iterator[Path]:
    """What killed processes left of files that `replacing` was writing; `name`: a pattern of their names."""
    pattern = re.compile(rf"\.(?:{name})\.[0-9a-f]{{12}}\.part")
    return (path for path in folder.glob(".*.part") if pattern.fullmatch(path.name))


@contextmanager
def replacing(path: str | Path, written: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a path beside `path`, to be written as a file or filled as a folder; at the end it takes that place.

    If the block raises, what it wrote is removed, and `path` is as it was. Missing parent folders are created. Of a
    folder that stood at `path`, the files go that the new one has as well; all others are kept and move into it.

    Args:
        path: of the file or folder.
        written: whether a file of an earlier folder, by its path in it, was also written by the caller, and goes.

    Raises:
        FileTakenError: a file stands where a folder should be, or a folder where a file should be.
        FileError: the file system did not take it (full disk, no permission, a file in place of a folder).
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _swapped(path, aside, written):
            yield aside


@contextmanager
def _swapped(path: Path, aside: Path, written: Callable[[str], bool]) -> Iterator[None]:
    try:
        yield
        if path.exists() and path.is_dir() != aside.is_dir():
            raise FileTakenError(f"{path} is a {'folder' if path.is_dir() else 'file'}; choose another place")
        if path.exists() and aside.is_dir():
            # A folder cannot be renamed over another: the old one steps aside for the moment.
            old = aside.with_suffix(".old")
            os.replace(path, old)
            try:
                os.replace(aside, path)
            except OSError:
                os.replace(old, path)
                raise
            _keep_others(old, path, written)
        else:
            os.replace(aside, path)
    finally:
        _remove(aside)


def _keep_others(old: Path, new: Path, written: Callable[[str], bool]) -> None:
    """Moves what the new folder does not have out of the old one, and removes the rest, which was replaced."""
    if old.is_symlink():
        old.unlink()
        return
    for parent, folders, names in os.walk(old, topdown=False):
        place = Path(parent).relative_to(old)
        for name in [*names, *(name for name in folders if Path(parent, name).is_symlink())]:
            if os.path.lexists(new / place / name) or written((place / name).as_posix()):
                Path(parent, name).unlink()
            else:
                (new / place).mkdir(parents=True, exist_ok=True)
                os.rename(Path(parent, name), new / place / name)
        os.rmdir(parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8), aside and renamed. Names that are no UTF-8 are written as \\udcXX, as JSON has it."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a picture as PNG, aside and renamed."""
    with replacing(path) as aside:
        image.save(aside, format="PNG", compress_level=5)
