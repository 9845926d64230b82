"""Weights on disk in every form in which they exist: which file, which keys, which shapes. Builds no models.

| form | found by | becomes |
| --- | --- | --- |
| native file or folder (`model.safetensors`, sharded or not) | `unet.*`, `vae.*` | itself |
| CompVis `*_unet`, or diffusers' UNet | `conv_in.weight`, `down_blocks.*` | `unet.*` |
| CompVis `*_full` | `unet_feature_extractor_*` | `unet.*`, `teacher.*`, `vae.*`, `timestep`, `heads.*` |
| diffusers folder | `unet/`, `vae/` | `unet.*`, `vae.*`, configs |
| diffusers' VAE, also with its old attention names | `encoder.conv_in.weight` | `vae.*` |
| diffusers' AutoencoderTiny (TAESD) | `encoder.layers.0.weight` | `vae.*` |
| LDM single file of SD 1.x, 2.x; UNet or VAE of one | `model.diffusion_model.*`, ... | `unet.*`, `vae.*`, `ldm.*` |

Only safetensors is ever read; pickle is refused unopened.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ..utils.atomic import DamagedFileError, is_file, is_folder, open_tensors
from ..utils.errors import InputError
from ..utils.records import read_json
from . import ldm
from .dtypes import STORED, widened
from .folders import DIFFUSERS_NAME, NATIVE_NAME, PICKLES, CheckpointError, find_files, pickle_refusal
from .folders import listed as _listed
from .forms import identify
from .wrapping import unwrapped

_logger = logging.getLogger(__name__)


class TensorFile(Protocol):
    """What is asked of an open file: of safetensors' `safe_open`, and of `remote.RemoteFile`, which reads by ranges."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> Any: ...  # with get_shape()
    def metadata(self) -> dict[str, str] | None: ...


#: put beside 8-bit floats: the factor of a weight; of a layer's input, which matters in 8-bit products alone; a mark
_SCALES, _INPUT_SCALES = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
_TEXT = ".attn2.to_k.weight"  # of layers that attend to text
_PARTS = {
    "unet.": "UNet",
    "teacher.": "teacher's UNet",
    "vae.encoder.": "VAE encoder",
    "vae.decoder.": "VAE decoder",
    "timestep": "timestep",
    "prompt_embeds": "prompt",
    "heads.": "projection heads",
    "head.": "classifier",
    ldm.TEXT: "text encoder, not read",
    ldm.EMA: "EMA weights, not read",
}


