"""Every form in which weights exist on disk, in (`reading`) and out (`writing`). Knows key names, builds no models."""

from .reading import (
    DIFFUSERS_NAME,
    NATIVE_NAME,
    CheckpointError,
    TensorFile,
    Weights,
    check_family,
    family,
    fit,
    open_checkpoint,
    open_files,
    open_weights,
    shard_names,
)
from .writing import check_replaceable, plain_state, save_diffusers_unet, save_folder, save_ldm, save_native, verify

__all__ = [
    "DIFFUSERS_NAME",
    "NATIVE_NAME",
    "CheckpointError",
    "TensorFile",
    "Weights",
    "check_family",
    "check_replaceable",
    "family",
    "fit",
    "open_checkpoint",
    "open_files",
    "open_weights",
    "plain_state",
    "save_diffusers_unet",
    "save_folder",
    "save_ldm",
    "save_native",
    "shard_names",
    "verify",
]
