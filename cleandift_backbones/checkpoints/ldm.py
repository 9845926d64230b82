"""Key names of the original Stable Diffusion code (LDM), in which single-file checkpoints of SD 1.x and 2.x come.

| part | LDM | native |
| --- | --- | --- |
| UNet | `model.diffusion_model.*`, or without prefix where a file holds nothing else | `unet.*` |
| VAE | `first_stage_model.*`, or without prefix where a file holds nothing else | `vae.*` |
| text encoder, EMA weights, schedule, ... | `cond_stage_model.*`, `model_ema.*`, `betas`, ... | `ldm.*`, not read |

LDM numbers the UNet's blocks across all levels, diffusers within each level. The map between them follows from the
number of levels, and of layers in each, which are read from the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

UNET, VAE, REST = "model.diffusion_model.", "first_stage_model.", "ldm."
TEXT, EMA = f"{REST}cond_stage_model.", f"{REST}model_ema."

#: part of a key -> the family that it is of, which LDM's layout of SD 1.x and 2.x does not fit
_FOREIGN = {
    "time_stack.": "Stable Video Diffusion",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "control_model.": "ControlNet",
    "conditioner.embedders.": "Stable Diffusion XL",
}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # files of a VAE alone also hold its loss
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
#: names that diffusers' own converter to LDM left as they are, where it was older or newer than the model
_UNCHANGED = {
    "to_q": ("to_q", "query"),
    "to_k": ("to_k", "key"),
    "to_v": ("to_v", "value"),
    "to_out.0": ("to_out.0", "to_out", "proj_attn"),
}


def unet_modules(levels: int, layers: int, attending: Collection[int]) -> dict[str, str]:
    """diffusers' module -> LDM's, of a UNet.

    Args:
        levels: number of resolutions.
        layers: resnets per level in the down blocks; the up blocks have one more.
        attending: indices of the up blocks with attention: there LDM numbers the upsampler 2, elsewhere 1.
    """
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        first = level * (layers + 1)
        for layer in range(layers):
            resnets[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer + 1}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer + 1}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        for layer in range(layers + 1):
            resnets[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        place = 2 if level in attending else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    return table | {f"{new}.{part}": f"{old}.{_RESNET[part]}" for new, old in resnets.items() for part in _RESNET}


def vae_modules(levels: int, layers: int) -> dict[str, str]:
    """diffusers' module -> LDM's, of an AutoencoderKL. LDM numbers the decoder's levels fine to coarse.

    Args:
        levels: number of resolutions.
        layers: the most resnets of a level.
    """
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        for new, old in _VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{new}"] = f"{half}.mid.attn_1.{old}"
        for level in range(levels):
            new, old = f"{half}.{way}_blocks.{level}", f"{half}.{way}.{level if way == 'down' else levels - 1 - level}"
            table[f"{new}.{way}samplers.0.conv"] = f"{old}.{way}sample.conv"
            resnets |= {f"{new}.resnets.{layer}": f"{old}.block.{layer}" for layer in range(layers)}
        for new, old in resnets.items():
            table |= {new: old, f"{new}.conv_shortcut": f"{old}.nin_shortcut"}
    return table


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that a pattern finds at the beginning of a name; 0 if it finds none."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def _rename(table: Mapping[str, str], name: str) -> str:
    """A tensor's name with the module in front of it, the longest that the table knows, replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = table.get(".".join(parts[:end]))
        if module is not None:
            return ".".join([module, *parts[end:]])
    return name


def _inverse(*tables: Mapping[str, str]) -> dict[str, str]:
    return {old: new for table in tables for new, old in table.items()}


def foreign_family(names: Collection[str]) -> str | None:
    """The family of a single-file checkpoint that is neither SD 1.x nor 2.x, by its keys; None for all else."""
    for part, family in _FOREIGN.items():
        if any(part in name for name in names):
            return family
    unet = {name.removeprefix(UNET) for name in names}
    # SD 2.1 unCLIP has label_emb too, but four levels
    three_levels = not any(name.startswith("input_blocks.9.") for name in unet)
    return "Stable Diffusion XL" if "label_emb.0.0.weight" in unet and three_levels else None


def identify(names: Collection[str]) -> tuple[str, Callable[[str], str]] | None:
    """(what a file with LDM's keys is, the native name of each key), or None for a file without such keys."""
    whole = any(name.startswith((UNET, VAE)) for name in names)
    if whole:
        form, unet_prefix, vae_prefix = "LDM checkpoint", UNET, VAE
    elif "input_blocks.0.0.weight" in names:
        form, unet_prefix, vae_prefix = "UNet in LDM's layout", "", None
    elif any(name.startswith("encoder.down.0.") for name in names):
        form, unet_prefix, vae_prefix = "VAE in LDM's layout", None, ""
    else:
        return None

    def inside(prefix: str | None) -> list[str]:
        return [] if prefix is None else [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    unet, vae = inside(unet_prefix), inside(vae_prefix)
    steps = sorted(int(match[1]) for name in unet if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name)))
    levels, layers = len(steps) + 1, (steps[0] if steps else _count(unet, r"input_blocks\.(\d+)\.")) - 1
    modules = _inverse(unet_modules(levels, layers, ()), unet_modules(levels, layers, range(levels)))
    vae_levels = _count(vae, r"(?:encoder\.down|decoder\.up)\.(\d+)\.")
    vae_layers = _count(vae, r"(?:encoder\.down|decoder\.up)\.\d+\.block\.(\d+)\.")
    vae_table = _inverse(vae_modules(vae_levels, vae_layers))
    for half in ("encoder", "decoder"):
        for new, others in _UNCHANGED.items():
            vae_table |= {f"{half}.mid.attn_1.{old}": f"{half}.mid_block.attentions.0.{new}" for old in others}

    def native(name: str) -> str:
        if unet_prefix is not None and name.startswith(unet_prefix):
            return f"unet.{_rename(modules, name.removeprefix(unet_prefix))}"
        if vae_prefix is not None and name.startswith(tuple(vae_prefix + part for part in _VAE_PARTS)):
            return f"vae.{_rename(vae_table, name.removeprefix(vae_prefix))}"
        return f"{REST}{name}"

    return form, native


def ldm_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with LDM's keys and shapes of one with native names (`unet.*`, `vae.*`, `ldm.*`)."""
    names = [name.removeprefix("unet.") for name in state if name.startswith("unet.")]
    attending = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    layers = _count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    unet = unet_modules(_count(names, r"down_blocks\.(\d+)\."), layers, attending)
    names = [name.removeprefix("vae.") for name in state if name.startswith("vae.")]
    levels = _count(names, r"(?:encoder\.down|decoder\.up)_blocks\.(\d+)\.")
    vae = vae_modules(levels, _count(names, r"(?:encoder\.down|decoder\.up)_blocks\.\d+\.resnets\.(\d+)\."))
    found = {}
    for name, tensor in state.items():
        part, _, inner = name.partition(".")
        if part == "unet":
            found[UNET + _rename(unet, inner)] = tensor
        elif part == "vae":
            linear = ".attentions.0.to_" in name and tensor.ndim == 2
            found[VAE + _rename(vae, inner)] = tensor[:, :, None, None] if linear else tensor  # LDM's convolutions
        else:
            found[name.removeprefix(REST)] = tensor
    return found
