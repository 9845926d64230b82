"""The errors of this package. Every mistake of a user ends in a CleanDIFTError of one sentence with the next step.

Each class is also a builtin one, so that `except ValueError` and the like go on working.
"""

from __future__ import annotations


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
