"""What a model's name stands for, before any weights are loaded: its architecture, its size, its maps to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from ..checkpoints.hub import parse_source
from ..models.architectures import Defaults, Kind, ModelSpec, find_spec, model_of
from ..models.feature_info import FeatureInfo
from ..models.last_map import checked_last_map
from .extractor import PIXELS, ModelError, list_maps

DEFAULT_SIDE = 224  # of models that do not say


class _Known(NamedTuple):
    """Of a model: its entry if it is one of this package, the side in pixels of its images, and the finest map of a
    truncated denoiser."""

    spec: ModelSpec | None
    side: int
    held: str | None = None


@lru_cache(maxsize=256)
def _known(model: str) -> _Known:
    source, colon, place = model.partition(":")
    if not colon:
        try:
            config = None if model == PIXELS else timm.get_pretrained_cfg(model)
        except RuntimeError as error:
            raise ModelError(f"{model}: {error}") from error
        return _Known(find_spec(model), config.input_size[-1] if config and config.input_size else DEFAULT_SIDE)
    try:  # what the config.json says beside the weights, and their header where it says that they are truncated
        read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
        config, architecture, arguments = read(place)
    except Exception as error:
        raise ModelError(f"{model} cannot be built: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    side = (config.get("input_size") or [DEFAULT_SIDE])[-1]
    spec, last = find_spec(architecture), (arguments or {}).get("held")
    if last is not None and spec is not None:
        last = checked_last_map(last, parse_source(place), spec.arch.denoiser.maps())
    return _Known(spec, side, last)


def model_spec(model: str) -> ModelSpec | None:
    """The entry of a model of this package, by its name, or a folder or repository of its weights; None of others.

    Raises:
        ModelError: a folder or repository that is unavailable.
    """
    return _known(model).spec


def defaults_of(model: str) -> Defaults | None:
    """Default maps and noise of a model of this package; None of others."""
    spec = model_spec(model)
    return spec.arch.defaults if spec else None


def map_names(model: str) -> list[str]:
    """Names of the maps that a model and its weights have, fine to coarse. Raises ModelError if it does not exist."""
    known = _known(model)
    if known.spec is None or known.held is None:
        return [info["name"] for info in list_maps(model)]
    infos = FeatureInfo.of(known.spec)
    return [infos.names[i] for i in infos.held(known.held)]


def is_noisy(model: str) -> bool:
    """Whether a model takes a timestep and noise. Raises ModelError for a folder or repository that is not there."""
    spec = model_spec(model)
    return spec is not None and spec.noisy


def own_size(model: str) -> int:
    """The side in pixels that a model wants its images in."""
    return _known(model).side


def twin(model: str, kind: Kind = "noisy") -> str | None:
    """The model of the other kind with the same architecture, and tag, with its published weights.

    Args:
        model: a clean model, or a noisy one.
        kind: of the model wanted; None is returned for a model of that kind, and for those of other packages.
    """
    spec = model_spec(model)
    name = model_of(spec.arch, kind) if spec and spec.kind != kind else None
    if name is None:
        return None
    tagged = f"{name}.{model.partition('.')[2]}" if timm.is_model(model) else name
    return tagged if timm.is_model_pretrained(tagged) else name


def shown_maps(model: str, names: Sequence[str]) -> list[str]:
    """Up to three of a model's maps, coarse to fine: the architecture's where these are among them."""
    defaults = defaults_of(model)
    if defaults and set(defaults.shown) <= set(names):
        return list(defaults.shown)
    return list(names[:: -max(1, len(names) // 3)][:3][::-1])


def default_map(model: str, names: Sequence[str] | None = None) -> str:
    """The map to take where none is named: the architecture's, or the middle one of those shown.

    Args:
        names: to choose from (default: those of the model).
    """
    names = map_names(model) if names is None else names
    defaults = defaults_of(model)
    if defaults and defaults.map in names:
        return defaults.map
    shown = shown_maps(model, names)
    return shown[len(shown) // 2]
