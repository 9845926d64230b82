"""What configs of mmsegmentation and mmdetection need to know, and what goes wrong in them. Imports neither of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

import torch

from .models.architectures import MODELS, model_names
from .utils.errors import DependencyError, InputError, StateError

if TYPE_CHECKING:
    from torch import nn

#: import name -> the maintained fork, and OpenMMLab's own packages of that name
PACKAGES = {
    "mmengine": ("onedl-mmengine", ("mmengine", "mmengine-lite")),
    "mmcv": ("onedl-mmcv", ("mmcv", "mmcv-lite", "mmcv-full")),
    "mmseg": ("onedl-mmsegmentation", ("mmsegmentation",)),
    "mmdet": ("onedl-mmdetection", ("mmdet",)),
}
_PIXELS = "mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True"


class MapTable(NamedTuple):
    """Maps that a backbone gives, in the order of its `out_indices`: lists of equal length."""

    names: list[str]
    indices: list[int]
    out_channels: list[int]
    strides: list[int]


def describe(model_name: str, out_indices: int | Sequence[int | str] | None = None) -> MapTable:
    """What a model gives, read off its architecture: nothing is built or loaded.

    Args:
        model_name: "cleandift_sd21", "dift_tiny", "cleandift_sd21_pyramid", ...
        out_indices: indices into feature_info (0 = us10, the finest, ... 10 = mid) or names ("us6"), in any order; an
            int n means the n coarsest; None the default: us9, us6, us3, mid, or all levels of a pyramid.

    Raises:
        ValueError: unknown model or map; index out of range.
    """
    from .models.feature_info import FeatureInfo

    if model_name.partition(".")[0] not in MODELS:
        raise InputError(
            f"unknown model_name {model_name!r}: it is one of {', '.join(model_names())}. Weights of yours, here or on "
            "the Hub, go to pretrained="
        )
    infos = FeatureInfo.of(model_name)
    taken = infos.take(infos.default() if out_indices is None else out_indices)
    return MapTable(
        [infos.names[i] for i in taken],
        list(taken),
        [infos[i]["num_chs"] for i in taken],
        [infos[i]["reduction"] for i in taken],
    )


# --- packages -----------------------------------------------------------------------------------------------------


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def check_packages() -> None:
    """Raises ImportError where mmengine is missing, or OpenMMLab's packages and their forks are mixed."""
    found = {name: [p for p in (fork, *own) if _installed(p)] for name, (fork, own) in PACKAGES.items()}
    for name, packages in found.items():
        if len(packages) > 1:
            raise DependencyError(
                f"{' and '.join(packages)} are both installed and overwrite each other's files ({name}/): "
                f"pip uninstall {' '.join(packages)}, then pip install {packages[0]}"
            )
    forks = [p for packages in found.values() for p in packages if p.startswith("onedl-")]
    originals = [p for packages in found.values() for p in packages if not p.startswith("onedl-")]
    if forks and originals:
        named = [PACKAGES[name][0] for name, packages in found.items() if set(packages) & set(originals)]
        raise DependencyError(
            f"{', '.join(forks)} (maintained forks) do not work with {', '.join(originals)} (OpenMMLab's own): "
            f"pip uninstall {' '.join(originals)}, then pip install {' '.join(named)}"
        )
    if not found["mmengine"]:
        raise DependencyError('mmengine is not installed: pip install "cleandift_backbones[mmseg]"')


def check_launcher() -> None:
    """Raises StateError where `--launcher` is given on a machine without a GPU.

    mmengine sets a CUDA device for every process before anything else, also with the backend gloo, and would end in
    "Found no NVIDIA driver". Configs import this package before that.
    """
    line = [word for argument in sys.argv for word in argument.split("=", 1)]
    given = line[line.index("--launcher") + 1 :][:1] if "--launcher" in line else []
    if given and given != ["none"] and not torch.accelerator.is_available():
        raise StateError(
            f"--launcher {given[0]}: mmengine's launchers need a GPU for each process, and PyTorch finds none; leave "
            "out --launcher and start one process, without torchrun"
        )


