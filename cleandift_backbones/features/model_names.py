"""What a model's name stands for, before any weights are loaded: its architecture, its size, its maps to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from ..checkpoints.hub import parse_source
from ..models.denoisers.unet import map_infos
from ..models.entrypoints import architecture_of
from ..models.last_map import checked_last_map, offered_maps
from .extractor import PIXELS, ModelError, list_maps

DEFAULT_SIDE = 224  # of models that do not say


class _Known(NamedTuple):
    """Of a model: its architecture, the side in pixels of its pictures, and the finest map of a shortened UNet."""

    architecture: str
    side: int
    held: str | None = None


@lru_cache(maxsize=256)
def _known(model: str) -> _Known:
    source, colon, place = model.partition(":")
    if not colon:
        config = None if model == PIXELS else timm.get_pretrained_cfg(model)
        return _Known(model, config.input_size[-1] if config and config.input_size else DEFAULT_SIDE)
    try:  # what the config.json says beside the weights, and their header where it says that they are truncated
        read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
        config, architecture, arguments = read(place)
    except Exception as error:
        raise ModelError(f"{model} cannot be built: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    side = (config.get("input_size") or [DEFAULT_SIDE])[-1]
    last = (arguments or {}).get("held")
    if last is not None:
        last = checked_last_map(last, parse_source(place), map_infos(architecture_of(architecture)["unet"]))
    return _Known(architecture, side, last)


def map_names(model: str) -> list[str]:
    """Names of the maps that a model and its weights have, fine to coarse. Raises ModelError if it does not exist."""
    names = [info["name"] for info in list_maps(model)]
    known = _known(model)
    return [name for name in names if known.held is None or name in offered_maps(known.architecture, known.held)[0]]


def is_noisy(model: str) -> bool:
    """Whether a model takes a timestep and noise. Raises ModelError for a folder or repository that is not there."""
    return _known(model).architecture.startswith("dift_")


def own_size(model: str) -> int:
    """The side in pixels that a model wants its pictures in."""
    return _known(model).side


def twin(model: str) -> str | None:
    """The noisy model with the same architecture, and tag, as a clean one, with its published weights, or None."""
    architecture = _known(model).architecture
    name = architecture.replace("cleandift_", "dift_", 1)
    if not architecture.startswith("cleandift_") or not timm.is_model(name):
        return None
    tagged = f"{name}.{model.partition('.')[2]}" if timm.is_model(model) else name
    return tagged if timm.is_model_pretrained(tagged) else name


def shown_maps(names: Sequence[str]) -> list[str]:
    """Up to three of a model's maps, coarse to fine where the paper's block outputs are among them."""
    if {"us3", "us6", "us9"} <= set(names):
        return ["us3", "us6", "us9"]
    return list(names[:: -max(1, len(names) // 3)][:3][::-1])


def matched_map(shown: Sequence[str]) -> str:
    """The map to match points on: us6, or the middle one."""
    return "us6" if "us6" in shown else shown[len(shown) // 2]
