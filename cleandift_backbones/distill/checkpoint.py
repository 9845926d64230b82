"""Checkpoints of a run: safetensors files of everything that a resumed run needs, the newest few kept."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoints import CheckpointError, open_weights, verify
from ..checkpoints.save import write_file
from ..utils.atomic import leftovers, reading, replacing, set_aside
from ..utils.errors import FileError

_logger = logging.getLogger(__name__)


NAME = r"step_(\d{7,})\.safetensors"


class Checkpoints:
    """The folder of a run's checkpoints: `step_0000100.safetensors`, ...

    Files of others are neither loaded nor removed, whatever their names.

    Args:
        folder: created when the first one is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """The steps saved, newest first."""
        with reading(self.folder):
            found = [re.fullmatch(NAME, path.name) for path in self.folder.glob("step_*.safetensors")]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.safetensors"

    def _is_ours(self, path: Path) -> bool:
        try:
            return "state" in (open_weights(path).metadata() or {})
        except CheckpointError:
            return False

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> bool:
        """Writes a checkpoint aside and renames it, then drops the oldest.

        Returns:
            False if the disk did not take it: the last good one stays, and a warning says so.
        """
        path = self.path(step)
        cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            if path.is_file() and not self._is_ours(path):
                _logger.warning(f"{path} is no checkpoint of this run; kept as {set_aside(path, 'other').name}")
            with replacing(path) as aside:
                write_file(cpu, aside, {"state": json.dumps(state)})
        except OSError as error:
            last = f"the one of step {self.steps()[0]} stands" if self.steps() else "there is none yet"
            _logger.warning(f"no checkpoint of step {step}: {error} ({last}); the run goes on")
            return False
        try:
            ours = [other for other in self.steps() if other <= step and self._is_ours(self.path(other))]
            for old in [self.path(other) for other in ours[self.keep :]]:
                old.unlink()
            for part in leftovers(self.folder, NAME):  # of a process that was killed while it saved
                part.unlink()
        except OSError as error:
            _logger.warning(f"old checkpoints in {self.folder} stay: {error}")
        return True

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The newest whole checkpoint, as (tensors, state).

        Damaged ones are renamed to NAME.damaged, with a warning; files that no run wrote are left where they are.

        Raises:
            FileError: one cannot be read at the moment.
        """
        for step in self.steps():
            path = self.path(step)
            try:
                with reading(path):
                    verify(path)
                    file = open_weights(path)
                    if "state" not in (file.metadata() or {}):
                        _logger.warning(f"{path} is no checkpoint of a run, and is left as it is")
                        continue
                    state = json.loads(file.metadata()["state"])
                    # Copies: the file may be dropped while its tensors are in use.
                    return {name: file.get_tensor(name).clone() for name in file.keys()}, state  # noqa: SIM118
            except FileError:
                raise
            except (CheckpointError, ValueError) as error:
                aside = set_aside(path).name
                _logger.warning(f"{path} is passed over for an older one, and kept as {aside}: {error}")
        return None
