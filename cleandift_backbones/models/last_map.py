"""The last map of weights whose UNet is truncated, and the maps up to it.

It is read from their tensors, whatever a config.json says of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checkpoints
from ..checkpoints import NATIVE_NAME, CheckpointError, TensorFile, Weights, choose_file, hub
from ..checkpoints.hub import HubError, HubFile
from ..checkpoints.remote import NoRanges, RemoteFile
from ..utils.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

    from .denoisers.base import Denoiser
    from .denoisers.maps import MapInfo
    from .pretrained import WeightSources


def last_map_of(names: Collection[str], infos: Sequence[MapInfo]) -> str | None:
    """The finest map that a UNet's tensors reach.

    Args:
        names: of tensors, native (`unet.*`).
        infos: all maps of the architecture in the order of execution, see `Architecture.denoiser`.

    Returns:
        the map's name, or None if not even the first is reached.
    """
    last = None
    for info in infos:
        if not any(name.startswith(f"unet.{info.module}.") for name in names):
            break
        last = info.name
    return last


def trained_last_map(weights: Weights, infos: Sequence[MapInfo]) -> str | None:
    """`last_map_of`, but not finer than the finest map of the training config in the weights' metadata.

    Early versions of tools/finetune.py filled what a student lacks behind its last map with the teacher's layers.
    """
    order = [info.name for info in infos]
    last = last_map_of(weights.names(), infos)
    try:
        maps = json.loads(weights.metadata["recipe"])["maps"]
        trained = [order.index(name) for name in maps]
    except (KeyError, ValueError, TypeError):  # none, text of somebody's, maps of another architecture
        trained = []
    if last is None or not trained:
        return last
    return order[min(order.index(last), max(trained))]


def open_headers(place: Path | HubFile, cache_dir: str | Path | None = None) -> Weights:
    """A file, a folder, or a native repository, opened by its headers: files are fetched from servers without ranges.

    Raises:
        HubError: unavailable, or no native repository. CheckpointError: see `checkpoints.open_checkpoint`.
    """
    if isinstance(place, Path):
        return checkpoints.open_checkpoint(place)

    def opened(file: HubFile) -> TensorFile:
        try:
            return RemoteFile(file)
        except NoRanges:
            return checkpoints.open_weights(hub.fetch(file, cache_dir))
        except HubError:
            path = hub.cached(file, cache_dir)
            if path is None:
                raise
            return checkpoints.open_weights(path)

    if place.path.endswith(".safetensors"):
        return checkpoints.open_files(place, [opened(place)])
    chosen = choose_file(hub.list_files(place, cache_dir), NATIVE_NAME)
    if chosen is None:
        raise HubError(f"{place} holds no {NATIVE_NAME}")
    names = [chosen[0]]
    if chosen[0].endswith(".json"):
        names = checkpoints.shard_names(hub.fetch(place.join(chosen[0]), cache_dir))
    return checkpoints.open_files(place, [opened(place.join(name)) for name in names])


def checked_last_map(
    claimed: str, place: Path | HubFile | Weights, infos: Sequence[MapInfo], cache_dir: str | Path | None = None
) -> str | None:
    """The last map of the weights at a place, of which a config says that it is `claimed`.

    Returns:
        their last map; None for the whole UNet; `claimed` if they cannot be opened: whoever loads them says why.
    """
    try:
        weights = place if isinstance(place, Weights) else open_headers(place, cache_dir)
        found = trained_last_map(weights, infos)
    except (HubError, FileNotFoundError, CheckpointError):
        return claimed
    return None if found == infos[-1].name else found or claimed


def settled_last_map(
    claimed: str,
    sources: WeightSources,
    pretrained_cfg: Mapping,
    infos: Sequence[MapInfo],
    cache_dir: str | Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> str | None:
    """`checked_last_map` of the weights that a model is made with; of published ones, and of none, what is claimed.

    Args:
        state: weights in memory, in the place of a file.
    """
    try:
        place = sources.main(pretrained_cfg) if state is None else checkpoints.open_state(state)
    except (StateError, FileNotFoundError, CheckpointError):
        return claimed
    if str(place) == sources.published.get("unet"):
        return claimed
    return checked_last_map(claimed, place, infos, cache_dir)


def check_reaches(weights: Weights, unet: Denoiser) -> None:
    """Raises CheckpointError for weights whose UNet ends at a coarser map than this one."""
    order = [info.name for info in unet.infos]
    last = last_map_of(weights.names(), unet.infos)
    if last is not None and order.index(last) < order.index(unet.last_map):
        raise CheckpointError(
            f"{weights.label} ({weights.form}) ends at map {last!r} and cannot give {unet.last_map!r}: choose from "
            f"{', '.join(order[: order.index(last) + 1])} (out_indices or final_map; maps in training), or take "
            "weights with the whole UNet"
        )
