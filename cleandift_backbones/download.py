"""From the Hugging Face Hub: where a file is, fetching it whole, or reading tensors of it by ranges."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from . import checkpoints
from .checkpoints import NATIVE_NAME, CheckpointError, choose_file
from .checkpoints.folders import PICKLES, pickle_refusal
from .errors import FileError, MissingFileError
from .files import exists, replacing

_logger = logging.getLogger(__name__)

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
    """A file on the Hub cannot be had; the message says why in one line."""


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
        HubError: it is neither cached nor to be had.
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


class NoRanges(HubError):
    """A server that sends files only whole."""


class RemoteFile:
    """A safetensors file on the Hub, read by HTTP ranges: the header first, then only the tensors asked for.

    The interface is that of safetensors' `safe_open`.

    Raises:
        HubError: the file is not to be had, or the server does not serve ranges.
        CheckpointError: not a safetensors file.
    """

    def __init__(self, file: HubFile):
        self.file = file
        with explained(file):
            url = hf_hub_url(file.repo, file.path, revision=file.revision)
            meta = get_hf_file_metadata(url)
        self.size, self.commit = meta.size, meta.commit_hash  # None where the server does not say
        # All ranges come from one commit, whatever happens to the branch meanwhile.
        self._url = hf_hub_url(file.repo, file.path, revision=self.commit or file.revision)
        (length,) = struct.unpack("<Q", self._read(0, 8))
        most = 100 << 20
        if not 2 <= length <= (most if self.size is None else min(self.size - 8, most)):
            raise CheckpointError(f"{file} ({self.size or 'unknown number of'} bytes) is not a safetensors file")
        try:
            header = json.loads(self._read(8, 8 + length))
        except ValueError as error:
            raise CheckpointError(f"{file} is not a safetensors file ({error})") from error
        self._start = 8 + length
        self._metadata = header.pop("__metadata__", None)
        self._entries: dict[str, dict] = header

    def _read(self, begin: int, end: int) -> bytes:
        with explained(self.file):
            headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
            with http_stream_backoff("GET", self._url, headers=headers) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:  # the whole file would come
                    raise NoRanges(f"{self.file}: the server does not serve ranges of it; download the file whole")
                total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
                self.size = int(total[1]) if total else self.size  # of this file, whatever HEAD said
                data = response.read()
        if len(data) != end - begin:
            raise HubError(f"{self.file}: the server sent {len(data)} bytes for a range of {end - begin}")
        return data

    def keys(self) -> list[str]:
        return list(self._entries)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_slice(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(get_shape=lambda: self._entries[name]["shape"])

    def get_tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        # safetensors itself turns bytes into tensors: a file of this one tensor.
        header = json.dumps({name: {**entry, "data_offsets": [0, end - begin]}}).encode()
        data = self._read(self._start + begin, self._start + end) if end > begin else b""
        return load(struct.pack("<Q", len(header)) + header + data)[name]
