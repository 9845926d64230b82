"""`cleandift version`: what a report of a fault should name. Loads no PyTorch."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .. import configs
from ..utils.guard import guard
from ..version import __version__
from .arguments import command_parser

PACKAGES = ("torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "safetensors")
EXAMPLES = [("", "what to write into a report"), ("--json", "the same for a program")]


@guard("nothing was written")
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints versions. See `utils.guard.guard` for exit codes."""
    options = parser().parse_args(arguments)
    found = {"cleandift_backbones": __version__, "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {"device": device(), "package": str(Path(__file__).parents[1]), "configs": str(configs.FOLDER)}
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {value or 'not installed'}" for name, value in found.items()))
    return 0


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("version", EXAMPLES)
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device() -> str:
    """The device that `--device auto` takes, asked of the GPU's driver, as importing PyTorch takes seconds."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"cpu, {threads} cores"
    spec = find_spec("torch")
    built: dict[str, object] = {}
    with suppress(OSError, AttributeError, TypeError):  # torch/version.py of an installation that is no plain folder
        exec(Path(spec.origin).with_name("version.py").read_text(), built)
    if not built.get("cuda"):
        return cpu
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value:
            driver.cuDeviceGetName(name, len(name), 0)
            more = f" and {count.value - 1} more" if count.value > 1 else ""
            return f"cuda ({built['cuda']}), {name.value.decode(errors='replace')}{more}"
    return f"{cpu}; this PyTorch is built for CUDA {built['cuda']}, but no GPU was found"


if __name__ == "__main__":
    sys.exit(main())
