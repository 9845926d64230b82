"""The timestep that a student learned: where it is stored, and what is used where it is not."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoints
from ..checkpoints import CheckpointError, Weights, hub, memo
from ..checkpoints.hub import HubError
from ..checkpoints.remote import RemoteFile

_logger = logging.getLogger(__name__)


def stored_timestep(weights: Weights) -> Tensor | None:
    """The timestep of a checkpoint, a float32 scalar: a tensor, or of a UNet in its metadata (`convert.to_diffusers`).

    Raises:
        CheckpointError: not a number in 0..999.
    """
    if "timestep" not in weights and "timestep" not in weights.metadata:
        return None
    stored = weights["timestep"].tolist() if "timestep" in weights else weights.metadata["timestep"]
    try:
        number = float(stored)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 999:
        raise CheckpointError(f"{weights.label} holds the timestep {stored!r}, which is not a number in 0..999")
    return torch.tensor(number, dtype=torch.float32, device="cpu")


def given_timestep(source: str | Path, cache_dir: str | Path | None = None) -> Tensor:
    """The timestep of a CompVis full checkpoint or another file that holds it; on the Hub it is read by ranges.

    Raises:
        CheckpointError: it holds none. HubError, FileNotFoundError: the file is unavailable.
    """
    place = hub.parse_source(source)
    if isinstance(place, Path):
        found = stored_timestep(checkpoints.open_checkpoint(place))
    else:
        try:
            found = memo.remember_of(
                "timestep", place, lambda: RemoteFile(place).get_tensor("timestep").float(), cache_dir
            )
        except KeyError:
            found = None
    if found is None:
        raise CheckpointError(f"{place} holds no timestep: give a file that does, or a number as timestep")
    return found


def learned_timestep(
    source: str | Path | None, start: float, weights: Weights | None = None, cache_dir: str | Path | None = None
) -> Tensor:
    """The learned timestep of weights, or of a CompVis full checkpoint or another file that holds it.

    On the Hub a few hundred kB of 3.9 GB are read, and it is kept beside the Hub's cache. If it is not found, a warning
    says so, and it is `start`, where the training of the timestep starts.
    """
    try:
        found = None if weights is None else stored_timestep(weights)
        if found is not None:
            return found
        if source is None:
            raise HubError("no source is known")
        return given_timestep(source, cache_dir)
    except (HubError, FileNotFoundError, CheckpointError) as error:
        _logger.warning(
            f"the learned timestep could not be read from {source} ({error}): {start:.0f}, at which its "
            "training started, is used. Features will differ a little; pass timestep=..., or "
            "sources=dict(timestep=PATH) with the full checkpoint"
        )
        return torch.tensor(start, dtype=torch.float32, device="cpu")
