"""Exactly the tensors that a model holds, out of weights that may hold more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from ..utils.progress import tqdm
from .dtypes import STORED, cast
from .folders import CheckpointError
from .folders import listed as _listed
from .formats import Weights, family

LATENT_CHANNELS = 4  # of Stable Diffusion 1.x and 2.x


def check_inputs(weights: Weights) -> None:
    """Raises CheckpointError for a UNet that takes more channels than a latent has, as those for inpainting do."""
    shape = weights.shape(first) if (first := "unet.conv_in.weight") in weights else ()
    if len(shape) == 4 and shape[1] > LATENT_CHANNELS:
        raise CheckpointError(
            f"{weights.label} ({weights.form}) holds a UNet of {shape[1]} input channels, as models for inpainting "
            f"(9), editing (8), upscaling (7) or depth (5) have; the models here take the {LATENT_CHANNELS} of a "
            "latent: take the base model that it was made from"
        )


def check_family(weights: Weights, width: int) -> None:
    """Raises CheckpointError if the weights' UNet attends to text of another width than `width`, or is SDXL's, or takes
    more than a latent."""
    check_inputs(weights)
    found = weights.unet_family()
    if found is not None and found != family(width):
        raise CheckpointError(
            f"{weights.label} holds a UNet of another family ({found}); the model is of {family(width)}"
        )


#: part -> arguments of its class that change what it computes, whether or not an architecture names them, with their
#: defaults: SDXL's VAE has the shapes of Stable Diffusion's, and another scale
_COMPUTING = {
    "unet": dict(
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        mid_block_scale_factor=1,
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="default",
        use_linear_projection=False,
    ),
    "vae": dict(scaling_factor=0.18215, shift_factor=None, act_fn="silu", norm_num_groups=32),
}


def _same(one: object, other: object) -> bool:
    """Whether two values of a config mean the same: a list for each level, or one number for all of them."""
    one, other = (list(value) if isinstance(value, (list, tuple)) else value for value in (one, other))
    if isinstance(one, list) != isinstance(other, list):
        several, single = (one, other) if isinstance(one, list) else (other, one)
        return bool(several) and all(value == single for value in several)
    return one == other


def check_configs(weights: Weights, cfg: Mapping[str, dict]) -> None:
    """Raises CheckpointError where a config of a diffusers folder differs from the architecture's.

    Args:
        weights: with the configs of their parts.
        cfg: an entry of `models.ARCHITECTURES`, or only the parts to check.
    """
    for part in weights.configs.keys() & cfg.keys():
        found = weights.configs[part]
        tiny = "encoder_block_out_channels" in cfg[part]  # of another class, whose arguments have other meanings
        wanted = {**({} if tiny else _COMPUTING.get(part, {})), **cfg[part]}
        for key, value in wanted.items():
            if key in found and not _same(found[key], value):
                raise CheckpointError(
                    f"{weights.label}: {key} of its {part} is {found[key]}, the model has {value}: take another model, "
                    "or other weights"
                )


def fit(
    weights: Weights,
    expected: Mapping[str, Tensor],
    ignorable: Callable[[str], bool],
    adapt: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Reads exactly the tensors that a model holds; nothing else is read from disk.

    Tensors whose dtype fits are not copied: they lie in the memory-mapped file, and are read when first touched.

    Args:
        weights: of `open_checkpoint`.
        expected: the model's state dict (may be on the meta device): names and shapes wanted.
        ignorable: says of a name in the file but not in the model whether it belongs to a part of the architecture
            that the model does not hold; any other extra name is an error.
        adapt: may reshape a tensor on its way in (input channels).
        dtype: of the result (default: that of `expected`, by name); `dtypes.NUMBERS` are float32 in any case.

    Returns:
        name -> CPU tensor, exactly the expected names.

    Raises:
        CheckpointError: a UNet of another family; missing, extra or wrong-shaped keys; the first few are listed.
    """
    names, path = weights.names(), weights.label
    key = next((name for name in expected if name.startswith("unet.") and name.endswith(".attn2.to_k.weight")), None)
    if key is not None:
        check_family(weights, expected[key].shape[1])
    missing = expected.keys() - names
    extra = {name for name in names - expected.keys() if not ignorable(name)}
    if missing or extra:
        parts = [f"missing: {_listed(missing)}"] * bool(missing) + [f"not of this model: {_listed(extra)}"] * bool(
            extra
        )
        raise CheckpointError(
            f"{path} ({weights.form}) does not fit the model: {'; '.join(parts)}. Is it of another architecture, or "
            "was it saved from a model that ends at a coarser map? Then ask only for maps that it holds, or save it "
            "with final_map='us10'"
        )
    state, wrong = {}, []
    remote = not all(isinstance(file, safe_open) for file in weights.files())
    for name, like in tqdm(expected.items(), desc=f"reading {path}", unit="tensor", disable=not remote):
        tensor = adapt(name, weights[name])
        if tensor.dtype not in STORED:
            wrong.append(f"{name} holds {tensor.dtype}, which cannot be turned into weights")
        elif tensor.shape != like.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(like.shape)}")
        else:
            state[name] = cast(name, tensor, dtype or like.dtype)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path} has unfit tensors: {'; '.join(wrong[:5])}{more}")
    return state
