"""Progress bars of every long task: tqdm's on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import tqdm as _tqdm

LOG_SECONDS = 30.0  # between two lines of one bar in a log


class tqdm(_tqdm.tqdm):
    """tqdm.tqdm, but where its file (stderr) is no terminal it prints whole lines, at most one every LOG_SECONDS.

    A terminal moves its cursor to draw nested bars over each other. A file keeps these escape codes, carriage returns
    and blank lines, and every state of the bar.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        file = kwargs.get("file") or sys.stderr
        self._plain = not (hasattr(file, "isatty") and file.isatty())
        self._printed, self._lines = time.monotonic(), 0
        if self._plain:
            kwargs["bar_format"] = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """See tqdm. In a log `msg` and `pos` mean nothing."""
        if not self._plain:
            return super().display(msg, pos)
        now = time.monotonic()
        if msg is None and self.n and now - self._printed >= LOG_SECONDS:
            self._printed = now
            self._line()
        return False

    def clear(self, nolock: bool = False) -> None:
        """See tqdm. A log keeps what it has."""
        if not self._plain:
            super().clear(nolock)

    def close(self) -> None:
        """See tqdm. In a log the last line of a bar that has others shows where it ended."""
        if self._plain:
            if self._lines and not self.disable:
                self._line()
            self.leave = False
        super().close()

    def _line(self) -> None:
        self._lines += 1
        self.fp.write(f"{self}\n")
        self.fp.flush()
