#!/usr/bin/env python
"""Packs the images that the small models learn from into few, small files, for a machine with little disk or transfer.

Writes WebDataset shards of WebP images with their captions, compressed, at most --part-mb each:

    OUT/photos/train/0000.tar.gz    OUT/photos/heldout/0000.tar.gz    (NNNNNN.webp, NNNNNN.txt: the caption)
    OUT/emoji/train/0000.tar.gz     OUT/emoji/heldout/0000.tar.gz     (NNNNNN.webp, NNNNNN.json: a line of metadata)

tools/tiny/train_vae.py and tools/tiny/train_teacher.py read them with --photos "OUT/photos/train/*.tar.gz" --data
OUT/emoji, and tools/finetune.py with data.path="OUT/*/train/*.tar.gz". Images that are WebP of that size already are
copied unchanged. Equal inputs give equal bytes on one machine.

    python tools/tiny/pack_pictures.py --photos photos --photos-heldout heldout --data data/emoji --out packed
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    from PIL import Image

    from cleandift_backbones.data.captioned import sources_of, spread
    from cleandift_backbones.data.decoding import ImageError, opened, read_image
    from cleandift_backbones.data.listing import counted
    from cleandift_backbones.utils.atomic import leftovers, readable_size, replacing
    from cleandift_backbones.utils.errors import FileTakenError, InputError, file_errors
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.progress import tqdm
    from cleandift_backbones.utils.records import read_bytes

    sys.path.insert(0, str(Path(__file__).parents[2]))  # for those who run this file by its path

    from tools.tiny.arguments import above_zero, add_set_arguments
    from tools.tiny.emoji_folder import list_entries
    from tools.tiny.picture_sets import LONGEST, fit

HEADERS = 1024  # bytes that the tar format adds to a file at most


class Item(NamedTuple):
    """An image to pack: its name for messages, its file or bytes, its caption file's suffix and content."""

    name: str
    source: Path | bytes
    suffix: str
    caption: str
    transparent: bool


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for photos/ and emoji/")
    add("--size", type=above_zero(int), default=128, help="shorter side in pixels (default: 128)")
    add("--keep-aspect", action="store_true", help=f"keep photographs up to {LONGEST}:1 (default: the middle square)")
    add("--quality", type=int, default=90, help="of WebP that is encoded here; 100: lossless (default: 90)")
    add("--heldout", type=above_zero(int), metavar="N", help="at most N held-out images of each kind (default: all)")
    add("--part-mb", type=above_zero(float), default=60, help="largest file in MB of 1,000,000 bytes (default: 60)")
    options = parser.parse_args(arguments)
    if not options.photos and not options.photos_heldout and not options.data:
        raise InputError("nothing to pack: give --photos, --photos-heldout or --data")
    if not 1 <= options.quality <= 100:
        raise InputError(f"--quality {options.quality}: give a number from 1 to 100")
    return options


def encode(item: Item, size: int, longest: float, quality: int) -> tuple[bytes, bool]:
    """The image as WebP, shorter side `size`, longer side at most `longest` times that; whether it was so already.

    Raises:
        ImageError: it cannot be read.
    """
    data = item.source if isinstance(item.source, bytes) else read_bytes(item.source)
    if item.transparent:
        with opened(data, item.name) as image:
            image = image.convert("RGBA")
        fitted = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    else:
        image = read_image(data, min_side=1, name=item.name)
        fitted = fit(image, size, longest)
    if fitted is image and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data, True
    file = io.BytesIO()
    fitted.save(file, "WEBP", quality=quality, lossless=quality == 100)
    return file.getvalue(), False


