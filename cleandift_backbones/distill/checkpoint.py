"""Checkpoints of a run: safetensors files of everything that a resumed run needs, with one form for all trainings.

A file holds `model/NAME`, `ema/NAME` and `optimizer/NAME/KEY`, and its header a JSON object under "state": the step,
the settings that a resumed run must agree in, and what else the run needs. Nothing is pickled.
"""

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
from ..utils.errors import FileError, InputError
from .recipe import changed_settings

_logger = logging.getLogger(__name__)


NAME = r"step_(\d{7,})\.safetensors"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping) -> bool:
    """Writes a checkpoint aside and renames it; another file of that name becomes NAME.other.

    Returns:
        False if the disk did not take it: what was there stays, and a warning says so.
    """
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        if path.is_file() and not is_checkpoint(path):
            _logger.warning(f"{path} is no checkpoint of this run; kept as {set_aside(path, 'other').name}")
        with replacing(path) as aside:
            write_file(cpu, aside, {"state": json.dumps(state)})
    except OSError as error:
        kept = "what was saved before stays"
        _logger.warning(f"no checkpoint of step {state['step']}: {error} ({kept}); the run goes on")
        return False
    return True


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, state) of a checkpoint, compared with the checksum that it was written with; None: no run wrote it.

    Raises:
        CheckpointError: damaged. FileError: it cannot be read at the moment.
    """
    with reading(path):
        verify(path)
        file = open_weights(path)
        if "state" not in (file.metadata() or {}):
            return None
        try:
            state = json.loads(file.metadata()["state"])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        # Copies: the file may be dropped while its tensors are in use.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, state  # noqa: SIM118


def is_checkpoint(path: Path) -> bool:
    """Whether a run wrote this file."""
    try:
        return "state" in (open_weights(path).metadata() or {})
    except CheckpointError:
        return False


def check_same_run(place: Path, before: Mapping, now: Mapping) -> None:
    """Raises InputError if settings of the run in `place` differ from those of the run that is to go on with it."""
    changed = changed_settings(before, now)
    if changed:
        listed = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
        raise InputError(f"{place} holds another run: {listed}. Give the same settings, or another folder")


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

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> bool:
        """Writes a checkpoint aside and renames it, then drops the oldest.

        Returns:
            False if the disk did not take it: the last good one stays, and a warning says so.
        """
        if not write_checkpoint(self.path(step), tensors, dict(state) | {"step": step}):
            return False
        try:
            ours = [other for other in self.steps() if other <= step and is_checkpoint(self.path(other))]
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
                if found := read_checkpoint(path):
                    return found
                _logger.warning(f"{path} is no checkpoint of a run, and is left as it is")
            except FileError:
                raise
            except CheckpointError as error:
                aside = set_aside(path).name
                _logger.warning(f"{path} is passed over for an older one, and kept as {aside}: {error}")
        return None
