"""To the Hugging Face Hub: a model or a native folder becomes a repository that timm loads with one line."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .. import checkpoints
from ..checkpoints import CheckpointError
from ..checkpoints.hub import HubError, HubFile, explained
from ..models.architectures import spec_of
from ..models.last_map import trained_last_map
from ..utils.errors import CleanDIFTError, InputError
from ..utils.records import read_json
from ..version import __version__

if TYPE_CHECKING:
    from torch import nn
from .card import PLACEHOLDER, CardInfo, map_phrases, save_folder


def _check_folder(folder: Path) -> str:
    """The architecture of a native folder that is whole.

    Raises:
        CheckpointError: it is not, or its weights are damaged.
    """
    try:
        name = str(read_json(folder / "config.json")["architecture"])
    except (CleanDIFTError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no native folder ({error}): make one with `cleandift convert SOURCE --out FOLDER`"
        ) from error
    if not timm.is_model(name) or "cleandift_backbones" not in timm.model_entrypoint(name).__module__:
        raise CheckpointError(f"{folder}/config.json names the architecture {name!r}, which is not one of this package")
    form = checkpoints.open_checkpoint(folder).form
    if form != "native checkpoint":
        raise CheckpointError(
            f"{folder} holds a {form}: make a native folder with `cleandift convert {folder} --out FOLDER`"
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
    config = {"model_args": {}, **read_json(folder / "config.json")}
    infos = spec_of(config["architecture"]).arch.denoiser.maps()
    last, arguments = trained_last_map(checkpoints.open_checkpoint(folder), infos), dict(config["model_args"])
    claimed = arguments.pop("held", infos[-1].name)
    if last is None or claimed == last:
        return {}
    right = {**config, "model_args": ({} if last == infos[-1].name else {"held": last}) | arguments}
    corrected = {"config.json": json.dumps(right, indent=2) + "\n"}
    card = folder / "README.md"
    if card.is_file():
        corrected["README.md"] = card.read_text(encoding="utf-8")
        for wrong, phrase in zip(map_phrases(config), map_phrases(right)):
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
        ValueError: not a repository's name. hub.HubError: nobody is logged in.
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
        hub.HubError: no token, no right to write, no network.
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