class Parts:
    """Compressed shards 0000.tar.gz, 0001.tar.gz, ... of at most `most` bytes in a folder.

    Headers are fixed (no times, no users), so that equal files give equal bytes.
    """

    def __init__(self, folder: Path, most: float):
        self.folder, self.most, self.paths = folder, most, []
        self.file = self.packed = self.tar = None

    def add(self, files: dict[str, bytes]) -> None:
        """Files (name -> bytes) that stay together. Raises InputError if they alone are larger than a part."""
        needed = sum(len(data) + HEADERS for data in files.values()) + 2 * HEADERS  # at most, with the end's mark
        if self.tar is None or self.file.tell() + needed > self.most:
            self.close()
            if needed > self.most:
                raise InputError(f"one image with its caption takes {readable_size(needed)}: give a larger --part-mb")
            self.paths.append(self.folder / f"{len(self.paths):04}.tar.gz")
            self.file = self.paths[-1].open("wb")
            self.packed = gzip.GzipFile("", "wb", 6, self.file, mtime=0)
            self.tar = tarfile.open(fileobj=self.packed, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
        self.tar.members.clear()  # it would keep them all
        self.packed.flush()  # so that the size is known

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.packed.close()
            self.file.close()
            self.tar = None


def photographs(place: str, most: int | None) -> list[Item]:
    return [Item(p.name, p.source, ".txt", p.caption, False) for p in sources_of(place, most)]


def emoji(folder: Path, most: int | None) -> list[Item]:
    found = spread(list_entries(folder), most)
    return [Item(f"{folder / entry['file_name']}", source, ".json", json.dumps(entry), True) for entry, source in found]


def encoded(items: list[Item], options: argparse.Namespace) -> Iterator[tuple[bytes, bool] | ImageError]:
    """`encode` of each item in its order, or why it cannot be read."""

    def one(item: Item) -> tuple[bytes, bool] | ImageError:
        try:
            return work(item)
        except ImageError as error:
            return error

    longest = LONGEST if options.keep_aspect else 1.0
    work = partial(encode, size=options.size, longest=longest, quality=options.quality)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, items)


def write(items: list[Item], folder: Path, options: argparse.Namespace) -> str:
    """Writes the parts of one set; returns a sentence of what there is."""
    broken, unchanged, count = [], 0, 0
    for rest in leftovers(folder.parent, folder.name):  # of a process that was killed
        for path in rest.glob("*.tar.gz"):
            path.unlink()
        rest.rmdir()
    with replacing(folder) as aside:
        aside.mkdir()
        parts = Parts(aside, options.part_mb * 1e6)
        try:
            bar = tqdm(
                encoded(items, options), total=len(items), desc=f"{folder.parent.name} {folder.name}", unit="image"
            )
            for item, found in zip(items, bar, strict=True):
                if isinstance(found, ImageError):
                    broken.append(str(found))
                    continue
                data, same = found
                parts.add({f"{count:06}.webp": data, f"{count:06}{item.suffix}": item.caption.encode()})
                unchanged += same
                count += 1
        finally:
            parts.close()
        if not count:
            raise InputError(f"none of {counted(len(items), 'image')} can be read, e.g. {broken[0]}")
        sizes = [path.stat().st_size for path in parts.paths]
    for reason in broken:
        print(f"left out: {reason}", file=sys.stderr)
    kept = f", {unchanged:,} copied unchanged" * bool(unchanged)
    left = f", {len(broken):,} left out" * bool(broken)
    return (
        f"{folder}: {counted(count, 'image')}{kept}{left}, {readable_size(sum(sizes))} in "
        f"{counted(len(sizes), 'file')}, the largest {readable_size(max(sizes))}"
    )


@guard("sets that are complete are kept; remove them or give another --out to begin again")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with hold(options.out), file_errors(options.out):
        return pack(options)


def pack(options: argparse.Namespace) -> int:
    sets = {
        "photos/train": options.photos and partial(photographs, options.photos, None),
        "photos/heldout": options.photos_heldout and partial(photographs, options.photos_heldout, options.heldout),
        "emoji/train": options.data and partial(emoji, Path(options.data, "train"), None),
        "emoji/heldout": options.data and partial(emoji, Path(options.data, "heldout"), options.heldout),
    }
    sets = {options.out / name: items for name, items in sets.items() if items}
    if taken := next((folder for folder in sets if os.path.lexists(folder)), None):
        raise FileTakenError(f"{taken} exists: remove it, or give another --out")
    for folder, items in sets.items():
        print(write(items(), folder, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
