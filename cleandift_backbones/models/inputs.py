"""What users give: arguments of create_model that other timm models take, maps by name or index, images."""

from __future__ import annotations

import operator
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import InputError, InputTypeError

#: arguments of timm's builder that mean something else for weights that it loads itself
_NOT_TAKEN = ("pretrained_filter_fn", "pretrained_strict", "kwargs_filter", "pruned")
#: decoders of segmentation_models_pytorch that run on the pyramids
SMP = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer")
CHECKED_CALLS = 2  # of each model; a look at the numbers makes the CPU wait for a GPU
_HOW = "(images / 255 - 0.5) / 0.5 from 0..255, (images - 0.5) / 0.5 from 0..1"
_warned = False


def map_index(names: Sequence[str], item: str | int) -> int | None:
    """Index of a map that is given by name or index (negative: from the end); None if there is no such map."""
    if isinstance(item, str):
        if item in names:
            return names.index(item)
    elif not isinstance(item, bool) and hasattr(item, "__index__"):
        index = operator.index(item)
        if -len(names) <= index < len(names):
            return index % len(names)
    return None


def number_in_range(name: str, value: Any, low: float = 0, high: float = 999) -> float | None:
    """An argument that is a number, also as a tensor or array of one; None stays.

    Raises:
        InputError: no number, or out of range.
    """
    if value is None:
        return None
    try:
        number = value if isinstance(value, int) else float("nan" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not low <= number <= high:
        raise InputError(f"{name} must lie in {low}..{high}, got {value!r}: give one number")
    return number


def reach(images: Tensor) -> tuple[float, float]:
    """Lowest and highest number of images; on a GPU this waits for it."""
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    return low, high


def range_problem(low: float, high: float) -> str | None:
    """What images that reach from `low` to `high` look like if they are not in [-1, 1]; None if nothing is certain.

    Images in [-1, 1] that no pixel of which is darker than middle grey exist (a white page); that the darkest of these
    is almost exactly middle grey is taken for a sign of 0..1. Noise and colour jitter may leave [-1, 1] by some units.
    """
    if high > 10:
        return "0..255"
    return "0..1" if 0 <= low < 0.02 and 0.5 < high <= 1 else None


def can_look(images: Tensor) -> bool:
    """Whether the numbers of images can be looked at: not while a graph is traced, exported or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return False
    if type(images) not in (Tensor, nn.Parameter) or images.is_meta or not images.numel():  # fake tensors, wrappers
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(images):
        return False
    return not (images.is_cuda and torch.cuda.is_current_stream_capturing())


def warn_of_range(images: Tensor) -> None:
    """Warns, once per process, of images that look as if they were not normalised; call it if `can_look`."""
    global _warned
    if _warned:
        return
    low, high = reach(images)
    problem = range_problem(low, high)
    if problem:
        _warned = True
        warnings.warn(
            f"the images reach from {low:.4g} to {high:.4g}, like images in {problem}, but this model expects them in "
            f"[-1, 1]: normalise them with mean 0.5 and std 0.5, {_HOW}",
            stacklevel=2,
        )


def refuse_unknown_ways(kwargs: dict[str, Any], infos: list[dict]) -> None:
    """Refuses what timm's other models take and these cannot honour."""
    for name in _NOT_TAKEN:
        if name in kwargs:
            raise InputTypeError(f"{name} is not taken: weights of these models are read, and checked, by this package")
    stride = kwargs.pop("output_stride", None)
    natural = max(info["reduction"] for info in infos)
    if stride not in (None, natural):
        raise InputTypeError(
            f"output_stride={stride} is not possible: this backbone has no dilation, its coarsest map has a stride of "
            f"{natural}. Decoders of segmentation_models_pytorch that fit, with a ..._pyramid: {', '.join(SMP)}; "
            "DeepLabV3, DeepLabV3Plus and PAN want dilation (PAN not with encoder_output_stride=32)"
        )


@contextmanager
def unknown_arguments(model: str) -> Iterator[None]:
    """Around the building of a model: an argument that it does not have is an InputTypeError that names it."""
    try:
        yield
    except TypeError as error:
        match = re.search(r"__init__\(\) got an unexpected keyword argument ('\w+')", str(error))
        if match is None or isinstance(error, InputTypeError):
            raise
        raise InputTypeError(
            f"{match[1]} is no argument of {model}: leave it out. help(timm.model_entrypoint({model!r})) lists those "
            "that there are"
        ) from error


def take_state(kwargs: dict[str, Any], pretrained: object = True) -> dict | None:
    """Takes the `state_dict` out of a timm pretrained config, which would keep and copy it.

    A repository of the user's replaces the file that comes with the package, which timm would prefer.

    Raises:
        InputError: a way to name weights that these models do not know; weights that pretrained=False leaves unused.
    """
    if isinstance(pretrained, (str, os.PathLike)):
        raise InputTypeError(
            f"pretrained={str(pretrained)!r} names no weights, it is True or False: give pretrained=True and "
            "pretrained_cfg_overlay=dict(file=PATH)"
        )
    state = None
    for name in ("pretrained_cfg", "pretrained_cfg_overlay"):
        cfg = kwargs.get(name)
        cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
        if not isinstance(cfg, dict):
            continue
        if cfg.get("custom_load"):
            raise InputError(
                "custom_load is not taken: give file=PATH of safetensors in a form that docs/weights.md lists"
            )
        if cfg.get("url") and cfg.get("source") not in ("hf-hub", "local-dir"):
            raise InputError(
                f"url={cfg['url']!r} is not fetched: download it and give file=PATH, or hf_hub_id= and hf_hub_filename="
            )
        state = cfg.get("state_dict") if cfg.get("state_dict") is not None else state
        kwargs[name] = {key: value for key, value in cfg.items() if key != "state_dict"}
        if name == "pretrained_cfg_overlay" and cfg.get("hf_hub_id"):
            kwargs[name].setdefault("file", None)
    if state is not None and not pretrained:
        raise InputError("a state_dict is given, but pretrained=False leaves it unused: pass pretrained=True")
    return state
