"""WebDataset shards on disk: which there are, and which of their files are pictures."""

from __future__ import annotations

import glob
from pathlib import Path

from .errors import DependencyError, InputError

SUFFIXES = ("jpg", "jpeg", "png", "webp")


def find_shards(path: str | Path) -> list[str]:
    """The .tar files of a folder, of a pattern ("shards/{0000..0009}.tar", "shards/*.tar"), or one file, sorted.

    Raises:
        ValueError: there are none. ImportError: webdataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DependencyError("shards need webdataset: pip install webdataset") from error
    path = str(path)
    if Path(path).is_dir():
        found = sorted(str(p) for p in Path(path).glob("*.tar"))
    elif any(sign in path for sign in "*?["):
        found = sorted(glob.glob(path))
    else:
        found = list(expand_urls(path))
    missing = [shard for shard in found if not Path(shard).is_file()]
    if missing or not found:
        raise InputError(
            f"no shard {missing[0]}" if missing else f"no .tar shards in {path}: give a folder or a pattern"
        )
    return found
