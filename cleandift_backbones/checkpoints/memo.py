"""Tensors that depend on files of the Hub, computed once and kept in the Hub's folder for assets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import (
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..utils.atomic import replacing
from .hub import HubError, HubFile, explained

_logger = logging.getLogger(__name__)


def commit_of(file: HubFile, cache_dir: str | Path | None = None) -> str:
    """The commit that a file's revision stands for now, or else the file's ETag, or ""; without a network, the commit
    that the cache knows.

    Raises:
        HubError: neither the Hub nor the cache knows.
    """
    with explained(file):
        try:
            meta = get_hf_file_metadata(hf_hub_url(file.repo, file.path, revision=file.revision))
            return meta.commit_hash or meta.etag or ""  # mirrors leave the first out
        except Exception:
            folder = Path(cache_dir or constants.HF_HUB_CACHE, f"models--{file.repo.replace('/', '--')}")
            known = folder / "refs" / (file.revision or "main")
            if known.is_file():
                return known.read_text().strip()
            if file.revision and (folder / "snapshots" / file.revision).is_dir():
                return file.revision
            raise


def _kept(key: str, cache_dir: str | Path | None) -> Path:
    folder = cached_assets_path("cleandift_backbones", assets_dir=Path(cache_dir, "assets") if cache_dir else None)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def recall(key: str, cache_dir: str | Path | None = None) -> Tensor | None:
    """The tensor that `remember` kept under this key, or None."""
    try:
        with safe_open(_kept(key, cache_dir), "pt") as file:
            return file.get_tensor("tensor") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None


def remember(key: str, compute: Callable[[], Tensor], cache_dir: str | Path | None = None) -> Tensor:
    """The tensor kept under this key in the Hub's folder for assets; computed and kept if there is none."""
    tensor = recall(key, cache_dir)
    if tensor is None:
        tensor = compute()
        _keep(key, tensor, cache_dir)
    return tensor


def remember_of(what: str, file: HubFile, compute: Callable[[], Tensor], cache_dir: str | Path | None = None) -> Tensor:
    """The same for something that depends on a file on the Hub: kept for the commit that its revision stands for.

    Without a network it is what was kept last.

    Raises:
        HubError: the Hub cannot be reached, and nothing was kept.
    """
    last = f"{what} of {file}"
    try:
        commit = commit_of(file, cache_dir)
    except HubError:
        tensor = recall(last, cache_dir)
        if tensor is None:
            raise
        return tensor

    def compute_and_keep() -> Tensor:
        tensor = compute()
        _keep(last, tensor, cache_dir)
        return tensor

    # Where nobody says which version this is, what was kept may be of another one.
    return remember(f"{last} at {commit}", compute_and_keep, cache_dir) if commit else compute_and_keep()


def _keep(key: str, tensor: Tensor, cache_dir: str | Path | None) -> None:
    try:
        with replacing(_kept(key, cache_dir)) as aside:
            save_file({"tensor": tensor.contiguous()}, aside, {"key": key})
    except (OSError, SafetensorError) as error:  # a cache that cannot be written is no reason to stop
        _logger.warning(f"{key} is not kept ({error}): it will be computed again")
