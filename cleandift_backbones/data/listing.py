"""Which files there are: one walk over folders, one rule for paths and patterns, and a count of what is left out.

Hidden files and folders (their names begin with a dot, or other systems leave them behind) are left out everywhere,
unless they are named themselves. What exists as a path is a path, whatever signs its name holds.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import DependencyError, FileError, InputError, MissingFileError, file_errors
from .decoding import endings

CAPTION_ENDINGS = (".txt", ".caption", ".json")  # of an image's side-car; the first that is there counts
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's imagefolder
_OTHER_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
HIDDEN, SPECIAL = "hidden", "pipes, sockets and devices"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its path, is left out."""
    return (name.startswith(".") and name not in (".", "..")) or name in _OTHER_SYSTEMS


def is_special(entry: os.DirEntry) -> bool:
    """Whether an entry is neither a file nor a folder, nor a link without an end: reading it may wait forever."""
    if entry.is_file(follow_symlinks=False):  # known without asking the disk
        return False
    return os.path.exists(entry.path) and not os.path.isfile(entry.path) and not os.path.isdir(entry.path)


def counted(number: int, what: str) -> str:
    """A number and what it counts: "1 file", "2,000 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def left_out_report(left_out: Counter[str], what: str = "file") -> str:
    """A count by suffix or reason in words, such as "left out: 3 files (.heic 2, hidden 1)"; "" for none."""
    parts = ", ".join(f"{name} {count:,}" for name, count in left_out.most_common())
    return f"left out: {counted(left_out.total(), what)} ({parts})" if left_out.total() else ""


def suffix_of(name: str) -> str:
    """Lower case, with its dot; for counts."""
    return os.path.splitext(name)[1].lower() or "no suffix"


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        images: sorted.
        captions: side-cars of an image, in the order of CAPTION_ENDINGS; images without any are not in it.
        metadata: metadata.* files by their folder, in the order of METADATA.
        left_out: count of other files by suffix, or as "hidden" (a hidden folder counts as one).
    """

    images: list[Path] = field(default_factory=list)
    captions: dict[Path, list[Path]] = field(default_factory=dict)
    metadata: dict[Path, list[Path]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def list_folder(
    root: str | os.PathLike,
    unreadable: Callable[[OSError], None] | None = None,
    without: Iterable[str | os.PathLike] = (),
) -> Listing:
    """The image files below a folder (see `decoding.endings`), at any depth. Nothing is opened.

    Links to folders are followed, but not into a folder that they lie in. Hidden files and folders are left out.

    Args:
        unreadable: called with the error of each folder that cannot be read, which is left out; None: it is raised.
        without: folders that are not looked into.

    Raises:
        FileError: no such folder, or one that cannot be read.
    """
    known, found = frozenset(endings()), Listing()
    without = tuple(os.path.join(os.path.realpath(path), "") for path in without)
    waiting: list[tuple[str, frozenset[str]]] = [(os.fspath(root), frozenset())]
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(folder)
        if real in above or os.path.join(real, "").startswith(without):
            continue
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            if unreadable is None:
                kind = MissingFileError if isinstance(error, FileNotFoundError) else FileError
                raise kind(f"{folder}: cannot be listed ({error.strerror}); check the path") from None
            unreadable(error)
            continue
        images: list[str] = []
        beside: dict[str, dict[str, str]] = {}  # stem -> suffix -> name of what may be a side-car
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if is_hidden(entry.name):
                found.left_out[HIDDEN] += 1
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                waiting.append((entry.path, above | {real}))
            elif is_special(entry):
                found.left_out[SPECIAL] += 1
            elif (suffix := suffix.lower()) in known:
                images.append(entry.name)
            elif entry.name in METADATA:
                found.metadata.setdefault(Path(folder), []).append(Path(entry.path))
            elif suffix in CAPTION_ENDINGS:
                beside.setdefault(stem, {})[suffix] = entry.name
            else:
                found.left_out[suffix_of(entry.name)] += 1
        stems = set()
        for name in images:
            found.images.append(path := Path(folder, name))
            stems.add(stem := os.path.splitext(name)[0])
            if stem in beside:
                found.captions[path] = [Path(folder, beside[stem][s]) for s in CAPTION_ENDINGS if s in beside[stem]]
        for stem in beside.keys() - stems:
            found.left_out.update(beside[stem].keys())
    found.images.sort()
    for paths in found.metadata.values():
        paths.sort(key=lambda path: METADATA.index(path.name))
    return found


def list_names(folder: str | os.PathLike, ending: str | tuple[str, ...]) -> list[str]:
    """Paths of the files right in a folder whose names end so, in any case, sorted; without hidden ones."""
    with file_errors(folder, "cannot be listed", "check the path"), os.scandir(folder) as entries:
        named = [e for e in entries if e.name.lower().endswith(ending) and not is_hidden(e.name)]
        return sorted(e.path for e in named if not is_special(e))


def expand(text: str | os.PathLike) -> list[str]:
    """The paths that a path or pattern stands for: `{0000..0009}`, `{a,b}`, `*`, `?`, `[...]`.

    What exists is meant itself, each part of the path on its own: in "photos [2024]/*.tar" the folder of that name
    where there is one. Results of `*` and its like are sorted; paths without such signs come back whether or not they
    exist.

    Raises:
        InputError: braces that do not close.
    """
    text = os.fspath(text)
    if os.path.lexists(text):
        return [text]
    parts = text.split(os.sep)
    for number in range(len(parts) - 1, 0, -1):
        if os.path.isdir(head := os.sep.join(parts[:number]) or os.sep):
            break
    else:
        number, head = 0, ""
    found = []
    for rest in _braces(os.sep.join(parts[number:]), text):
        bases = [head]
        for part in rest.split(os.sep):
            bases = [path for base in bases for path in _matches(base, part)]
        found += sorted(bases)
    return found


def _braces(rest: str, text: str) -> list[str]:
    if "{" not in rest:
        return [rest]
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise DependencyError("patterns with braces need webdataset: pip install webdataset") from error
    try:
        return list(braceexpand(rest))
    except UnbalancedBracesError:
        raise InputError(f"{text}: no such file, and its braces do not close") from None


def _matches(base: str, part: str) -> list[str]:
    path = os.path.join(base, part) if base else part
    if os.path.lexists(path) or not glob.has_magic(part):
        return [path]
    return glob.glob(os.path.join(glob.escape(base), part) if base else part)