# --- heads that do not fit ----------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Compares necks, heads and the preprocessor of a segmentor or detector with its CleanDIFT backbone.

    Wrong strides would train without an error, and badly; wrong channels fail late. Works on the meta device. What is
    not known here (other necks) is not judged.

    Raises:
        ValueError: naming the setting, its value, and the right one.
    """
    backbone = getattr(model, "backbone", None)
    if not hasattr(backbone, "out_channels") or not hasattr(backbone, "strides"):
        return
    _check_preprocessor(getattr(model, "data_preprocessor", None))
    channels, strides = list(backbone.out_channels), list(backbone.strides)
    neck = getattr(model, "neck", None)
    if neck is not None:
        given, (channels, strides) = channels, _after_neck(neck, strides)
        if channels is None:
            return
        _same("model.neck.in_channels", _listed(neck.in_channels), given, "backbone gives")
    for name, head in _heads(model):
        for attribute, found, wanted in _expectations(head, channels, strides):
            _same(f"{name}.{attribute}", found, wanted, "neck gives" if neck is not None else "backbone gives")


def _check_preprocessor(preprocessor: nn.Module | None) -> None:
    if preprocessor is None or not hasattr(preprocessor, "_enable_normalize"):
        return
    tensors = [getattr(preprocessor, name) for name in ("mean", "std") if hasattr(preprocessor, name)]
    if any(t.is_meta for t in tensors):  # it holds no numbers
        return
    values = [t.flatten().tolist() for t in tensors]
    if any(abs(v - 127.5) > 0.5 for value in values for v in value) or not values:
        raise InputError(
            f"model.data_preprocessor has mean and std {values or None}, but this backbone expects images in [-1, 1]: "
            f"data_preprocessor=dict({_PIXELS})"
        )
    if len(values[0]) == 3 and not getattr(preprocessor, "_channel_conversion", True):
        raise InputError(
            "model.data_preprocessor does not turn BGR, as pictures are read, into RGB, as this backbone expects: "
            f"data_preprocessor=dict({_PIXELS}). If your pipeline gives RGB, leave the hook out"
        )


def _listed(value) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def _same(setting: str, found: list[int], wanted: list[int], who: str) -> None:
    if found != wanted:
        raise InputError(f"{setting} is {found}, but the {who} {wanted}: write {wanted} there, or change out_indices")


def _after_neck(neck: nn.Module, strides: list[int]) -> tuple[list[int] | None, list[int] | None]:
    """Channels and strides of what an FPN gives; (None, None) for necks not known here."""
    if not all(hasattr(neck, name) for name in ("start_level", "backbone_end_level", "num_outs", "out_channels")):
        return None, None
    strides = strides[neck.start_level : neck.backbone_end_level]
    while len(strides) < neck.num_outs:
        strides.append(strides[-1] * 2)
    return [neck.out_channels] * neck.num_outs, strides


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in ("decode_head", "auxiliary_head", "rpn_head", "bbox_head"):  # a mask_head may take maps of its own
        head = getattr(model, name, None)
        if isinstance(head, Sequence) or type(head).__name__ == "ModuleList":
            yield from ((f"model.{name}[{i}]", part) for i, part in enumerate(head))
        elif head is not None:
            yield f"model.{name}", head
    roi_head = getattr(model, "roi_head", None)
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        extractor = getattr(roi_head, name, None)
        if extractor is not None:
            yield f"model.roi_head.{name}", extractor


def _expectations(
    head: nn.Module, channels: list[int], strides: list[int]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """(setting, its value, what it should be) for a head of mmsegmentation or mmdetection, by what it has."""
    if hasattr(head, "in_index"):  # mmsegmentation: levels are chosen by index
        index = _listed(head.in_index)
        if any(not -len(channels) <= i < len(channels) for i in index):
            raise InputError(f"in_index {index} of {type(head).__name__} is out of range: it gets {len(channels)} maps")
        wanted = [channels[i] for i in index]
        total = getattr(head, "input_transform", None) == "resize_concat"  # it keeps the sum only
        yield "in_channels", _listed(head.in_channels), [sum(wanted)] if total else wanted
        if hasattr(head, "feature_strides"):  # only their ratios matter
            own = [strides[i] for i in index]
            found = _listed(head.feature_strides)
            yield "feature_strides", [s * own[0] // found[0] for s in found], own
        return
    if hasattr(head, "featmap_strides"):  # a RoI extractor: it may leave coarse levels out
        found = _listed(head.featmap_strides)
        yield "featmap_strides", found, strides[: len(found)]
        yield "out_channels", _listed(head.out_channels), channels[:1]
        return
    if isinstance(getattr(head, "in_channels", None), int):
        yield "in_channels", [head.in_channels], channels[:1]
    generator = getattr(head, "prior_generator", None)
    if hasattr(generator, "strides"):
        yield "prior_generator.strides", [s[0] if isinstance(s, tuple) else s for s in generator.strides], strides
