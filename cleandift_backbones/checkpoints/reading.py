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

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from . import ldm

NATIVE_NAME = "model.safetensors"
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"


class CheckpointError(InputError):
    """A weights file that cannot be used; the message names the file, what is wrong, and the remedy."""


class TensorFile(Protocol):
    """What is asked of an open file: of safetensors' `safe_open`, and of `hub.RemoteFile`, which reads by ranges."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> Any: ...  # with get_shape()
    def metadata(self) -> dict[str, str] | None: ...


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- names ------------------------------------------------------------------------------------------------------------

_FULL = {
    "unet_feature_extractor_cleandift.": "unet.",
    "unet_feature_extractor_base.": "teacher.",
    "ae.ae.": "vae.",
    "time_emb.": "heads.time_emb.",
    "time_in_proj.": "heads.time_in_proj.",
    "mapping.": "heads.mapping.",
    "adapters.": "heads.adapters.",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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


def _vae_name(name: str) -> str:
    """diffusers' present name of a VAE tensor that may carry the attention names of diffusers before 0.17."""
    return re.sub(
        r"(mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda m: m[1] + _OLD_ATTENTION[m[2]] + ".",
        name,
    )


def _full_name(name: str) -> str:
    for prefix, native in _FULL.items():
        if name.startswith(prefix):
            return _vae_name(native + name.removeprefix(prefix))
    return name


def _identify(names: set[str], label: str) -> tuple[str, Callable[[str], str]]:
    """(what a file with these keys is, the native name of each key).

    Raises:
        CheckpointError: none of the known forms.
    """

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any_starts("unet_feature_extractor_"):
        return "CompVis full checkpoint", _full_name
    if any_starts("unet.", "vae."):
        return "native checkpoint", str
    if any_starts("model.unet."):  # of a features_only model, which wraps the backbone
        return "native checkpoint", lambda name: name.removeprefix("model.")
    if "conv_in.weight" in names and any_starts("down_blocks."):
        return "UNet in diffusers' layout", lambda name: f"unet.{name}"
    if any("lora" in name.lower() for name in names):
        raise CheckpointError(
            f"{label} is a LoRA, not a whole model: merge it into its base model and save that, then pass the result"
        )
    foreign = ldm.foreign_family(names)
    if foreign is not None:
        raise CheckpointError(f"{label} is of {foreign}: the models here are of Stable Diffusion 1.x and 2.x")
    found = ldm.identify(names)
    if found is not None:
        return found
    if "encoder.conv_in.weight" in names:
        return "VAE in diffusers' layout", lambda name: f"vae.{_vae_name(name)}"
    if "encoder.layers.0.weight" in names:
        return "AutoencoderTiny in diffusers' layout", lambda name: f"vae.{name}"
    raise CheckpointError(
        f"{label} is no checkpoint of a form that this package knows (native vae.* and unet.*, CompVis unet or full, "
        f"diffusers' UNet, VAE or folder, LDM single file): it holds {_listed(names)}"
    )


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

    def add(self, file: TensorFile, rename: Callable[[str], str] = str) -> Weights:
        """Takes in a file's tensors under the names that `rename` gives them."""
        self._where.update((rename(name), (file, name)) for name in file.keys())  # noqa: SIM118 (no mapping)
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
        if name.startswith("vae.") and name.endswith(".weight") and ".attentions.0.to_" in name and tensor.ndim == 4:
            return tensor[:, :, 0, 0]  # the oldest VAE files have 1 x 1 convolutions here
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        file, inner = self._where[name]
        return tuple(file.get_slice(inner).get_shape())

    def put(self, other: Weights, *parts: str) -> Weights:
        """Takes over the tensors of another file under these names or prefixes, and their config."""
        self.configs |= {part: config for part, config in other.configs.items() if f"{part}." in parts}
        self._where.update((name, where) for name, where in other._where.items() if name.startswith(parts))
        return self

    def fill(self, other: Weights, names: Iterable[str]) -> Weights:
        """Takes over those of these tensors that another file has."""
        self._where.update((name, other._where[name]) for name in names if name in other)
        return self

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
        kept = {n: w for n, w in self._where.items() if not n.startswith(("unet.", "heads.", "timestep"))}
        other._where = {n.replace("teacher.", "unet.", 1) if n.startswith("teacher.") else n: kept[n] for n in kept}
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
        keys = [name for name in self._where if name.startswith("unet.") and name.endswith(".attn2.to_k.weight")]
        return family(self.shape(keys[0])[1], self.has("unet.add_embedding.")) if keys else None


PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def pickle_refusal(place: object) -> CheckpointError:
    return CheckpointError(
        f"{place} is a pickle file, which can run code when loaded: refused. Convert it to safetensors where you trust "
        "it (safetensors.torch.save_file), then pass that file"
    )


def open_weights(path: str | Path) -> safe_open:
    """Opens a safetensors file for reading by key, without reading its tensors.

    Raises:
        CheckpointError: missing, a pickle (refused, never loaded), truncated, or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        # Only now: a safetensors file may begin with the same bytes, they are the length of its header.
        with open(path, "rb") as file:
            head = file.read(2)
        if head == b"PK" or head[:1] == b"\x80":
            raise pickle_refusal(path) from None
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({error}): download or convert it again"
        ) from error


def shard_names(index: str | Path) -> list[str]:
    """The files that a `*.safetensors.index.json` names.

    Raises:
        CheckpointError: not such an index.
    """
    try:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error!r}): get it again") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names files outside its folder: {_listed(names)}")
    return names


def find_files(folder: Path, name: str) -> list[Path]:
    """The file `name` of a folder, its shards, or its 16-bit variant; [] if there is none."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if index.is_file():
        return [folder / shard for shard in shard_names(index)]
    variant = folder / name.replace(".safetensors", ".fp16.safetensors")
    return [variant] if variant.is_file() else []


def _config(folder: Path, name: str = "config.json") -> dict | None:
    path = folder / name
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): get it again") from error


def open_checkpoint(path: str | Path) -> Weights:
    """Opens a file or folder of any of the forms above; `form` and `describe()` of the result say what was found.

    Raises:
        CheckpointError: nothing there, only pickle files, damaged, or of no known form.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
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
    form, rename = _identify({name for file in files for name in file.keys()}, str(label))  # noqa: SIM118 (no mapping)
    weights = Weights(label, form)
    for file in files:
        weights.add(file, rename)
    return weights


def _open_diffusers(folder: Path) -> Weights:
    weights = Weights(folder, "diffusers folder")
    for part in ("unet", "vae"):
        files = find_files(folder / part, DIFFUSERS_NAME)
        if (folder / part).is_dir() and not files:
            raise CheckpointError(
                f"{folder} has no {part}/{DIFFUSERS_NAME}: is it a diffusers folder?{_pickles(folder / part)}"
            )
        rename = _vae_name if part == "vae" else str
        for file in files:
            weights.add(open_weights(file), lambda name, part=part, rename=rename: f"{part}.{rename(name)}")
    for part, name in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        config = _config(folder / part, name)
        if config:
            weights.configs[part] = config
    return weights


# --- fitting ----------------------------------------------------------------------------------------------------------


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
        dtype: of the result (default: that of `expected`, by name).

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
        if not tensor.is_floating_point():
            wrong.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
        if tensor.shape != like.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(like.shape)}")
        state[name] = tensor.to(dtype or like.dtype)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path} has unfit tensors: {'; '.join(wrong[:5])}{more}")
    return state
