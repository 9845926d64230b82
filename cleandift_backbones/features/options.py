"""From a command line's options to a model: what the tools of extraction and evaluation have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import timm
import torch

from .extractor import PIXELS, Extractor, ModelError, check_model_name, load_extractor, map_indices
from .model_names import defaults_of, is_noisy

PIXELS_SIZE = (128, 128)  # of the pictures that "pixels" gets unless a size is given


def check_ranges(args: argparse.Namespace, ranges: Iterable[tuple[str, float, float | None]]) -> None:
    """Looks at numbers, and lists of them, before any long work.

    Args:
        ranges: (name in `args`, lowest, highest or None). Names that `args` does not have, and None, pass.

    Raises:
        ModelError: a number out of its range, an empty list; names the option.
    """
    for name, low, high in ranges:
        values = getattr(args, name, None)
        values = values if isinstance(values, list) else [values]
        flag = f"--{name.replace('_', '-')}"
        if not values:
            raise ModelError(f"{flag} is empty; give at least one number")
        for value in values:
            if value is not None and not low <= value <= (high or value):
                raise ModelError(f"{flag} {value} is out of range; give {low}{f'..{high}' if high else ' or more'}")


def map_items(texts: Iterable[str]) -> list[str | int]:
    """Maps as they are asked for, by name or index: "us6,mid", "us6 mid", and mixtures."""
    parts = (part.strip() for text in texts for part in text.split(","))
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts if part]


def pick_maps(model: str, infos: Sequence[dict], texts: Sequence[str], default: str) -> list[str]:
    """Names of the maps asked for, see `map_items`; if none is: the model's default map, or else `default`.

    Args:
        model: its name. infos: of `extractor.list_maps`. default: for models of other packages.

    Raises:
        ModelError: a map that the model does not have.
    """
    names = [info["name"] for info in infos]
    defaults = defaults_of(model)
    items = map_items(texts) or [defaults.map if defaults and defaults.map in names else default]
    return list(dict.fromkeys(names[i] for i in map_indices(infos, items)))


def check_noise(models: Sequence[str], **given: object) -> None:
    """Refuses a timestep, or a number of noises, where no model adds noise.

    Args:
        models: names as they are asked for, "random:..." included.
        given: values by the names of their options; None: not given.

    Raises:
        ModelError: one is given, and all models are clean; or a model does not exist.
    """
    flags = [f"--{name}" for name, value in given.items() if value is not None]
    bare = [model.removeprefix("random:") for model in models]
    if not flags:
        return
    for name in bare:
        check_model_name(name)
    if not any(map(is_noisy, bare)):
        raise ModelError(
            f"{' and '.join(flags)}: {', '.join(models)} adds no noise; leave it out, or take a dift_* model"
            + (" (--model-arg timestep=T sets a clean model's own timestep)" if flags == ["--timestep"] else "")
        )


def model_arguments(timestep: int | None = None, ensemble: int | None = None, weights: str | None = None) -> dict:
    """Those of them that are given, as keyword arguments of `timm.create_model`."""
    found = dict(timestep=timestep, ensemble_size=ensemble)
    found |= dict(pretrained_cfg_overlay=dict(file=weights) if weights else None)
    return {name: value for name, value in found.items() if value is not None}


def load_model(
    name: str,
    maps: Sequence[str],
    pretrained: bool,
    device: torch.device,
    size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    keep_size: bool = False,
    **create_kwargs,
) -> Extractor:
    """See `extractor.load_extractor`. Without `size` the pictures get the size of the model's own input.

    Args:
        seed: of random weights. keep_size: pictures stay as they come, where the model takes any size.
    """
    torch.manual_seed(seed)
    extractor = load_extractor(name, maps, pretrained, device, size, dtype, **create_kwargs)
    if extractor.size is None and not keep_size:
        own = PIXELS_SIZE if name == PIXELS else timm.data.resolve_model_data_config(extractor.model)["input_size"][1:]
        extractor.size = tuple(own)
    return extractor
