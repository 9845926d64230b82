"""Checkpoints of a run: safetensors files of everything that a resumed run needs, the newest few kept."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoints import CheckpointError, open_weights, verify
from ..checkpoints.writing import write_file
from ..files import replacing

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder of a run's checkpoints: `step_0000100.safetensors`, ...

    Args:
        folder: created when the first one is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """The steps saved, newest first."""
        found = (re.fullmatch(r"step_(\d+)\.safetensors", path.name) for path in self.folder.glob("step_*.safetensors"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> bool:
        """Writes a checkpoint aside and renames it, then drops the oldest.

        Returns:
            False if the disk did not take it: the last good one stays, and a warning says so.
        """
        cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            with replacing(self.path(step)) as aside:
                write_file(cpu, aside, {"state": json.dumps(state)})
        except OSError as error:
            last = f"the one of step {self.steps()[0]} stands" if self.steps() else "there is none yet"
            _logger.warning(f"no checkpoint of step {step}: {error} ({last}); the run goes on")
            return False
        steps = self.steps()
        newer = [other for other in steps if other > step]  # damaged ones, which this run went back behind
        for old in newer + [other for other in steps if other <= step][self.keep :]:
            self.path(old).unlink()
        for part in self.folder.glob(".step_*.part"):  # of a process that was killed while it saved
            part.unlink()
        return True

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The newest whole checkpoint, as (tensors, state); damaged ones are passed over with a warning."""
        for step in self.steps():
            path = self.path(step)
            try:
                verify(path)
                file = open_weights(path)
                state = json.loads((file.metadata() or {})["state"])
                # Copies: the file may be dropped while its tensors are in use.
                return {name: file.get_tensor(name).clone() for name in file.keys()}, state  # noqa: SIM118
            except (CheckpointError, KeyError, ValueError) as error:
                _logger.warning(f"{path} is passed over for an older one: {error}")
        return None
