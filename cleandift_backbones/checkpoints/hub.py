"""From the Hugging Face Hub: where a file is, fetching it whole, or reading tensors of it by ranges."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors

from .. import checkpoints
from ..utils.atomic import exists
from ..utils.errors import FileError, MissingFileError
from . import NATIVE_NAME, CheckpointError, choose_file
from .folders import PICKLES, pickle_refusal

# --- where a file is --------------------------------------------------------------------------------------------------


class HubFile(NamedTuple):
    """A file, or with `path` "" a whole repository, on the Hub."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f"/{self.path}" if self.path else "")

    def join(self, path: str) -> HubFile:
        return self._replace(path=f"{self.path}/{path}" if self.path else path)


def parse_source(source: str | Path | HubFile) -> Path | HubFile:
    """A local path, or `OWNER/NAME[@REVISION][/PATH]` on the Hub (`hf://` may stand in front).

    What exists here is a path; so is what starts with `/`, `./`, `../` or `~`. A slash in a revision is written %2F.

    Raises:
        FileNotFoundError: neither an existing path nor of the Hub's form.
    """
    if isinstance(source, HubFile):
        return source
    text = str(source)
    path = Path(os.path.expanduser(text))  # Path.expanduser raises for a user that is not there
    if exists(path):
        return path
    match = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+?))?/?", text)
    if isinstance(source, Path) or text.startswith(("/", "./", "../", "~")) or match is None:
        raise MissingFileError(f"{text} is neither a file or folder here nor OWNER/NAME[@REVISION][/PATH] on the Hub")
    return HubFile(match[1], match[3] or "", unquote(match[2]) if match[2] else None)


# --- fetching ---------------------------------------------------------------------------------------------------------


def _explain(file: HubFile, error: Exception) -> str:
    """What an error of the Hub's client means for this file, in one line."""
    where = f"{file.repo}" + (f" at revision {file.revision}" if file.revision else "")
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{where} is gated: accept its terms on its page, then log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"{where} does not exist, or is private and you are not logged in (hf auth login, or HF_TOKEN); nor is "
            "there such a path here"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{file.repo} has no revision {file.revision!r}"
    if isinstance(error, hub_errors.RemoteEntryNotFoundError):
        return f"{where} has no file {file.path}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({first_line}): free some space, or set HF_HOME to another disk; it then goes on"
    if isinstance(error, (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError)):
        return "not in the cache, and the Hub cannot be reached"
    return first_line


class HubError(FileError):
    """A file on the Hub is unavailable; the message says why in one line."""


@contextmanager
def explained(file: HubFile) -> Iterator[None]:
    """Turns the errors of the Hub's client into a HubError of one line that names the file and the remedy."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        # The client raises its own errors, httpx's (requests' before 1.0) and OSErrors.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        raise HubError(f"{file}: {_explain(file, error)}") from error


def cached(file: HubFile, cache_dir: str | Path | None = None) -> Path | None:
    """Where the file lies in the Hub's cache, or None."""
    found = try_to_load_from_cache(file.repo, file.path, cache_dir=cache_dir, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def check(file: HubFile, cache_dir: str | Path | None = None) -> None:
    """Asks for a file's metadata only.

    Raises:
        HubError: it is not cached, and unavailable.
    """
    if cached(file, cache_dir) is None:
        with explained(file):
            get_hf_file_metadata(hf_hub_url(file.repo, file.path, revision=file.revision))


def fetch(file: HubFile, cache_dir: str | Path | None = None) -> Path:
    """The file's place in the Hub's cache, downloaded (and resumed) if need be; a new download is checked.

    Raises:
        HubError: unavailable, or its SHA-256 is not the one that the Hub names (it is then removed).
    """
    with explained(file):
        before = cached(file, cache_dir)
        path = Path(hf_hub_download(file.repo, file.path, revision=file.revision, cache_dir=cache_dir))
    if before is None or before.resolve() != path.resolve():
        blob = path.resolve()  # the cache names the blobs of large files by their SHA-256
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise HubError(
                f"{file}: the download is damaged (its SHA-256 is not {blob.name}) and was removed: try again"
            )
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def list_files(place: HubFile, cache_dir: str | Path | None = None) -> set[str]:
    """Names of the files in a folder of a repository; without a network, of those that the cache holds.

    Raises:
        HubError: neither the Hub nor the cache knows it.
    """
    with explained(place):
        try:
            names = HfApi().list_repo_files(place.repo, revision=place.revision)
        except Exception:
            options = dict(revision=place.revision, cache_dir=cache_dir, local_files_only=True)
            with suppress(hub_errors.LocalEntryNotFoundError):
                folder = Path(snapshot_download(place.repo, **options), place.path)
                return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            raise
    prefix = f"{place.path}/" if place.path else ""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def fetch_checkpoint(source: str | Path | HubFile, cache_dir: str | Path | None = None) -> Path:
    """A local file or folder for `checkpoints.open_checkpoint`: of a path, or of anything on the Hub.

    A repository may be a native folder (one file or shards) or one in diffusers' layout; only UNet and VAE are fetched.

    Raises:
        FileNotFoundError: no such path, and not of the Hub's form.
        HubError: unavailable. CheckpointError: a pickle file.
    """
    place = parse_source(source)
    if isinstance(place, Path):
        return place
    if place.path.endswith(".safetensors"):
        return fetch(place, cache_dir)
    if place.path.endswith(PICKLES):
        raise pickle_refusal(place)
    names = list_files(place, cache_dir)
    folder = None
    for stem in (
        NATIVE_NAME,
        checkpoints.DIFFUSERS_NAME,
        *(f"{p}/{checkpoints.DIFFUSERS_NAME}" for p in ("unet", "vae")),
    ):
        beside = str(Path(stem).parent)
        try:
            chosen = choose_file([Path(n).name for n in names if str(Path(n).parent) == beside], Path(stem).name)
        except CheckpointError as error:
            raise CheckpointError(f"{place}: {error}") from None
        if chosen is None:
            continue
        name = str(Path(stem).with_name(chosen[0]))
        path = fetch(place.join(name), cache_dir)
        if name.endswith(".json"):
            for shard in checkpoints.shard_names(path):
                fetch(place.join(str(Path(name).with_name(shard))), cache_dir)
        for config in (str(Path(name).with_name("config.json")), "scheduler/scheduler_config.json"):
            if config in names:
                fetch(place.join(config), cache_dir)
        folder = path.parents[len(Path(name).parts) - 1]
        if stem == NATIVE_NAME:
            break
    if folder is None:
        raise HubError(f"{place} holds no {NATIVE_NAME}, {checkpoints.DIFFUSERS_NAME}, unet/ or vae/")
    return folder
