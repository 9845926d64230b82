"""The log of a run: JSON lines, one for each logged step."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from ..utils.atomic import set_aside, write_text


def read_log(path: Path) -> list[dict]:
    """The lines of a `JsonLog`; one that was cut off (full disk, power cut) is left out."""
    return [json.loads(line) for line in _log_lines(path) if _step_of(line) < math.inf]


def _log_lines(path: Path) -> list[str]:
    """Lines with their ends, of a file that may be damaged anywhere."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines(True)


def _step_of(line: str) -> float:
    """The step of a line of the log; of one that was cut off (full disk, power cut) infinity: it is dropped."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


class JsonLog:
    """A JSON-lines file. Opened at step `start`, it forgets later lines: those of work that a resumed run redoes.

    A file of that name without any line of such a log becomes NAME.other.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = path.read_text(errors="replace").splitlines(True) if path.is_file() else []
        if lines and all(_step_of(line) == math.inf for line in lines):
            print(f"{path} was not written by a run: kept as {set_aside(path, 'other').name}", file=sys.stderr)
        write_text(path, "".join(line for line in lines if start and _step_of(line) <= start))

    def write(self, **values: float | int | str | list) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}  # JSON
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in plain.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(rounded) + "\n")
        except OSError as error:  # a full disk costs lines of the log, not the run
            print(f"no line in {self.path}: {error}", file=sys.stderr)
