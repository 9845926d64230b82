"""Exactly the tensors that a model holds, out of weights that may hold more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from ..progress import tqdm
from .dtypes import STORED, cast
from .folders import CheckpointError
from .folders import listed as _listed
from .reading import Weights, family


def check_family(weights: Weights, width: int) -> None:
    """Raises CheckpointError if the weights' UNet attends to text of another width than `width`, or is SDXL's."""
    found = weights.unet_family()
    if found is not None and found != family(width):
        raise CheckpointError(
            f"{weights.label} holds a UNet of another family ({found}); the model is of {family(width)}"
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
