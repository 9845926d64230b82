"""Weights on disk: which file, which keys, which shapes. Only safetensors is ever read; pickle is refused unopened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
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


class Weights:
    """Tensors of one or more safetensors files, by name, read one at a time and only when asked for."""

    def __init__(self, label: str | Path):
        self.label = str(label)
        self._where: dict[str, tuple[safe_open, str]] = {}

    def add(self, path: str | Path, prefix: str = "") -> Weights:
        """Takes in a file's tensors, named `prefix` + their name in the file."""
        handle = open_weights(path)
        self._where.update((prefix + name, (handle, name)) for name in handle.keys())  # noqa: SIM118 (no mapping)
        return self

    def names(self) -> set[str]:
        return set(self._where)

    def __getitem__(self, name: str) -> Tensor:
        handle, inner = self._where[name]
        return handle.get_tensor(inner)


def open_native(path: str | Path) -> Weights:
    """The weights of a native checkpoint: a file, or a folder (see `weight_files`)."""
    weights = Weights(path)
    for file in weight_files(path):
        weights.add(file)
    return weights


def open_diffusers(folder: str | Path) -> Weights:
    """The UNet and the VAE of a folder in diffusers' layout, under native names (`unet.*`, `vae.*`).

    Raises:
        CheckpointError: `unet/` or `vae/` has no safetensors file.
    """
    weights = Weights(folder)
    for part in ("unet", "vae"):
        files = sorted(Path(folder, part).glob("diffusion_pytorch_model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} has no {part}/diffusion_pytorch_model.safetensors: is it a diffusers folder?"
            )
        for file in files:
            weights.add(file, f"{part}.")
    return weights


def fit(
    weights: Weights,
    expected: Mapping[str, Tensor],
    ignorable: Callable[[str], bool],
    adapt: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """Reads exactly the tensors that a model holds; nothing else is read from disk.

    Args:
        weights: of `open_native` or `open_diffusers`.
        expected: the model's state dict (may be on the meta device): names, shapes and dtypes wanted.
        ignorable: says of a name in the file but not in the model whether it belongs to the architecture's deeper,
            unused part; any other extra name is an error.
        adapt: may reshape a tensor on its way in (input channels).

    Returns:
        name -> CPU tensor in the expected dtype, exactly the expected names.

    Raises:
        CheckpointError: missing, extra or wrong-shaped keys; the first few are listed.
    """
    names, path = weights.names(), weights.label
    missing = expected.keys() - names
    extra = {name for name in names - expected.keys() if not ignorable(name)}
    if len(missing) == len(expected):
        raise CheckpointError(
            f"{path} is no native cleandift_backbones checkpoint (keys vae.*, unet.*, timestep, prompt_embeds): "
            f"it holds {_listed(names)}"
        )
    if missing or extra:
        parts = [f"missing: {_listed(missing)}"] * bool(missing) + [f"not of this model: {_listed(extra)}"] * bool(
            extra
        )
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(parts)}. Is it of another architecture, or was it saved from a "
            "model that ends at a coarser map? Then ask only for maps that it holds, or save it with final_map='us10'"
        )
    state, wrong = {}, []
    for name, like in expected.items():
        tensor = adapt(name, weights[name])
        if not tensor.is_floating_point():
            wrong.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
        if tensor.shape != like.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(like.shape)}")
        state[name] = tensor.to(like.dtype)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path} has unfit tensors: {'; '.join(wrong[:5])}{more}")
    return state


def save_native(
    state: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a state dict as safetensors, aside first and then renamed, so that a crash never leaves half a file.

    `dtype` converts everything but the timestep, which half precision would round.
    """
    path = Path(path)
    if all(name.startswith("model.") for name in state):  # of a features_only model, which wraps the backbone
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if "prompt_embeds" in state and len(state["prompt_embeds"]) != 1:
        count = len(state["prompt_embeds"])
        raise ValueError(
            f"{count} prompts are set; weights are saved with one: call set_prompt with a single text first"
        )
    if dtype is not None:
        state = {name: tensor if name == "timestep" else tensor.to(dtype) for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, aside, dict(metadata or {}))
        aside.chmod(0o644)  # safetensors makes it readable for its owner alone
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
