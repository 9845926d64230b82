"""The folders of emoji that make_pictures.py and pack_pictures.py write: their tables, their images, contact sheets."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cleandift_backbones.data.compositing import rgba_tensor
from cleandift_backbones.data.decoding import opened
from cleandift_backbones.data.listing import list_names
from cleandift_backbones.data.shards import TAR_ENDINGS, open_shard, read_member, scan
from cleandift_backbones.utils.atomic import is_file, is_folder
from cleandift_backbones.utils.errors import InputError, MissingFileError, file_errors
from cleandift_backbones.utils.progress import tqdm
from cleandift_backbones.utils.records import read_records

METADATA_KEYS = ("file_name", "text", "style", "concept", "subgroup")


def list_entries(folder: str | os.PathLike) -> list[tuple[dict, Path | bytes]]:
    """The images of a split folder, not decoded: (line of the table as a dict, path or bytes of the image).

    The folder holds metadata.jsonl and the images that it names, or the shards of tools/tiny/pack_pictures.py, which
    are read into memory.

    Raises:
        MissingFileError: the folder, its table or shards, or images are missing (the first few are named).
        InputError: an unreadable line, one without a key of METADATA_KEYS, a damaged shard.
    """
    folder = Path(folder)
    table, found = folder / "metadata.jsonl", []
    shards = list_names(folder, TAR_ENDINGS) if is_folder(folder) and not is_file(table) else []
    if not is_file(table) and not shards:
        raise MissingFileError(
            f"{table} is missing: make the pictures first (tools/tiny/make_pictures.py), or fix the folder"
        )
    if shards:
        found = [pair for path in shards for pair in _packed_entries(path)]
        if not found:
            raise InputError(f"{folder}: its shards hold no pictures; pack them again")
        return found
    for number, entry in read_records(table):
        _check_entry(entry, f"{table}, line {number}")
        found.append((entry, folder / entry["file_name"]))
    if not found:
        raise InputError(f"{table} names no pictures: make the pictures again")
    absent = [entry["file_name"] for entry, path in found if not os.path.isfile(path)]
    if absent:
        raise MissingFileError(f"{len(absent)} of {len(found)} pictures of {table} are missing, first {absent[:3]}")
    return found


def _packed_entries(path: str) -> Iterator[tuple[dict, bytes]]:
    shard = scan(path)
    if shard.damage:
        raise InputError(shard.damage)
    with file_errors(path), open_shard(path) as file:
        for sample in shard.samples:
            name = f"{path}:{sample.key}"
            beside = [member for member in sample.captions if member.name.endswith(".json")]
            data = read_member(file, sample.image)
            try:
                entry = json.loads(read_member(file, beside[0])) if beside else {}
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}: no JSON ({error}); pack the pictures again") from None
            _check_entry(entry if isinstance(entry, dict) else {}, name)
            yield entry, data


def _check_entry(entry: dict, name: str) -> None:
    if missing := [key for key in METADATA_KEYS if not isinstance(entry.get(key), str)]:
        raise InputError(f"{name} has no {', '.join(missing)}: make the pictures again")


def load_pictures(folder: str | os.PathLike, size: int | None = None, threads: int = 8) -> tuple[Tensor, list[dict]]:
    """A split folder -> uint8 N x 4 x S x S (straight alpha) and the table's lines as dicts.

    Args:
        folder: see `list_entries`.
        size: resize every picture to this side in pixels; None keeps them and demands equally large squares.
        threads: how many pictures are decoded at a time.

    Raises:
        MissingFileError: the folder, its table or shards, or pictures are missing (the first few are named).
        InputError: an unreadable line or picture, a line without one of its keys, or a size that differs.
    """
    found, folder = list_entries(folder), Path(folder)

    def read(pair: tuple[dict, Path | bytes]) -> Tensor:
        with opened(pair[1], str(folder / pair[0]["file_name"])) as image:
            return rgba_tensor(image.convert("RGBA"), size)

    with ThreadPoolExecutor(threads) as pool:
        pictures = list(tqdm(pool.map(read, found), total=len(found), desc=f"reading {folder.name}", unit="picture"))
    side, lines = pictures[0].shape[-1], [entry for entry, _ in found]
    for entry, picture in zip(lines, pictures, strict=True):
        if picture.shape != (4, side, side):
            raise InputError(
                f"{folder / entry['file_name']} is {picture.shape[2]} x {picture.shape[1]} pixels, not {side} x "
                f"{side}: give a size to resize to"
            )
    return torch.stack(pictures), lines


def contact_sheet(pictures: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Pictures B x 3 x H x W in [-1, 1] laid out row by row on one white sheet."""
    array = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = array.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(array):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)
