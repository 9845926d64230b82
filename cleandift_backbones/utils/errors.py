"""The errors of this package. Every mistake of a user ends in a CleanDIFTError of one sentence with the next step.

Each class is also a builtin one, so that `except ValueError` and the like go on working.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike

from safetensors import SafetensorError


class CleanDIFTError(Exception):
    """Base of all errors that this package raises on purpose. Commands print its message and exit with 2."""


class InputError(CleanDIFTError, ValueError):
    """A value that cannot be used: an argument, an option, the content of a file."""


class InputTypeError(CleanDIFTError, TypeError):
    """An argument of a type that cannot be used."""


class UnknownKeyError(CleanDIFTError, KeyError):
    """A name that does not exist; the message lists those that do."""

    __str__ = Exception.__str__  # KeyError's own shows the message in quotes


class StateError(CleanDIFTError, RuntimeError):
    """Something that this object or machine cannot do as it is."""


class MissingWeightsError(StateError):
    """Weights that are not on this machine and cannot be fetched.

    Args:
        message: the whole message for users of the Python API.
        name: of the model.
        reasons: "part: what is missing", of each missing part.
    """

    def __init__(self, message: str, name: str = "", reasons: Sequence[str] = ()):
        super().__init__(message)
        self.name, self.reasons = name, tuple(reasons)


class DivergedError(CleanDIFTError, FloatingPointError):
    """A training whose loss is not finite."""


class DependencyError(CleanDIFTError, ImportError):
    """A package that is not installed, or too old; the message says how to install it."""


class FileError(CleanDIFTError, OSError):
    """A file or folder that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that does not exist."""


class FileTakenError(FileError, FileExistsError):
    """Something else stands where a file or folder should be written."""


class FolderInUseError(FileError):
    """Another process works in the folder; the message names it."""


class OutOfMemoryError(CleanDIFTError, MemoryError):
    """The memory of this machine or of its GPU is used up; the message says what to lower."""


_NEXT_STEPS = {
    errno.ENOSPC: "free space, or choose another folder",
    errno.EDQUOT: "free space, or choose another folder",
    errno.EFBIG: "the file system takes no larger file, choose another folder",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EMFILE: "raise the limit (ulimit -n)",
}


@contextmanager
def file_errors(path: str | PathLike, failure: str = "", step: str = "") -> Iterator[None]:
    """Around reading or writing a file or folder: what the system or safetensors refuses becomes a FileError.

    Args:
        path: named in the message, unless the system names another file.
        failure: e.g. "cannot be read", between the name and the system's reason.
        step: what to do, for reasons that have no next step of their own.

    Raises:
        MissingFileError: it does not exist.
        FileTakenError: something else stands there.
        FileError: any other OSError; `errno` is kept.
    """
    try:
        yield
    except CleanDIFTError:
        raise
    except SafetensorError as error:  # a damaged file, or a disk that is full
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        kinds = {FileNotFoundError: MissingFileError, FileExistsError: FileTakenError}
        aside = str(error.filename or "").endswith(".part")  # of `files.replacing`, gone already
        named = path if aside or error.filename is None else error.filename
        reason, step = error.strerror or str(error), _NEXT_STEPS.get(error.errno, step)
        message = f"{named} {failure} ({reason})" if failure else f"{named}: {reason}"
        if isinstance(error, FileNotFoundError):
            message, step = f"{named} does not exist", ""
        raised = kinds.get(type(error), FileError)(message + (f"; {step}" if step else ""))
        raised.errno = error.errno
        raise raised from error


@contextmanager
def missing_weights(remedy: str) -> Iterator[None]:
    """Around loading weights in a command: the remedy of a MissingWeightsError becomes an option of that command.

    Args:
        remedy: what to give, a sentence.
    """
    try:
        yield
    except MissingWeightsError as error:
        message = f"{error.name} cannot be loaded, because of {'; '.join(error.reasons)}. {remedy}"
        raise MissingWeightsError(message, error.name, error.reasons) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, torch's for GPUs, or torch's RuntimeError of a CPU."""
    words = r"out of memory|allocate memory|not enough memory"
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and re.search(words, str(error), re.I) is not None)


@contextmanager
def resource_errors(remedy: str) -> Iterator[None]:
    """Around work with a model: memory that runs out, and errors in data workers, become errors of this package.

    Args:
        remedy: what to lower, e.g. "lower --batch-size".

    Raises:
        OutOfMemoryError: the memory of the machine, of its GPU or of its data workers is used up.
        CleanDIFTError: of a data worker, without the worker's traceback in its message.
    """
    try:
        yield
    except CleanDIFTError as error:
        name = type(error).__name__
        worker = re.match(rf"Caught {name} in DataLoader worker process .*\n\S*{name}: ", str(error), re.S)
        if worker is None:
            raise
        raise type(error)(str(error)[worker.end() :].strip()) from None
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if re.search(r"DataLoader worker .*(killed|exited)|shared memory|unable to write to file </torch", text):
            raise OutOfMemoryError(
                f"a process that reads images was killed, perhaps because memory ran out; {remedy}"
            ) from error
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"out of memory; {remedy}") from error
        raise


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of optional packages.

    Args:
        extra: the optional dependencies that they belong to, as in pyproject.toml.

    Raises:
        DependencyError: one of them is not installed, or does not fit.
    """
    try:
        yield
    except ImportError as error:
        raise DependencyError(f"{error}; run pip install 'cleandift_backbones[{extra}]'") from error
