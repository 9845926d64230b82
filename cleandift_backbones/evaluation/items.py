"""Images, masks and depth maps of data sets: what the readers of layouts have in common."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import decoding
from ..data.decoding import ImageError, opened
from ..data.listing import expand, is_hidden, list_names
from ..data.shards import TAR_ENDINGS, Shard, check_places, find_shards, scan
from ..data.sources import ImageSource, file_source, list_sources, shard_sources
from ..utils.atomic import is_file, is_folder
from ..utils.errors import CleanDIFTError, InputError, file_errors
from ..utils.progress import tqdm
from ..utils.records import read_records, read_text, split_lines
from .task import limited


class DataError(InputError):
    """A data set that cannot be used; the message says what was expected, what was found, and what to do."""


@dataclass(frozen=True)
class SizedSource(ImageSource):
    """An image whose annotation says its (height, width), which is checked when it is read."""

    annotated: tuple[int, int] = (0, 0)

    def read(self) -> Image.Image:
        image = super().read()
        if (image.height, image.width) != self.annotated:
            height, width = self.annotated
            found = f"{image.width}x{image.height} pixels, but its annotation says {width}x{height}"
            raise ImageError(f"{self.path}: {found}; use the data set's own files")
        return image


def sized_source(path: Path, root: Path, caption: str, size: tuple[int, int]) -> SizedSource:
    """`sources.file_source` with the size that its annotation says."""
    found = file_source(path, root, caption)
    return SizedSource(found.key, found.path, caption=caption, annotated=tuple(size))


def folders_in(folder: str | os.PathLike) -> list[str]:
    """Names of the folders right in a folder, sorted; without hidden ones."""
    with file_errors(folder, "cannot be listed", "check the path"):
        return sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not is_hidden(path.name))


def holds_shards(place: str | os.PathLike) -> bool:
    """Whether a path or pattern stands for WebDataset shards.

    These are .tar files and patterns, and folders of .tar files. In a folder with folders in it, which may be those of
    classes, .tar files do not count.
    """
    if is_folder(place):
        return not folders_in(place) and bool(list_names(place, ".tar"))
    text = os.fspath(place)
    return text.lower().endswith(TAR_ENDINGS) or expand(text) != [text]


def shard_images(
    place: str | os.PathLike, root: Path | None = None, labels: bool = True
) -> Iterator[tuple[Shard, list[ImageSource]]]:
    """The images of WebDataset shards (`shards.find_shards`): each shard with its images.

    Args:
        place: a shard, a folder of shards, or a pattern.
        root: keys are SHARD:KEY, with the shard's path below this folder; None: below what the shards share.
        labels: read them too.

    Raises:
        InputError: no shards there, a compressed one, a label that is neither text nor a whole number.
        DataError: a damaged shard, because numbers of a part of a data set are no numbers of it; two images of one key.
    """
    shards = find_shards(place)
    root = root or Path(os.path.commonpath([os.path.dirname(path) for path in shards]))
    for path in tqdm(shards, desc="listing", unit="shard", disable=len(shards) < 50):
        shard, name = scan(path), Path(path)
        if shard.damage:
            raise DataError(shard.damage)
        check_places(shard)
        twice = [key for key, count in Counter(sample.key for sample in shard.samples).items() if count > 1]
        if twice:
            raise DataError(f"{path}: two images have the key {twice[0]!r}; give each file in it a name of its own")
        name = name.relative_to(root) if name.is_relative_to(root) else name
        yield shard, shard_sources(shard, f"{name.as_posix()}:", labels=labels)


def list_images(place: str | os.PathLike, left_out: Counter[str]) -> list[ImageSource]:
    """All images of a folder, of shards or of a list (`sources.list_sources`), without labels.

    Args:
        place: where they are.
        left_out: counts the files that are no images.

    Raises:
        DataError: a damaged shard, or a folder that cannot be read: numbers of a part of a data set are no numbers of
            it. SourceError: see `list_sources`.
    """
    if holds_shards(place):
        found = list(shard_images(place, labels=False))
        left_out.update(sum((shard.left_out for shard, _ in found), Counter()))
        return [image for _, images in found for image in images]
    images, notes = list_sources(place, left_out=left_out)
    if notes:
        raise DataError(notes[0])
    return images


def require(files: Iterable[tuple[Path, object]], what: str, layout: str) -> None:
    """Raises DataError if files are missing: names the first with what lists it, and how many of how many.

    Args:
        files: (path, what lists it: a file, or a line or an entry of one), a path once or more.
        what: the kind of the files, in the plural.
        layout: what the data set looks like.
    """
    listed: dict[Path, object] = {}
    for path, source in files:
        listed.setdefault(path, source)
    missing = [path for path in listed if not os.path.isfile(path)]  # False, too, for a name that is too long
    if missing:
        raise DataError(
            f"{len(missing)} of {len(listed)} {what} are missing, first {missing[0]}, listed in {listed[missing[0]]}; "
            f"expected {layout}"
        )


def require_folder(root: str | os.PathLike, parts: Sequence[str], layout: str) -> Path:
    """The folder as a Path; DataError, which tells what is there instead, unless it holds all parts."""
    root = Path(root)
    if not is_folder(root):
        raise DataError(f"{root} is no folder; expected {layout}")
    lacking = [part for part in parts if not (root / part).exists()]
    if lacking:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataError(f"{root} has no {' and no '.join(lacking)} (found {found}); expected {layout}")
    return root


def read_lines(path: Path, layout: str) -> list[str]:
    """The lines of a split file that are not empty; DataError if it is missing or has none."""
    if not is_file(path):
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.*"))[:8]) if path.parent.is_dir() else ""
        raise DataError(f"split file {path} is missing (found {there or 'nothing'} there); expected {layout}")
    try:
        lines = [line.strip() for line in split_lines(read_text(path)) if line.strip()]
    except CleanDIFTError as error:
        raise DataError(f"{error}; expected {layout}") from None
    if not lines:
        raise DataError(f"split file {path} is empty; expected {layout}")
    return lines


def read_table(path: Path, columns: Sequence[str], layout: str) -> list[dict[str, str]]:
    """The lines of a CSV file by its header; DataError unless every line has all `columns`, and all of the header's."""
    try:
        found = list(read_records(path))
    except CleanDIFTError as error:
        raise DataError(f"{error}; expected {layout}") from None
    if not found:
        raise DataError(f"{path} has no lines; expected {layout}")
    header = [name for name in found[0][1] if name is not None]  # None: of a line with too much in it
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise DataError(f"{path} has no column {', '.join(lacking)} (found {', '.join(header)}); expected {layout}")
    for number, line in found:
        short = [name for name in header if line[name] is None or (name in columns and not line[name].strip())]
        if short:
            raise DataError(f"{path}, line {number}: nothing in column {short[0]}; expected {layout}")
    return [line for _, line in found]


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) that `read_image` gives, from the file's header. Raises DataError for what is no picture."""
    try:
        return decoding.image_size(path)
    except ImageError as error:
        raise DataError(f"not a picture: {error}") from None


