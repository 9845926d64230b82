"""A native folder for the Hub: timm's config.json and a model card beside the weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCardData

from .. import checkpoints
from ..models.architectures import spec_of
from ..models.feature_info import FeatureInfo
from ..models.last_map import last_map_of
from ..utils.errors import InputError, InputTypeError
from ..version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn


PLACEHOLDER = "USER/REPO"  # stands in a card for the repository, until it is pushed


#: arguments of a model that the backbone in mm/backbone.py takes too
_MM_ARGUMENTS = ("in_chans", "timestep", "ensemble_size", "noise_seed", "latent_encoder")


@dataclass
class CardInfo:
    """What a model card says beyond what the model itself tells.

    Attributes:
        license: of the weights, by the Hub's name ("mit", "openrail++"); default: that of the model's config.
        base_model: Hub name of the diffusion model behind it; default: by architecture.
        data: the training data, in words.
        recipe: the training recipe, as text or as a mapping of settings.
        results: measured numbers: {task: value}.
        notes: any Markdown.
    """

    license: str | None = None
    base_model: str | None = None
    data: str | None = None
    recipe: str | Mapping | None = None
    results: Mapping[str, float | str] = field(default_factory=dict)
    notes: str | None = None


def _unwrapped(model: nn.Module) -> nn.Module:
    """A model out of torch.compile's wrapper, (Distributed)DataParallel or timm's EMA."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, name, None), torch.nn.Module):
            return _unwrapped(inner)
    return model


def _backbone(model: nn.Module) -> nn.Module:
    """The CleanDIFT inside a features_only model, or the model itself; both without wrappers."""
    inner = getattr(model, "model", model)
    from ..models.cleandift import CleanDIFT

    if not isinstance(inner, CleanDIFT):
        raise InputTypeError(f"expected a model of this package made by timm.create_model, got {type(model).__name__}")
    return inner


def timm_config(model: nn.Module, names: Collection[str] | None = None) -> dict:
    """timm's `config.json` for a model's weights: architecture, arguments to build it again, preprocessing.

    Unlike timm's own writer (1.0.31) it does not repeat `num_classes` among the arguments, on which transformers'
    TimmWrapper breaks. A features_only model leaves `final_map` out: whoever loads it chooses maps.

    Args:
        model: of this package, also on the meta device.
        names: native names of the tensors to be written, whose last map is `held` (default: the model's own).
    """
    inner = _backbone(model)
    # What belongs to the published weights; a card says what other weights were trained on.
    sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture", "custom_load",
               "description")  # fmt: skip
    nulls = ("pool_size", "first_conv", "classifier")  # timm keeps these even where they are None
    cfg = {k: v for k, v in inner.pretrained_cfg.items() if k not in sources and (v is not None or k in nulls)}
    arguments = {}
    last = last_map_of(inner.state_dict() if names is None else names, inner.denoiser.infos)
    if last != inner.denoiser.infos[-1].name:
        arguments["held"] = last
    if inner is model:
        if model.denoiser.last_map != model.arch.defaults.final_map:
            arguments["final_map"] = model.denoiser.last_map
        if model.head.global_pool.pool_type != "avg":
            arguments["global_pool"] = model.head.global_pool.pool_type
    if inner.in_chans != 3:
        arguments["in_chans"] = inner.in_chans
        cfg["input_size"] = (inner.in_chans, *cfg["input_size"][1:])
    if inner.vae.kind != "default":
        arguments["latent_encoder"] = inner.vae.kind
    if spec_of(inner.pretrained_cfg["architecture"]).noisy:
        arguments |= dict(ensemble_size=inner.ensemble_size, noise_seed=inner.noise_seed, timestep=int(inner.timestep))
    return {
        "architecture": inner.pretrained_cfg["architecture"],
        "num_classes": inner.num_classes,
        "num_features": inner.num_features,
        "model_args": arguments,
        "pretrained_cfg": {**cfg, "num_classes": inner.num_classes},
    }


def map_phrases(config: Mapping) -> tuple[str, str, str]:
    """What a card says of the maps, in its summary, in timm's lines and in torch.hub's."""
    infos, held = FeatureInfo.of(config["architecture"]), config["model_args"].get("held")
    offered, default = ([infos.names[i] for i in chosen] for chosen in (infos.held(held), infos.default(held)))
    arguments = "".join(f", {k}={v!r}" for k, v in config["model_args"].items())
    return (
        f"fine to coarse {', '.join(offered)}.",
        f"maps = model(images)  # {', '.join(default)}",
        f"features_only=True{arguments},",
    )


