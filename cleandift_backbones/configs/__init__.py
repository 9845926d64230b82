"""Ready configs: finetune/ for `cleandift finetune`, mmseg/ and mmdet/ for mmengine.

    from cleandift_backbones import configs
    configs.find("mmseg/linear_cleandift-tiny_1xb8-500_scenes.py")  # path of the file
    configs.find("finetune/cleandift_tiny")

In a checkout they lie in configs/ at the root, in an installed package beside this file.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ..utils.errors import MissingFileError

__all__ = ["FOLDER", "find", "names"]

SUFFIXES = (".yaml", ".py")
_HERE = Path(__file__).parent
#: the folder of all ready configs
FOLDER = _HERE if (_HERE / "finetune").is_dir() else _HERE.parents[1] / "configs"


def names(folder: str = "") -> list[str]:
    """Names of the configs below a folder, without suffix: "finetune/cleandift_tiny", "mmseg/linear_...", sorted.

    Args:
        folder: one of "finetune", "mmseg", "mmdet"; "": all. What others are based on (`_base_`) is left out.
    """
    files = (path.relative_to(FOLDER) for path in (FOLDER / folder).rglob("*") if path.suffix in SUFFIXES)
    return sorted(
        path.with_suffix("").as_posix() for path in files if len(path.parts) > 1 and "_base_" not in path.parts
    )


def find(name: str) -> Path:
    """The path of a config.

    Args:
        name: relative to the folder of configs, with or without suffix, e.g. "finetune/cleandift_tiny".

    Raises:
        MissingFileError: there is none of this name; the message gives the nearest.
    """
    for suffix in ("", *SUFFIXES):
        path = FOLDER / f"{name}{suffix}"
        if path.is_file() and path.suffix in SUFFIXES:
            return path
    near = get_close_matches(str(Path(name).with_suffix("")), names(), 1)
    raise MissingFileError(
        f"there is no config {name}; " + (f"did you mean {near[0]}?" if near else f"{FOLDER} holds all")
    )
