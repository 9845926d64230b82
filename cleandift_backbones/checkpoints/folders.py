"""Which files of a folder, here or on the Hub, hold weights: one file, shards, or a variant (diffusers' `variant=`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..utils.errors import InputError
from ..utils.records import read_json

NATIVE_NAME = "model.safetensors"
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_PREFERRED = (None, "fp16", "bf16", "fp32")  # variants of the same weights; others ("ema") are other weights


class CheckpointError(InputError):
    """A weights file that cannot be used; the message names the file, what is wrong, and the remedy."""


def pickle_refusal(place: object) -> CheckpointError:
    return CheckpointError(
        f"{place} is a pickle file, which can run code when loaded: refused. Convert it to safetensors where you trust "
        "it (safetensors.torch.save_file), then pass that file"
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names of some, sorted, and how many there are."""
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def choose_file(names: Iterable[str], name: str) -> tuple[str, str | None] | None:
    """The file, or index of shards, that holds the weights called `name` in a folder.

    diffusers and transformers put a variant's name in front of a file's last suffix (`model.fp16.safetensors`,
    `model.safetensors.index.fp16.json`, with shards `model.fp16-00001-of-00002.safetensors`), older diffusers an
    index's elsewhere (`model.safetensors.fp16.index.json`).

    Args:
        names: of the folder's files.
        name: NATIVE_NAME or DIFFUSERS_NAME.

    Returns:
        (file, variant): the file without a variant if there is one, else fp16, bf16, fp32, else the only variant. None
        if there is nothing.

    Raises:
        CheckpointError: several variants of other names.
    """
    stem = re.escape(name.removesuffix(".safetensors"))
    pattern = rf"{stem}(\.[^.]+)?\.safetensors|{stem}\.safetensors(\.[^.]+)?\.index(\.[^.]+)?\.json"
    found: dict[str | None, str] = {}
    for file in sorted(names, reverse=True):  # so that a whole file comes after an index, and replaces it
        match = re.fullmatch(pattern, file)
        if match and not re.search(r"-\d+-of-\d+\.", file):
            variant = next((group.removeprefix(".") for group in match.groups() if group), None)
            found[variant] = file
    variant = next((variant for variant in (*_PREFERRED, *found) if variant in found), None)
    if variant not in (*_PREFERRED, None) and len(found) > 1:
        raise CheckpointError(f"several variants are there, {listed(found.values())}: pass the path of one file")
    return (found[variant], variant) if found else None


def shard_names(index: str | Path) -> list[str]:
    """The files that a `*.safetensors.index.json` names.

    Raises:
        CheckpointError: not such an index.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error!r}): get it again") from error
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {listed(outside)}")
    return names


def find_files(folder: Path, name: str) -> list[Path]:
    """The files of a folder that hold the weights called `name`, see `choose_file`; [] if there are none.

    Raises:
        CheckpointError: several variants; an index that is none, or that names shards that are not there.
    """
    if not folder.is_dir():
        return []
    try:
        chosen = choose_file((path.name for path in folder.iterdir() if path.is_file()), name)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if chosen is None:
        return []
    file = folder / chosen[0]
    if file.suffix != ".json":
        return [file]
    shards = [folder / shard for shard in shard_names(file)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{file} names {len(shards)} files, of which {listed(missing)} {'are' if missing[1:] else 'is'} missing: "
            "get the whole folder again"
        )
    return shards
