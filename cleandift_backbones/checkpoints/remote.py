"""A safetensors file on the Hub, read by HTTP ranges."""

from __future__ import annotations

import json
import re
import struct
from types import SimpleNamespace

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from safetensors.torch import load
from torch import Tensor

from . import CheckpointError
from .hub import HubError, HubFile, explained


class NoRanges(HubError):
    """A server that sends files only whole."""


class RemoteFile:
    """A safetensors file on the Hub, read by HTTP ranges: the header first, then only the tensors asked for.

    The interface is that of safetensors' `safe_open`.

    Raises:
        HubError: the file is unavailable, or the server does not serve ranges.
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