def read_target(path: Path, what: str) -> tuple[str, np.ndarray]:
    """A mask or depth map as stored: Pillow's mode and the pixels. Raises DataError if it cannot be decoded."""
    try:
        with opened(path) as image:
            return image.mode, np.asarray(image)
    except ImageError as error:
        raise DataError(f"the {what} cannot be read: {error}") from None


def check_answers(
    files: Sequence[tuple[Path, Path]], what: str, reads: Sequence[Callable[[], object]] | None = None
) -> None:
    """Headers and checksums of masks or depth maps: what long work would find at its end.

    Args:
        files: image and mask or depth map.
        what: their name.
        reads: of each file the call that decodes it and checks its values; None: nothing is decoded.

    Raises:
        DataError: damaged ones, or of another size than their picture: the first, and how many of how many.
    """
    bad = []
    bar = tqdm(files, desc=f"checking {what}", unit="file", leave=False, disable=len(files) < 1000)
    for number, (picture, answer) in enumerate(bar):
        try:
            with opened(answer, load=False) as image:
                size = image.size[::-1]
                image.verify()
        except ImageError as error:
            bad.append(f"{error}")
            continue
        if size != (wanted := picture_size(picture)):
            bad.append(f"{answer}: {size[1]}x{size[0]} pixels, but its picture has {wanted[1]}x{wanted[0]}")
        elif reads:
            try:
                reads[number]()
            except DataError as error:
                bad.append(str(error))
    if bad:
        raise DataError(f"{len(bad)} of {len(files)} {what} cannot be used, first {bad[0]}")


def limit_scenes(data, limit: int | None, seed: int):
    """Fewer pictures of `segmentation.Scenes` or `depth.DepthSet`."""
    chosen, answers = limited(data.items, limit, seed), "masks" if hasattr(data, "masks") else "depths"
    kept = [getattr(data, answers)[i] for i in chosen]
    files = [data.files[i] for i in chosen] if data.files else []
    return replace(data, items=[data.items[i] for i in chosen], files=files, **{answers: kept})
