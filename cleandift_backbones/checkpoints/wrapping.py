"""Names of tensors without the prefixes that wrappers of a module put in front."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .folders import CheckpointError, listed

#: put anywhere in a name: by torch.compile, (Distributed)DataParallel, FSDP, activation checkpointing, Lightning Fabric
_ANYWHERE = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
#: put in front: by timm's features_only, mmengine, segmentation_models_pytorch, transformers, EMA of several packages,
#: ComfyUI, and what files of a whole pipeline or training hold
_IN_FRONT = (
    "model|backbone|_backbone|timm_model|encoder|ema|ema_model|base_model|net|diffusion_model|state_dict|pipe|unet"
)
_LDM = r"(?:time_embed|input_blocks|middle_block|output_blocks|out|label_emb)\."  # first parts of names in LDM's UNet
_FIRST = re.compile(
    rf"((?:(?:{_IN_FRONT})\.)*?)(?:unet\.(?!unet\.|{_LDM})|vae\.|unet_feature_extractor_|conv_in\.weight$|"
    r"encoder\.(?:conv_in|layers\.0)\.weight$|model\.diffusion_model\.|first_stage_model\.|"
    r"input_blocks\.0\.0\.weight$|encoder\.down\.0\.)"
)


def bare_name(name: str) -> str:
    """A name without the parts that wrappers put anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)


def unwrapped(names: Iterable[str], label: str) -> tuple[dict[str, str], list[str]]:
    """Names without what wrappers put in front of them or between their parts.

    Args:
        names: as in a file or state dict.
        label: of it, for messages.

    Returns:
        name as it is -> without wrappers, of the names of the backbone, and the names that stand beside it (of heads of
        a whole segmenter, say); none of the two where the names belong to nothing that is known.

    Raises:
        CheckpointError: several models, or two names that become one.
    """
    bare = {name: bare_name(name) for name in names}
    prefixes = sorted({match[1] for name in bare.values() if (match := _FIRST.match(name))})
    if len(prefixes) > 1 and "" not in prefixes:
        raise CheckpointError(f"{label} holds several models, under {listed(prefixes)}: save one of them alone")
    prefix = prefixes[0] if prefixes else ""
    found = {name: short.removeprefix(prefix) for name, short in bare.items() if short.startswith(prefix)}
    if len(set(found.values())) < len(found):
        twice = {short for short in found.values() if list(found.values()).count(short) > 1}
        raise CheckpointError(f"{label} holds tensors twice, once wrapped: {listed(twice)}. Save them once")
    return found, [name for name in bare if name not in found]
