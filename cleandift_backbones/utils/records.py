"""Text files and tables, read the same way everywhere: UTF-8, and lines that end where lines end."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .atomic import check_plain
from .errors import DependencyError, InputError, file_errors

TABLES = (".jsonl", ".csv", ".parquet")
JSON_NAMES = {dict: "object", list: "list"}


def read_text(path: str | os.PathLike) -> str:
    """A text file, UTF-8 with or without a byte order mark. Raises InputError or FileError, which name it."""
    return decode_text(path, read_bytes(path))


def decode_text(name: str | os.PathLike, data: bytes) -> str:
    """UTF-8 text with or without a byte order mark. Raises InputError with the name."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from None


def read_bytes(path: str | os.PathLike) -> bytes:
    """All of a file. Raises FileError, which names it, also for a named pipe, whose reading may wait forever."""
    with file_errors(path, "cannot be read", "check the path"):
        check_plain(path)
        return Path(path).read_bytes()


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """A JSON file that holds a value of this kind. Raises InputError or FileError, which name it."""
    found = parse_json(path, read_text(path))
    if not isinstance(found, kind):
        raise InputError(f"{path}: expected a JSON {JSON_NAMES[kind]}, got {str(found)[:80]}")
    return found


def parse_json(name: str | os.PathLike, text: str) -> Any:
    """The value of a JSON text. Raises InputError with the name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of more than 4,300 digits
        raise InputError(f"{name}: not a JSON file ({error})") from None


def split_lines(text: str) -> list[str]:
    """Lines end at \\n or \\r\\n, and nowhere else: str.splitlines also takes U+2028 and more, which texts may hold."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def split_words(line: str) -> list[str]:
    """Words between spaces and tabs, and nothing else: str.split also takes other spaces, which names may hold."""
    return [word for word in re.split(r"[ \t]+", line) if word]


def read_records(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """The lines of a table as dicts, with their numbers, from 1 on: JSON lines, CSV with a header, or Parquet.

    Raises:
        InputError: not a table of this format, or a line that is no object. FileError: it cannot be read.
        DependencyError: Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    text, number = read_text(path), 0
    try:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            for line in reader:
                number = reader.line_num
                yield number, line
            return
        for number, line in enumerate(split_lines(text), 1):
            if line.strip():
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise InputError(f"{path}, line {number}: expected an object, got {line[:80]}")
                yield number, found
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: no JSON ({error})") from None
    except (csv.Error, RecursionError) as error:
        raise InputError(f"{path}, behind line {number}: not a table ({error})") from None


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DependencyError(f"{path} needs pyarrow: pip install pyarrow, or write it as metadata.jsonl") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from None
