"""Weights on disk: which file, which keys, which shapes. Only safetensors is ever read; pickle is refused unopened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NATIVE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A weights file that cannot be used; the message names the file, what is wrong, and the remedy."""


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files behind a path: a file, or a folder with `model.safetensors` or a sharded index.

    Raises:
        CheckpointError: nothing there, or only pickle files.
    """
    path = Path(path)
    if path.is_dir():
        index = path / f"{NATIVE_NAME}.index.json"
        if (path / NATIVE_NAME).is_file():
            return [path / NATIVE_NAME]
        if index.is_file():
            return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        others = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".ckpt", ".pkl")]
        hint = f" Pickle files ({_listed(others)}) are never loaded: convert them to safetensors." if others else ""
        raise CheckpointError(f"{path} holds no {NATIVE_NAME}.{hint}")
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    return [path]


def open_weights(path: str | Path) -> safe_open:
    """Opens a safetensors file for reading by key, without reading its tensors.

    Raises:
        CheckpointError: a pickle (refused, never loaded), truncated, or not a safetensors file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(2)
    if head == b"PK" or head[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a pickle file, which can run code when loaded: refused. Convert it to safetensors where you "
            "trust it (safetensors.torch.save_file), then pass that file"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({error}): download or convert it again"
        ) from error


def read_native(
    path: str | Path,
    expected: Mapping[str, Tensor],
    ignorable: Callable[[str], bool],
    adapt: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """Reads exactly the tensors that a model holds from a native checkpoint; nothing else is read from disk.

    Args:
        path: a file or folder (see `weight_files`).
        expected: the model's state dict (may be on the meta device): names, shapes and dtypes wanted.
        ignorable: says of a name in the file but not in the model whether it belongs to the architecture's deeper,
            unused part; any other extra name is an error.
        adapt: may reshape a tensor on its way in (input channels).

    Returns:
        name -> CPU tensor in the expected dtype, exactly the expected names.

    Raises:
        CheckpointError: missing, extra or wrong-shaped keys (the first few are listed), or an unusable file.
    """
    where = {}
    for file in weight_files(path):
        handle = open_weights(file)
        where.update(dict.fromkeys(handle.keys(), handle))
    missing = expected.keys() - where.keys()
    extra = {name for name in where.keys() - expected.keys() if not ignorable(name)}
    if len(missing) == len(expected):
        raise CheckpointError(
            f"{path} is no native cleandift_backbones checkpoint (keys vae.*, unet.*, timestep, prompt_embeds): "
            f"it holds {_listed(where)}"
        )
    if missing or extra:
        parts = [f"missing: {_listed(missing)}"] * bool(missing) + [f"not of this model: {_listed(extra)}"] * bool(extra)
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(parts)}. Is it of another architecture, or "
                              "was it saved from a model cut at a coarser map?")
    state, wrong = {}, []
    for name, like in expected.items():
        tensor = adapt(name, where[name].get_tensor(name))
        if tensor.shape != like.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(like.shape)}")
        state[name] = tensor.to(like.dtype)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path} has wrong shapes: {'; '.join(wrong[:5])}{more}")
    return state


def save_native(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a state dict as safetensors, aside first and then renamed, so that a crash never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, aside, dict(metadata or {}))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
