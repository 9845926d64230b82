"""Dtypes of weights: which ones a model can have, which numbers stay in float32, what becomes of 8-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.errors import InputError

#: dtypes that models compute in
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: dtypes of files that are read: those, and 8-bit ones, all of whose values float16 holds exactly
STORED = (*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
WIDENED = torch.float16
#: native names of tensors that are numbers, not weights: 16 bit would make 260.9994 of the timestep 260 or 261, and the
#: angles of the heads' Fourier features wrong by several per cent of a turn
NUMBERS = ("timestep", "heads.time_emb.weight")


def check_dtype(dtype: torch.dtype | str | None, auto: bool = False) -> torch.dtype | str | None:
    """A dtype by itself or its name ("bfloat16", "torch.bfloat16"); None stays, "auto" too where it is allowed.

    Raises:
        InputError: a dtype that no model computes in.
    """
    found = getattr(torch, dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found in DTYPES) or (auto and found == "auto"):
        return found
    more = " or 'auto' (that of the weights)" if auto else ""
    raise InputError(
        f"dtype must be float32, float16, bfloat16, float64{more}, got {dtype!r}: models do not compute in others"
    )


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a model with weights stored in `dtype` computes in: itself, or float16 for 8-bit floats."""
    return dtype if dtype in DTYPES else WIDENED


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of a model, by its native name, in `dtype` (None: as it is); NUMBERS are float32 in any case."""
    return tensor.to(torch.float32 if name in NUMBERS else dtype or tensor.dtype)
