"""Every form in which weights exist on disk, in (`formats`) and out (`save`). Knows key names, builds no models.

hub, remote: files on the Hub, fetched whole or read by ranges. memo: tensors that depend on them, kept on disk.
"""

from .dtypes import cast, check_dtype
from .fitting import check_configs, check_family, check_inputs, fit
from .folders import DIFFUSERS_NAME, NATIVE_NAME, CheckpointError, choose_file, shard_names
from .formats import TensorFile, Weights, family, open_checkpoint, open_files, open_state, open_weights
from .save import check_replaceable, plain_state, save_diffusers_unet, save_folder, save_ldm, save_native, verify

__all__ = [
    "DIFFUSERS_NAME",
    "NATIVE_NAME",
    "CheckpointError",
    "TensorFile",
    "Weights",
    "cast",
    "check_configs",
    "check_dtype",
    "check_family",
    "check_inputs",
    "check_replaceable",
    "choose_file",
    "family",
    "fit",
    "open_checkpoint",
    "open_files",
    "open_state",
    "open_weights",
    "plain_state",
    "save_diffusers_unet",
    "save_folder",
    "save_ldm",
    "save_native",
    "shard_names",
    "verify",
]