def family(width: int, xl: bool = False) -> str:
    """The family of a UNet by the width of the text that it attends to."""
    name = "Stable Diffusion XL" if xl else {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(width)
    return (f"{name}, " if name else "") + f"text of width {width}"


# --- opening ----------------------------------------------------------------------------------------------------------


class Weights:
    """Tensors of one or more safetensors files under native names, read one at a time and only when asked for.

    Native names: `unet.*`, `vae.*`, `timestep`, `prompt_embeds`, `head.*` (a classifier), and from CompVis' full files
    also `teacher.*` and `heads.*` (projection heads).

    Attributes:
        label: where they come from, for messages.
        form: what was found, e.g. "CompVis full checkpoint".
        configs: of a diffusers folder, the JSON configs of its parts ("unet", "vae", "scheduler").
        metadata: of the first file.
    """

    def __init__(self, label: str | Path, form: str = ""):
        self.label, self.form = str(label), form
        self.configs: dict[str, dict] = {}
        self.metadata: dict[str, str] = {}
        self._where: dict[str, tuple[TensorFile, str]] = {}
        self._scales: dict[str, tuple[TensorFile, str]] = {}  # of 8-bit weights, by the weight's name

    def add(self, file: TensorFile, rename: Callable[[str], str | None] = str) -> Weights:
        """Takes in a file's tensors under the names that `rename` gives them; None leaves one out."""
        for inner in file.keys():  # noqa: SIM118 (no mapping)
            name = rename(inner)
            if name is None or name.endswith(_INPUT_SCALES) or name.split(".")[-1] == "scaled_fp8":
                continue
            scaled = next((name.removesuffix(end) + ".weight" for end in _SCALES if name.endswith(end)), None)
            (self._scales if scaled else self._where)[scaled or name] = file, inner
        self.metadata = self.metadata or dict(file.metadata() or {})
        return self

    def names(self) -> set[str]:
        return set(self._where)

    def files(self) -> list[TensorFile]:
        return list({id(file): file for file, _ in self._where.values()}.values())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def has(self, part: str) -> bool:
        """Whether there is anything under a name or prefix: "unet.", "vae.", "timestep", ..."""
        return any(name.startswith(part) for name in self._where)

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self._where[name]
        tensor = file.get_tensor(inner)
        if name in self._scales and tensor.dtype in STORED:
            scale_file, scale = self._scales[name]
            factor = scale_file.get_tensor(scale).float().flatten()  # of the whole weight, or one for each output
            if len(factor) not in (1, *tensor.shape[:1]):
                raise CheckpointError(f"{self.label}: {scale} has {len(factor)} numbers for {tuple(tensor.shape)}")
            tensor = tensor.float() * factor.reshape(-1, *[1] * (tensor.ndim - 1))
        if name.startswith("vae.") and ".attentions.0.to_" in name and tensor.ndim > 2:
            # The oldest VAE files have 1 x 1 convolutions here, and some of diffusers' converter biases of C x 1 x 1.
            return tensor[(..., *[0] * 2)]
        return tensor

    def dtype(self) -> torch.dtype | None:
        """The dtype that dtype="auto" means: the UNet's, or float16 for 8-bit floats, which a warning says."""
        first = "unet.conv_in.weight"
        if first not in self:
            return None
        # Those who store 8 bits often leave the first and last layers in 16.
        inner = next((name for name in self._where if name.startswith("unet.") and name.endswith(_TEXT)), first)
        stored, inside = (self._where[name][0].get_tensor(self._where[name][1]).dtype for name in (first, inner))
        found = widened(stored)
        if inside in STORED and inside.itemsize == 1:
            _logger.warning(
                f"{self.label} holds 8-bit weights ({inside}); they become {found}, in which models compute"
            )
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        file, inner = self._where[name]
        return tuple(file.get_slice(inner).get_shape())

    def put(self, other: Weights, *parts: str) -> Weights:
        """Takes over the tensors of another file under these names or prefixes, and their config."""
        self.configs |= {part: config for part, config in other.configs.items() if f"{part}." in parts}
        self._take(other, [name for name in other._where if name.startswith(parts)])
        return self

    def fill(self, other: Weights, names: Iterable[str]) -> Weights:
        """Takes over those of these tensors that another file has."""
        self._take(other, [name for name in names if name in other])
        return self

    def _take(self, other: Weights, names: Iterable[str]) -> None:
        for name in names:
            self._where[name] = other._where[name]
            self._scales.pop(name, None)
            if name in other._scales:
                self._scales[name] = other._scales[name]

    def drop(self, part: str) -> Weights:
        """Forgets the tensors under a prefix ("vae."), and their config."""
        self.configs.pop(part.rstrip("."), None)
        self._where = {name: where for name, where in self._where.items() if not name.startswith(part)}
        return self

    def latent_encoder(self) -> str | None:
        """The kind of the encoder held, as models call it: "default" (AutoencoderKL's), "tiny" (AutoencoderTiny's)."""
        if self.has("vae.encoder.layers."):
            return "tiny"
        return "default" if self.has("vae.encoder.") else None

    def teacher(self) -> Weights:
        """The same with the teacher in the place of the student.

        Raises:
            CheckpointError: no teacher is there.
        """
        if not self.has("teacher."):
            raise CheckpointError(f"{self.label} ({self.form}) holds no teacher, only {self.describe()}")
        other = Weights(self.label, self.form)
        other.configs, other.metadata = self.configs, self.metadata
        for own, taken in ((self._where, other._where), (self._scales, other._scales)):
            kept = {name: where for name, where in own.items() if not name.startswith(("unet.", "heads.", "timestep"))}
            taken |= {re.sub("^teacher\\.", "unet.", name): where for name, where in kept.items()}
        return other

    def describe(self) -> str:
        """What is there, in words: "UNet (686 tensors), VAE encoder (106), timestep"."""
        found = []
        for prefix, part in _PARTS.items():
            count = sum(name.startswith(prefix) for name in self._where)
            if count:
                found.append(part + (f" ({count} tensors)" if count > 1 else ""))
        return ", ".join(found)

    def unet_family(self) -> str | None:
        """The family of the UNet, or None if it has no attention to text to tell it by."""
        keys = [name for name in self._where if name.startswith("unet.") and name.endswith(_TEXT)]
        return family(self.shape(keys[0])[1], self.has("unet.add_embedding.")) if keys else None


def open_weights(path: str | Path) -> safe_open:
    """Opens a safetensors file for reading by key, without reading its tensors.

    Raises:
        CheckpointError: missing, a pickle (refused, never loaded), truncated, or not a safetensors file.
        FileError: the system cannot open it at the moment.
    """
    path = Path(path)
    if not is_file(path):
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        return open_tensors(path)
    except DamagedFileError as error:
        # Only now: a safetensors file may begin with the same bytes, they are the length of its header.
        with open(path, "rb") as file:
            head = file.read(2)
        if head == b"PK" or head[:1] == b"\x80":
            raise pickle_refusal(path) from None
        size, why = path.stat().st_size, error.__cause__
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({why}): download or convert it again"
        ) from error


