"""timm's registry: default_cfgs and an entrypoint for each model of `architectures`. diffusers is imported only when
the first model is built."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models import (
    _registry,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from ..checkpoints.dtypes import check_dtype
from ..utils.errors import InputError
from .architectures import MODELS, Architecture, ModelSpec, Published, add_architecture, remove_architecture
from .inputs import refuse_unknown_ways, take_state, unknown_arguments

if TYPE_CHECKING:
    from torch import nn


def _cfgs(spec: ModelSpec) -> dict[str, dict]:
    """timm's pretrained configs of a model, by "model.tag"; of one without published weights by its name."""
    return {f"{spec.name}.{one.tag}": _cfg(spec, one) for one in spec.published} or {spec.name: _cfg(spec)}


def _cfg(spec: ModelSpec, weights: Published | None = None) -> dict:
    arch = spec.arch
    size, side = arch.image_size, arch.defaults.min_side
    place = dict(license=weights.license if weights else "apache-2.0")  # random weights: the code's own
    if weights is not None:
        place |= dict(description=weights.description)
        unet = weights.parts.get("unet", "")
        if os.path.isabs(unet):
            place |= dict(file=unet)
        elif "/" in unet:
            owner, repo, *path = unet.split("/", 2)
            place |= dict(hf_hub_id=f"{owner}/{repo}", hf_hub_filename=path[0] if path else None)
        else:
            raise InputError(
                f"weights {spec.name}.{weights.tag}: parts['unet'] is {unet!r}: give an absolute path, or "
                "OWNER/NAME/PATH on the Hub"
            )
    return dict(
        url="",
        num_classes=0,
        input_size=(3, size, size),
        min_input_size=(3, side, side),
        pool_size=(size // arch.stride(arch.defaults.final_map),) * 2,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="vae.encoder.conv_in",
        classifier="head.fc",
        paper_ids="arXiv:2412.03439",
        paper_name="CleanDIFT: Diffusion Features without Noise",
        origin_url="https://github.com/CompVis/cleandift",
        **place,
    )


def _create(
    name: str,
    pretrained: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    sources: dict[str, str] | None = None,
    held: str | None = None,
    latent_encoder: str = "default",
    **kwargs: Any,
):
    """Builds a model through timm, only as deep as its finest map needs, and loads its weights."""
    from . import text
    from .cleandift import CleanDIFT
    from .dift import DIFT
    from .feature_info import FeatureInfo
    from .last_map import settled_last_map
    from .pretrained import WeightSources, load_pretrained

    spec = MODELS[name]
    arch, dtype = spec.arch, check_dtype(dtype, auto=True)
    infos = FeatureInfo(arch, spec.pyramid, latent_encoder)
    stored = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    weights = spec.weights(stored.tag) or spec.weights()
    parts = WeightSources(name, weights.parts if weights else {}, sources or {}, latent_encoder)
    text_encoder = kwargs.setdefault("text_encoder", parts.given.get("text_encoder"))
    if text_encoder is None:
        kwargs["text_encoder"] = parts.get("text_encoder")
    refuse_unknown_ways(kwargs, infos)
    state = take_state(kwargs, pretrained)
    if held is not None and kwargs.get("features_only") and kwargs.get("out_indices") is None:
        held = settled_last_map(held, parts, stored.to_dict(), infos.executed, kwargs.get("cache_dir"), state)
    default = infos.default(held)
    if kwargs.get("features_only"):
        if kwargs.get("feature_cls", "getter") != "getter":
            raise InputError(
                f"feature_cls {kwargs['feature_cls']!r} is not supported: fine maps run last here, which only timm's "
                "'getter' (the default) handles. Leave feature_cls out"
            )
        if kwargs.get("final_map") not in (None, *infos.names):
            raise InputError(f"unknown map {kwargs['final_map']!r}: with features_only, choose maps by out_indices")
        # A folder's config may name the map that its model ended at; the features asked for decide.
        kwargs["out_indices"] = infos.take(kwargs.get("out_indices", default))
        kwargs["final_map"] = infos.deepest(kwargs["out_indices"])
    elif "out_indices" in kwargs:
        raise InputError("out_indices needs features_only=True")
    # A prompt waits for the weights: they may bring their own text encoder.
    prompt = kwargs.pop("prompt", None) if pretrained else None
    if prompt is not None:
        text.check(prompt)
    # With weights to come nothing is initialised: parameters stay on the meta device until they are assigned.
    with torch.device("meta") if pretrained else nullcontext(), unknown_arguments(name):
        model = build_model_with_cfg(
            partial(DIFT if spec.noisy else CleanDIFT, arch, pyramid=spec.pyramid, latent_encoder=latent_encoder),
            name,
            pretrained=False,
            feature_cfg=dict(out_indices=default, feature_cls="getter"),
            **kwargs,
        )
    backbone = model.model if kwargs.get("features_only") else model
    if latent_encoder == "tiny":
        backbone.pretrained_cfg["first_conv"] = "vae.encoder.layers.0"
    if backbone.heads is not None and not kwargs.get("features_only"):
        backbone.heads.keep([backbone.denoiser.last_map])
    if pretrained:
        backbone.cache_dir = kwargs.get("cache_dir")
        if prompt is not None:
            backbone.fixed.update(arch.conditions.shapes())
        place = load_pretrained(backbone, parts, backbone.cache_dir, dtype, state)
        if text_encoder is None and place is not None:
            backbone.text_encoder = place
        if prompt is not None:
            backbone.set_prompt(prompt)
        return model.to(device)
    return model.to(device=device, dtype=None if dtype == "auto" else dtype)


_ARGUMENTS = """

    Args:
        pretrained: load weights; pretrained_cfg_overlay=dict(file=PATH) names a file or folder of yours,
            dict(state_dict=...) gives tensors in memory.
        features_only: return a list of maps instead of pooled features; out_indices chooses them by name or index
            ({maps}; default: {default}).
        final_map: without features_only, the map that the model ends at (default "{final}").
        num_classes, global_pool, in_chans, drop_rate: as everywhere in timm.
        timestep: overrides the stored one, 0..999. prompt: text, or one per image (needs transformers).
        dtype: of the weights, e.g. torch.bfloat16; "auto": as they are stored (8-bit floats become float16); default:
            float32. device: of the model.
        sources: dict(unet=, vae=, timestep=, text_encoder=), each a path or OWNER/NAME[@REVISION][/PATH] on the Hub,
            for weights that are put together from published parts. held: the last map of a truncated UNet, to which
            the default out_indices are restricted (config.json of a folder gives it; the tensors in the file decide).
        latent_encoder: "tiny" for a light encoder in the VAE's place, of diffusers' AutoencoderTiny form (TAESD's
            weights for sd15 and sd21): much less work, slightly other latents; sources=dict(vae=) gives another one.
        projected_timestep: features as the projection heads map them to this timestep of the teacher (cleandift_*);
            heads: how these were trained, dict(depth=3, conditioning="adarms" or "film", gated=True).
"""
_NOISY_ARGUMENTS = "        ensemble_size: noises averaged (8). noise_seed: equal seeds give equal maps (0).\n"


def _summary(spec: ModelSpec) -> str:
    from .feature_info import FeatureInfo

    arch, infos = spec.arch, FeatureInfo.of(spec)
    kind = "DIFT on {}, the noisy baseline" if spec.noisy else "CleanDIFT on {}"
    strides, widths = ([info[key] for info in infos] for key in ("reduction", "num_chs"))
    levels = "one map per stride, stages of the VAE first" if spec.pyramid else f"{len(infos)} maps"
    return (
        f"{kind.format(arch.title)}: {levels}, {min(widths)} to {max(widths)} channels, strides {min(strides)} to "
        f"{max(strides)}; {arch.image_size} px."
    )


def _documented(spec: ModelSpec) -> str:
    """The docstring of an entrypoint, which torch.hub.help shows."""
    from .feature_info import FeatureInfo

    infos = FeatureInfo.of(spec)
    names = infos.names
    arguments = _ARGUMENTS.format(
        maps=f"0 = {names[0]}, the finest, ... {len(names) - 1} = {names[-1]}",
        default=", ".join(names[i] for i in infos.default()),
        final=spec.arch.defaults.final_map,
    )
    return _summary(spec) + arguments + (_NOISY_ARGUMENTS if spec.noisy else "")


def _register(spec: ModelSpec, cfgs: dict[str, dict], doc: str) -> None:
    """Registers a model with timm."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(spec.name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = spec.name
    entrypoint.__doc__ = doc
    default_cfgs.update(generate_default_cfgs(cfgs))
    globals()[spec.name] = register_model(entrypoint)
    if not spec.arch.listed:  # timm.list_models() leaves out deprecated names; they can be created all the same
        getattr(_registry, "_deprecated_models", {})[spec.name] = None


def register_architecture(arch: Architecture) -> list[str]:
    """Makes models of an architecture of yours: cleandift_NAME, cleandift_NAME_pyramid and dift_NAME.

    For diffusion models of a family that this package knows, such as a fine-tuned or distilled Stable Diffusion with
    other widths or depths:

        arch = Architecture(
            "mine", "my Stable Diffusion", DenoiserSpec(unet_config((320, 640, 1280), "-xx", cross_attention_dim=768)),
            vae=dict(block_out_channels=(128, 256, 512, 512)), conditions=TextConditions(77, 768), schedule=Schedule(),
            image_size=512, defaults=Defaults(map="us3", shown=("us3", "us6"), searched=("us3",)),
        )
        register_architecture(arch)
        timm.create_model("cleandift_mine", features_only=True)

    Returns:
        the names of the models.

    Raises:
        InputError: the name is taken; defaults name maps that the denoiser does not have.
    """
    specs = add_architecture(arch)
    try:
        ready = [(spec, _cfgs(spec), _documented(spec)) for spec in specs]
    except Exception:
        remove_architecture(arch.name)
        raise
    for one in ready:
        _register(*one)
    return [spec.name for spec in specs]


default_cfgs: dict[str, Any] = {}
for _spec in list(MODELS.values()):
    _register(_spec, _cfgs(_spec), _documented(_spec))
