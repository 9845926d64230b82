"""What a file of weights is, by the names of its tensors, and their native names; see the table in `formats`."""

from __future__ import annotations

import re
from collections.abc import Callable

from . import ldm
from .folders import CheckpointError
from .folders import listed as _listed

_FULL = {
    "unet_feature_extractor_cleandift.": "unet.",
    "unet_feature_extractor_base.": "teacher.",
    "ae.ae.": "vae.",
    "time_emb.": "heads.time_emb.",
    "time_in_proj.": "heads.time_in_proj.",
    "mapping.": "heads.mapping.",
    "adapters.": "heads.adapters.",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
#: last parts of names that bitsandbytes, torchao, quanto and GPTQ put beside quantised weights
_QUANTIZED = (".absmax", ".quant_map", ".SCB", ".weight._data", ".weight._scale", ".qweight", ".qzeros", ".int_data")


def _vae_name(name: str) -> str:
    """diffusers' present name of a VAE tensor that may carry the attention names of diffusers before 0.17."""
    return re.sub(
        r"(mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda m: m[1] + _OLD_ATTENTION[m[2]] + ".",
        name,
    )


def _full_name(name: str) -> str:
    for prefix, native in _FULL.items():
        if name.startswith(prefix):
            return _vae_name(native + name.removeprefix(prefix))
    return name


def identify(names: set[str], label: str) -> tuple[str, Callable[[str], str]]:
    """(what a file with these keys is, the native name of each key).

    Raises:
        CheckpointError: none of the known forms.
    """

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any(re.search(r"(^|[._])lora([._]|$)", name.lower()) for name in names):
        raise CheckpointError(
            f"{label} is a LoRA, not a whole model: merge it into its base model and save that, then pass the result"
        )
    if marks := [name for name in names if name.endswith(_QUANTIZED)]:
        raise CheckpointError(
            f"{label} holds weights quantised to integers ({_listed(marks, 3)}): save them in 16 bit (in diffusers, "
            "model.dequantize() and save_pretrained), then pass that"
        )
    if any_starts("unet_feature_extractor_"):
        return "CompVis full checkpoint", _full_name
    if any_starts("unet.", "vae."):
        return "native checkpoint", str
    if "conv_in.weight" in names and any_starts("down_blocks."):
        return "UNet in diffusers' layout", lambda name: f"unet.{name}"
    foreign = ldm.foreign_family(names)
    if foreign is not None:
        raise CheckpointError(f"{label} is of {foreign}: the models here are of Stable Diffusion 1.x and 2.x")
    found = ldm.identify(names)
    if found is not None:
        return found
    if "encoder.conv_in.weight" in names:
        return "VAE in diffusers' layout", lambda name: f"vae.{_vae_name(name)}"
    if "encoder.layers.0.weight" in names:
        return "AutoencoderTiny in diffusers' layout", lambda name: f"vae.{name}"
    raise CheckpointError(
        f"{label} is no checkpoint of a form that this package knows (native vae.* and unet.*, CompVis unet or full, "
        f"diffusers' UNet, VAE or folder, LDM single file): it holds {_listed(names) or 'nothing'}"
    )