def _config(folder: Path, name: str = "config.json") -> dict | None:
    path = folder / name
    try:
        return read_json(path) if path.is_file() else None
    except InputError as error:
        raise CheckpointError(f"{error}: get it again") from error


def open_checkpoint(path: str | Path) -> Weights:
    """Opens a file or folder of any of the forms above; `form` and `describe()` of the result say what was found.

    Raises:
        CheckpointError: nothing there, only pickle files, damaged, or of no known form.
    """
    path = Path(os.path.expanduser(path))
    if not is_folder(path):
        return open_files(path, [open_weights(path)])
    if (path / "unet").is_dir() or (path / "vae").is_dir():
        return _open_diffusers(path)
    for name in (NATIVE_NAME, DIFFUSERS_NAME):
        files = find_files(path, name)
        if files:
            weights = open_files(path, [open_weights(file) for file in files])
            config = _config(path) if name == DIFFUSERS_NAME else None
            if config:
                weights.configs["vae" if weights.has("vae.") else "unet"] = config
            return weights
    raise CheckpointError(f"{path} holds no {NATIVE_NAME}, {DIFFUSERS_NAME}, unet/ or vae/.{_pickles(path)}")


def _pickles(folder: Path) -> str:
    found = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
    return f" Pickle files ({_listed(found)}) are never loaded: convert them to safetensors." if found else ""


def open_files(label: str | Path, files: Iterable[TensorFile]) -> Weights:
    """Weights of files that belong together (shards of one checkpoint)."""
    files = list(files)
    names, beside = unwrapped((name for file in files for name in file.keys()), str(label))  # noqa: SIM118 (no mapping)
    form, rename = identify(set(names.values()), str(label))
    if beside:
        _logger.warning(f"{label}: {len(beside)} tensors beside the backbone's are left out: {_listed(beside, 3)}")
    weights = Weights(label, form)
    for file in files:
        weights.add(file, lambda name: rename(names[name]) if name in names else None)
    return weights


class _Memory:
    """Tensors in memory as a TensorFile. What is read are copies on the CPU: a model does not share them."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def keys(self) -> Iterable[str]:
        return self.state.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.state[name].detach().to("cpu", copy=True)

    def get_slice(self, name: str) -> Any:
        return SimpleNamespace(get_shape=lambda: self.state[name].shape)

    def metadata(self) -> None:
        return None


def open_state(state: Mapping[str, Tensor], label: str = "the state_dict given") -> Weights:
    """Weights in memory, under the names of any of the forms above.

    Raises:
        CheckpointError: not tensors by name, tensors on the meta device, or of no known form.
    """
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{label} must be a mapping of names to tensors that is not empty, got {type(state).__name__}"
        )
    wrong = [str(name) for name, tensor in state.items() if not isinstance(tensor, Tensor) or tensor.is_meta]
    if wrong:
        raise CheckpointError(
            f"{label} must hold tensors with values; {_listed(wrong, 3)} are none. Pass the part of a training "
            'checkpoint that holds the weights (checkpoint["state_dict"], checkpoint["model"])'
        )
    return open_files(label, [_Memory(state)])


def _open_diffusers(folder: Path) -> Weights:
    weights = Weights(folder, "diffusers folder")
    for part in ("unet", "vae"):
        files = find_files(folder / part, DIFFUSERS_NAME)
        if (folder / part).is_dir() and not files:
            raise CheckpointError(
                f"{folder} has no {part}/{DIFFUSERS_NAME}: is it a diffusers folder?{_pickles(folder / part)}"
            )
        if files:
            found = open_files(folder / part, [open_weights(file) for file in files])
            if not found.has(f"{part}."):
                raise CheckpointError(f"{folder / part} holds no {part}, but {found.describe()} ({found.form})")
            weights.put(found, f"{part}.")
            weights.metadata = weights.metadata or found.metadata
    for part, name in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        config = _config(folder / part, name)
        if config:
            weights.configs[part] = config
    return weights