def model_card(config: Mapping, info: CardInfo | None = None) -> str:
    """README.md of a repository: what it is, how to load it (timm, torch.hub, mmsegmentation), where it comes from.

    Args:
        config: of `timm_config`.
        info: what else is known.
    """
    info = info or CardInfo()
    name = config["architecture"]
    spec = spec_of(name)
    behind = spec.arch.published.get("noisy", ()) if spec.arch.base_model else ()
    own = config["pretrained_cfg"].get("license")
    license_ = info.license or next((one.license for one in behind), own)
    base = info.base_model or spec.arch.base_model
    offered, default, arguments = map_phrases(config)
    # There maps are chosen by out_indices alone.
    arguments_mm = "".join(f", {k}={v!r}" for k, v in config["model_args"].items() if k in _MM_ARGUMENTS)
    head = ModelCardData(
        license=license_,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        base_model=base,
        tags=["cleandift", "diffusion-features", "cleandift_backbones", name],
    )
    size = config["pretrained_cfg"]["input_size"][-1]
    noisy = spec.noisy
    kind = "noisy diffusion features (DIFT)" if noisy else "clean diffusion features (CleanDIFT)"
    recipe = info.recipe
    if isinstance(recipe, Mapping):
        recipe = "```json\n" + json.dumps(recipe, indent=2, default=str) + "\n```"
    results = "".join(f"| {task} | {value} |\n" for task, value in info.results.items())
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {name}: {kind}\n\nWeights for `{name}` of cleandift_backbones {__version__}: maps of a diffusion UNet from "
        f"one pass over the {'noised' if noisy else 'clean'} image, {offered} Images: {size} "
        "px (any size from 64 on works), normalised with mean 0.5 and std 0.5.",
        f"""## Use

timm:

```python
import timm, cleandift_backbones
model = timm.create_model("hf-hub:{PLACEHOLDER}", pretrained=True, features_only=True).eval()
{default}
```

torch.hub:

```python
model = torch.hub.load("OWNER/REPO", "{name}", pretrained=True, {arguments}
                       pretrained_cfg_overlay=dict(hf_hub_id="{PLACEHOLDER}", hf_hub_filename=None, file=None))
```

mmsegmentation, mmdetection (in a config):

```python
backbone = dict(type="cleandift_backbones.CleanDIFT", model_name="{name}", pretrained="{PLACEHOLDER}"{arguments_mm})
```""",
        "## Training\n\n" + "\n\n".join(filter(None, [info.data and f"Data: {info.data}", recipe]))
        if info.data or recipe
        else "",
        f"## Results\n\n| task | value |\n| --- | --- |\n{results}" if results else "",
        info.notes or "",
        "## Licence\n\n"
        + (f"`{license_}`: that of the base weights{f' ({base})' if base else ''}." if license_ else "Not stated.")
        + (f" CleanDIFT's own weights are published under `{own}`." if own and own != license_ else "")
        + "\n\nMethod: CleanDIFT (arXiv 2412.03439)"
        + ("; DIFT (arXiv 2306.03881)." if noisy else "."),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def save_folder(
    model: nn.Module,
    folder: str | Path,
    card: CardInfo | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    state: Mapping[str, Tensor] | None = None,
    arguments: Mapping | None = None,
) -> Path:
    """Writes a model as a native folder: weights, config.json and a model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Args:
        model: made by timm.create_model, also with features_only.
        folder: to write, or to replace as a whole.
        card: for the README.
        metadata, dtype, max_shard_size: see `checkpoints.save_folder`.
        state: tensors under native names to write instead of the model's own; `model` may then be on the meta device.
        arguments: of the model, to be stored beside those read from it; None takes one out.

    Raises:
        TypeError: not a model of this package. ValueError: an optimised one. OSError: it could not be written.
    """
    model = _unwrapped(model)
    if getattr(_backbone(model), "own_keys", False):
        raise InputError("this model is optimised for inference: save it before cleandift_backbones.optimize")
    config = timm_config(model, state)
    stored = config["model_args"] | (arguments or {})
    config["model_args"] = {name: value for name, value in stored.items() if value is not None}
    meta = {"model": config["architecture"], **(metadata or {})}
    text = model_card(config, card)
    tensors = model.state_dict() if state is None else state
    return checkpoints.save_folder(tensors, folder, config, text, meta, dtype, max_shard_size)
