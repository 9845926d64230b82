"""Weights to disk: one native file, a native folder that timm loads, a UNet folder that diffusers loads."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..utils.atomic import is_file, readable_size, reading, replacing, set_aside
from ..utils.errors import FileError, FileTakenError, InputError
from .dtypes import cast, check_dtype
from .folders import DIFFUSERS_NAME, NATIVE_NAME, CheckpointError, find_files, listed
from .formats import open_weights
from .ldm import ldm_state
from .wrapping import unwrapped

_logger = logging.getLogger(__name__)
CHECKSUM = "sha256"  # in the metadata of each file: of its tensors, see `checksum`


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under native names: without what features_only, torch.compile and others put in front of them.

    Raises:
        ValueError: several prompts are set.
    """
    names, beside = unwrapped(state, "the state dict")
    if beside:
        raise InputError(f"tensors of more than the backbone are in the state dict ({listed(beside, 3)}): pass its own")
    state = {names[name]: tensor for name, tensor in state.items()}
    if "prompt_embeds" in state and len(state["prompt_embeds"]) != 1:
        raise InputError(
            f"{len(state['prompt_embeds'])} prompts are set; weights are saved with one: call set_prompt with a single "
            "text first"
        )
    return dict(state)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and little-endian bytes of each tensor, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_file(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None) -> None:
    """Writes one safetensors file with its checksum; `path` is written at once, not aside."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    meta = {"format": "pt", **(metadata or {}), CHECKSUM: checksum(tensors)}
    try:
        save_file(tensors, path, meta)
    except SafetensorError as error:
        needed = readable_size(sum(tensor.nbytes for tensor in tensors.values()))
        raise FileError(f"{path.parent} did not take a file of {needed}: {error}. Is the disk full?") from error
    _sort_metadata(path)
    path.chmod(0o644)  # safetensors makes it readable for its owner alone


def _sort_metadata(path: Path) -> None:
    """Puts the header's metadata in order: safetensors writes them in a random one, and equal weights should be equal
    files, which the Hub does not take twice."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    dtype = check_dtype(dtype)
    return {name: cast(name, tensor, dtype) for name, tensor in state.items()}


def verify(path: str | Path) -> str:
    """Reads a file, or every shard of a folder, and compares it with the checksum that it was written with.

    Returns:
        "verified", or "no checksum" for files of others.

    Raises:
        CheckpointError: damaged.
    """
    path = Path(path)
    files = [path] if path.is_file() else find_files(path, NATIVE_NAME) or find_files(path, DIFFUSERS_NAME)
    found = set()
    for file in files:
        handle: safe_open = open_weights(file)
        stored = (handle.metadata() or {}).get(CHECKSUM)
        found.add(stored is not None)
        if stored and stored != checksum({name: handle.get_tensor(name) for name in handle.keys()}):  # noqa: SIM118
            raise CheckpointError(f"{file} is damaged: its tensors differ from its checksum. Get or convert it again")
    return "verified" if found == {True} else "no checksum"


_OURS = r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json|README\.md"


def _is_ours(name: str) -> bool:
    return re.fullmatch(_OURS, name) is not None


def check_replaceable(folder: str | Path) -> None:
    """Looks at a folder that will be replaced.

    Raises:
        FileTakenError: it is a file, or holds anything that this module did not write, by name, or by the checksum in
            the header of weights: it would be lost.
        FileError: it cannot be read at the moment.
    """
    folder = Path(folder)
    if is_file(folder):
        raise FileTakenError(f"{folder} is a file: choose another folder")
    with reading(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    weights = {name: _has_checksum(folder / name) for name in names if name.endswith(".safetensors")}
    others = [name for name in names if not _is_ours(name) or not weights.get(name, any(weights.values()))]
    if others:
        raise FileTakenError(
            f"{folder} holds other files ({', '.join(others[:3])}), which were not written by cleandift_backbones: "
            "choose another folder, or move them away"
        )


def keep_other(path: Path) -> None:
    """Renames a weights file that this module did not write to NAME.other, before one of that name is written."""
    if path.is_file() and not _has_checksum(path):
        _logger.warning(f"{path} was not written by cleandift_backbones: kept as {set_aside(path, 'other').name}")


def _has_checksum(path: Path) -> bool:
    try:
        return CHECKSUM in (open_weights(path).metadata() or {})
    except CheckpointError:
        return False


def save_native(
    state: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a state dict as one safetensors file, aside and renamed.

    `dtype` converts the weights; `dtypes.NUMBERS`, such as the timestep, are float32 in any case.

    Raises:
        OSError: it could not be written (disk full, for one); what stood there before still does.
    """
    state = _converted(plain_state(state), dtype)
    with replacing(path) as aside:
        write_file(state, aside, metadata)


def save_folder(
    state: Mapping[str, Tensor],
    folder: str | Path,
    config: Mapping,
    card: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a native folder: `model.safetensors` (or shards and their index), `config.json`, `README.md`.

    The folder is filled aside and then takes the place of `folder`, which may hold nothing but such files.

    Args:
        state: the state dict, under native names.
        config: timm's, see `card.timm_config`.
        card: text of README.md.
        metadata: for the header of each file; a checksum is added.
        dtype: of the weights; `dtypes.NUMBERS`, such as the timestep, are float32 in any case.
        max_shard_size: of one file, as a number of bytes or "5GB".

    Raises:
        OSError: it could not be written (nothing half-written remains), or `folder` holds other files.
    """
    check_replaceable(folder)
    state = _converted(plain_state(state), dtype)
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with replacing(folder, written=_is_ours) as aside:
        aside.mkdir()
        for file, names in plan.filename_to_tensors.items():
            write_file({name: state[name] for name in names}, aside / file, metadata)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (aside / f"{NATIVE_NAME}.index.json").write_text(json.dumps(index, indent=2))
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (aside / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def save_ldm(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors with native names as one single-file checkpoint with LDM's keys, aside and renamed.

    Raises:
        OSError: as for `save_native`.
    """
    with replacing(path) as aside:
        write_file(ldm_state(state), aside, metadata)


def save_diffusers_unet(
    unet: Mapping[str, Tensor],
    folder: str | Path,
    config: Mapping,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a folder that `diffusers.UNet2DConditionModel.from_pretrained` loads.

    Args:
        unet: the whole UNet under diffusers' key names.
        config: of UNet2DConditionModel.
        metadata, dtype: as for `save_folder`.

    Raises:
        OSError: as for `save_folder`.
    """
    check_replaceable(folder)
    with replacing(folder, written=_is_ours) as aside:
        aside.mkdir()
        write_file(_converted(unet, dtype), aside / DIFFUSERS_NAME, metadata)
        (aside / "config.json").write_text(
            json.dumps({"_class_name": "UNet2DConditionModel", **config}, indent=2) + "\n"
        )
    return Path(folder)
