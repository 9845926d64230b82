"""The one list of images, for training, extraction and evaluation: a folder, WebDataset shards, or a list in a file.

Nothing is decoded here. `ImageSource` stands for an image that is not read yet, with its caption and label.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..utils.atomic import is_folder, is_text
from ..utils.errors import InputError
from ..utils.progress import tqdm
from ..utils.records import TABLES, decode_text, parse_json, read_bytes, read_records, read_text, split_lines
from .captions import caption_of_json, checked_label, read_caption
from .decoding import ImageError, endings, read_image
from .listing import Listing, left_out_report, list_folder
from .shards import Member, Sample, Shard, check_places, open_shard, read_member, scan, shards_of

NOT_NAMED = "not in the metadata file"


class SourceError(InputError):
    """Data that cannot be used; the message says what was found and what to give."""


@dataclass(frozen=True)
class ImageSource:
    """An image to be read. It travels to worker processes.

    Attributes:
        key: its name in outputs: its path below the folder, the shard's own key, or as a list has it.
        path: its file, or the shard that holds it.
        offset: of its bytes in a shard.
        size: of its bytes in a shard; -1 for a file of its own.
        caption: what it shows; models that take text are conditioned on it where that is asked for.
        label: its class.
        data: the bytes of the file, where they were read already.
        member: name of its file in a shard, for messages; the key unless given.
    """

    key: str
    path: str = ""
    offset: int = 0
    size: int = -1
    caption: str = ""
    label: str = ""
    data: bytes | None = field(default=None, repr=False)
    member: str = ""

    @property
    def name(self) -> str:
        """For messages: the path of the file, or SHARD:KEY."""
        if not self.path:
            return self.key
        return self.path if self.size < 0 and self.data is None else f"{self.path}:{self.member or self.key}"

    @property
    def source(self) -> Path | bytes:
        """What `decoding.opened` takes. Raises ImageError for a shard that cannot be read."""
        if self.data is not None:
            return self.data
        if self.size < 0:
            return Path(self.path)
        try:
            with open(self.path, "rb") as file:
                return read_member(file, Member(self.name, self.offset, self.size))
        except (OSError, InputError) as error:
            raise ImageError(f"{self.name}: cannot be read ({error}); check the shard") from None

    @property
    def stamp(self) -> str:
        """Changes when the image does: size and time of its file, and its place in a shard."""
        try:
            facts = os.stat(self.path)
        except (OSError, ValueError):  # reported when it is read
            return ""
        place = f" {self.offset}" if self.size >= 0 else ""
        return f"{facts.st_size} {facts.st_mtime_ns}{place}"

    def read(self) -> Image.Image:
        """The image, 8-bit RGB. Raises ImageError if it cannot be read."""
        return read_image(self.source, min_side=1, name=self.name)


class ImageList(NamedTuple):
    """What `list_sources` found.

    Attributes:
        images: in the order of the list, or sorted.
        notes: sentences about what is left out though it should not be: damaged shards, folders that cannot be read,
            names that are no text.
    """

    images: list[ImageSource]
    notes: list[str]


def list_sources(
    data: str | os.PathLike,
    captions: bool = False,
    shard_names: bool = False,
    left_out: Counter[str] | None = None,
) -> ImageList:
    """The images of a folder (see `listing.list_folder`), of .tar shards (see `shards.shards_of`), or of a list.

    A list is a text file with a path per line, or a table (.jsonl, .csv, .parquet) with `path` (or `file_name`), and
    perhaps `key`, `prompt` and `label`. Paths are relative to the list's folder. Keys are paths below the folder, the
    shards' own keys (with `shard_names` behind the name of their shard), or paths as the list has them.

    Args:
        data: the place, or a pattern of shards.
        captions: read them: of side-cars and metadata files in a folder (`folder_sources`), and those that a list calls
            `caption` or `text`. What a list calls `prompt` is always read.
        shard_names: put the names of shards in front of keys.
        left_out: counts the files that are no images, by suffix or reason.

    Raises:
        SourceError: nothing there, or a key twice.
    """
    data = os.fspath(data)
    path, left_out = Path(data), Counter() if left_out is None else left_out
    try:
        if os.path.exists(data) and not path.is_dir() and path.suffix.lower() in endings():
            raise SourceError(f"{data} is a picture; give its folder, or a list of pictures")
        if not os.path.exists(data) and not any(sign in data for sign in ("*", "?", "[", "{", ".tar")):
            raise SourceError(f"{data}: no such folder, shards or list")
        if shards := shards_of(data):
            images, notes = _shards(shards, shard_names, captions, left_out)
        elif path.is_dir():
            notes = []
            found = list_folder(path, lambda error: notes.append(f"{error}: its pictures are left out"))
            images = folder_sources(path, found, captions)
            left_out.update(+found.left_out)
        else:
            images, notes = list(read_list(path, captions)), []
    except SourceError:
        raise
    except InputError as error:
        raise SourceError(str(error)) from None
    nameless = [image for image in images if not image.key or not is_text(image.key)]
    if nameless:
        notes.append(f"{len(nameless)} names are no UTF-8 and are left out, e.g. {nameless[0].key!r}; rename them")
        images = [image for image in images if image.key and is_text(image.key)]
    if not images:
        reasons = "; ".join([*notes, *filter(None, [left_out_report(left_out)])])
        raise SourceError(
            f"{data} holds no pictures ({', '.join(endings())}, or .tar shards of them) {reasons}".strip()
        )
    _check_keys(data, images, shard_names)
    return ImageList(images, notes)


def _check_keys(data: str, images: Sequence[ImageSource], shard_names: bool) -> None:
    seen: dict[str, ImageSource] = {}
    for image in images:
        if (other := seen.setdefault(image.key, image)) is not image:
            several = "rename one of the shards" if shard_names else "give --shard-names"
            inside = several if image.path != other.path else "give each file in it a name of its own"
            remedy = inside if image.size >= 0 else "give each a key of its own"
            raise SourceError(f"{data}: two pictures have the key {image.key!r} ({other.path}, {image.path}); {remedy}")


# --- folders ---


def file_source(path: Path, root: Path, caption: str = "") -> ImageSource:
    """An image file, with its path below `root` as its key; all of the path where it lies elsewhere."""
    key = path.relative_to(root) if path.is_relative_to(root) else path
    return ImageSource(key.as_posix(), str(path), caption=caption)


def folder_sources(root: Path, found: Listing, captions: bool = False) -> list[ImageSource]:
    """The images of a folder, sorted.

    With captions: that of the side-car, .txt, else .caption, else .json; without one the caption is "". Folders with a
    metadata file (Hugging Face's imagefolder: metadata.jsonl, .csv or .parquet with file_name, and text or caption)
    come after these, and hold just what it names, in its order; others are counted in `found.left_out`.

    Raises:
        InputError: a line of metadata without file_name, two metadata files, a caption that is no string.
    """
    if not captions:
        return [file_source(path, root) for path in found.images]
    images, tables = [], {place: _read_metadata(files, root) for place, files in sorted(found.metadata.items())}
    named = {image.path for table in tables.values() for image in table}
    for path in found.images:
        if any(place in tables for place in path.parents):
            found.left_out[NOT_NAMED] += str(path) not in named
            continue
        beside = found.captions.get(path)
        caption = read_caption(str(beside[0]), read_bytes(beside[0])) if beside else ""
        images.append(file_source(path, root, caption))
    return images + [image for table in tables.values() for image in table]


def _read_metadata(files: list[Path], root: Path) -> list[ImageSource]:
    if len(files) > 1:
        raise InputError(f"{files[0].parent} has both {files[0].name} and {files[1].name}: keep one of them")
    (path,) = files
    images = []
    for number, line in read_records(path):
        name = line.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{path}: every line needs a file_name, a string; line {number} has none")
        try:
            images.append(file_source(path.parent / name, root, caption_of_json(line)))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return images


# --- lists ---


def read_list(path: Path, captions: bool = False) -> Iterator[ImageSource]:
    """The images of a list, see `list_sources`. Raises SourceError for lines without a path, or wrong ones."""
    if path.suffix.lower() in TABLES:
        lines = read_records(path)
    elif path.suffix.lower() in (".json", ".tsv"):
        raise SourceError(f"{path}: a list is a text file with a path per line, or a table: .jsonl or .csv")
    else:
        lines = ((n, {"path": line.strip()}) for n, line in enumerate(split_lines(read_text(path)), 1) if line.strip())
    for number, line in lines:
        name, key = line.get("path") or line.get("file_name"), line.get("key")
        try:
            caption = caption_of_json(line) if captions else line.get("prompt") or ""
        except InputError:
            caption = None
        if not isinstance(name, str) or not isinstance(caption, str):
            raise SourceError(f"{path}, line {number}: expected a path (and text), got {str(line)[:80]}")
        key = name if key in (None, "") else key
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise SourceError(f"{path}, line {number}: the key {key!r} is no text and no whole number")
        label = checked_label(f"{path}, line {number}", line.get("label"))
        yield ImageSource(str(key), str(path.parent / name), caption=caption, label=label)


def is_list(place: str | os.PathLike) -> bool:
    """Whether a path stands for a list of images: a file that is no shard."""
    return os.path.isfile(place) and not shards_of(place)


# --- shards ---


def _shards(
    shards: list[str], shard_names: bool, captions: bool, left_out: Counter[str]
) -> tuple[list[ImageSource], list[str]]:
    with ThreadPoolExecutor(8) as pool:  # mostly waits for the disk
        found = list(
            tqdm(pool.map(scan, shards), desc="listing", unit="shard", total=len(shards), disable=len(shards) < 50)
        )
    images, notes = [], []
    for shard in found:
        left_out.update(shard.left_out)
        if shard.damage:
            notes.append(shard.damage)
        check_places(shard)
        images += shard_sources(shard, f"{Path(shard.path).stem}/" if shard_names else "", captions=captions)
    return images, notes


def shard_sources(shard: Shard, front: str = "", captions: bool = False, labels: bool = False) -> list[ImageSource]:
    """The images of a shard that was scanned, at their places in it, in its order.

    Args:
        shard: of `shards.scan`.
        front: stands in front of the shard's own keys.
        captions: read them.
        labels: read them, see `label_of`.

    Raises:
        InputError: captions or labels that cannot be read.
    """
    images = []
    with open_shard(shard.path) if captions or labels else nullcontext() as file:
        for sample in shard.samples:
            text = sample.captions[0] if captions and sample.captions else None
            images.append(
                ImageSource(
                    front + sample.key, shard.path, sample.image.offset, sample.image.size,
                    read_caption(f"{shard.path}:{text.name}", read_member(file, text)) if text else "",
                    label_of(shard.path, file, sample) if labels else "", member=sample.image.name,
                )
            )  # fmt: skip
    return images


def label_of(path: str | Path, file, sample: Sample) -> str:
    """The label of an image in an opened shard: its .cls, else the "label" in its .json; "" where there is neither.

    Raises:
        InputError: no UTF-8, no JSON, or a label that is neither text nor a whole number.
    """
    if sample.label:
        return decode_text(f"{path}:{sample.label.name}", read_member(file, sample.label)).strip()
    beside = next((member for member in sample.captions if member.name.lower().endswith(".json")), None)
    if beside is None:
        return ""
    name = f"{path}:{beside.name}"
    content = parse_json(name, decode_text(name, read_member(file, beside)))
    return checked_label(name, content.get("label") if isinstance(content, dict) else None)


def list_training_sources(
    place: str | Path, without: str | Path | Iterable[str | Path] | None = None, left_out: Counter[str] | None = None
) -> list[ImageSource]:
    """The images of a folder, or of a list, with their captions; keys may come twice.

    Args:
        place: a folder (see `folder_sources`), or a list (see `list_sources`).
        without: folders that are not looked into, such as a run's own.
        left_out: counts files that are no images, see `listing.Listing`, and images that metadata leave out.

    Raises:
        InputError: no images there, a line of metadata without file_name, a caption that is no string.
    """
    place, found = Path(place), Listing()
    skip = [without] if isinstance(without, (str, os.PathLike)) else list(without or ())
    if is_list(place):
        images = list(read_list(place, captions=True))
    else:
        if is_folder(place):
            found = list_folder(place, without=skip)
        images = folder_sources(place, found, captions=True)
    if left_out is not None:
        left_out.update(+found.left_out)
    if not images:
        suffixes, report = ", ".join(endings()), left_out_report(+found.left_out)
        raise InputError(
            f"no pictures in {place}: give a folder of {suffixes} files, a list, or .tar shards {report}".strip()
        )
    return images
