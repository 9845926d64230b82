"""Images with classes: folders, ImageNet, shards with labels, and lists, for the tasks knn and retrieval."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.decoding import endings
from ..data.listing import left_out_report, list_folder
from ..data.shards import LABEL_ENDING
from ..data.sources import ImageSource, file_source, read_list
from ..utils.atomic import is_file, is_folder
from .items import (
    DataError,
    folders_in,
    holds_shards,
    read_table,
    require,
    require_folder,
    shard_images,
)
from .task import limited

_logger = logging.getLogger(__name__)
SHARDS = '.tar shards of images with labels (NAME.cls, or "label" in NAME.json)'
LISTS = 'a list (.jsonl, .csv or .parquet) of images with "path" and "label"'
LAYOUT = f"train/CLASS/IMAGE and val/CLASS/IMAGE, or one level of CLASS folders; or {SHARDS} in their place"
IMAGENET = (
    "ImageNet's flat val/ILSVRC2012_val_*.JPEG needs LOC_val_solution.csv beside val, with the columns ImageId and "
    "PredictionString (CLASS LEFT TOP RIGHT BOTTOM ...)"
)
SPLITS = {"train", "training", "val", "validation", "test"}


@dataclass
class Labelled:
    """Pictures with classes: `labels` index `classes`."""

    items: list[ImageSource]
    labels: torch.Tensor
    classes: list[str]


def read_image_folder(folder: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Pictures in a folder per class, at any depth below it (torchvision's ImageFolder; ImageNet's train).

    Args:
        folder: holds the folders of the classes.
        root: items are named by their paths below it; the folder itself if it is left out.
        per_class: keep only that many pictures of each class, the first by name.

    Raises:
        DataError: no such folder, no classes in it, or a class without pictures.
    """
    folder = require_folder(folder, [], LAYOUT)
    classes = folders_in(folder)
    if not classes:
        found = sum(1 for _ in folder.iterdir())
        raise DataError(f"{folder} has no folders of classes (found {found} files); expected {LAYOUT}; {IMAGENET}")
    items, labels, left_out = [], [], Counter()
    for number, name in enumerate(classes):
        found = list_folder(folder / name)
        left_out.update(found.left_out)
        if not found.images:
            raise DataError(f"{folder / name} holds no pictures ({', '.join(endings())}); fill it or remove it")
        paths = found.images[:per_class]
        items += [file_source(path, Path(root or folder)) for path in paths]
        labels += [number] * len(paths)
    if left_out:
        _logger.warning(f"{folder}: {left_out_report(left_out)}")
    return Labelled(items, torch.tensor(labels), classes)


def read_shards(place: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Images in WebDataset shards, with the labels there (`sources.label_of`). Each label is a class.

    Args:
        place: a shard, a folder of shards, or a pattern.
        root: items are named by the paths of their shards below it; what these share if it is left out.
        per_class: keep only that many images of each class, the first in the shards.

    Raises:
        DataError: no images, images without a label, a bad label, see also `items.shard_images`.
    """
    images, left_out = [], Counter()
    for shard, found in shard_images(place, Path(root) if root else None):
        left_out.update(shard.left_out)
        left_out[LABEL_ENDING] -= sum(sample.label is not None for sample in shard.samples)
        images += found
    if not images:
        raise DataError(f"{place} holds no images ({', '.join(endings())}); expected {SHARDS}")
    if left_out := +left_out:
        _logger.warning(f"{place}: {left_out_report(left_out)}")
    return _by_label(images, SHARDS, per_class)


def read_label_list(place: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Images of a list with a column `label`, see `sources.read_list`. Each label is a class.

    Raises:
        DataError: no images, images without a label; files that are missing.
    """
    images = list(read_list(Path(place)))
    if not images:
        raise DataError(f"{place} holds no images; expected {LISTS}")
    require([(Path(image.path), place) for image in images], "images", LISTS)
    return _by_label(images, LISTS, per_class)


def _by_label(images: Sequence[ImageSource], layout: str, per_class: int | None) -> Labelled:
    if without := [image.name for image in images if not image.label]:
        raise DataError(f"{len(without)} of {len(images)} images have no label, first {without[0]}; expected {layout}")
    kept, chosen = Counter(), []
    for image in images:
        kept[image.label] += 1
        if per_class is None or kept[image.label] <= per_class:
            chosen.append(image)
    classes = sorted(kept)
    index = {name: number for number, name in enumerate(classes)}
    return Labelled(chosen, torch.tensor([index[image.label] for image in chosen]), classes)


def read_labelled(place: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Images with classes: `read_shards`, `read_label_list`, or else `read_image_folder`."""
    if holds_shards(place):
        return read_shards(place, root, per_class)
    return (read_label_list if is_file(place) else read_image_folder)(place, root, per_class)


def read_train_and_val(root: str | Path, per_class: int | None = None) -> tuple[Labelled, Labelled]:
    """The two splits of a data set: ImageFolder's, ImageNet's (also with its flat validation folder), or shards.

    Raises:
        DataError: missing splits, other classes in val than in train, see also `read_labelled`.
    """
    root = require_folder(root, ["train", "val"], LAYOUT)
    return _of_one_index(read_labelled(root / "train", root, per_class), read_val(root), root / "val")


def _of_one_index(train: Labelled, held: Labelled, place: str | Path) -> tuple[Labelled, Labelled]:
    """Both with the classes of train. Raises DataError for other classes, or images of train, in `held` at `place`."""
    known = {item.key for item in train.items}
    if both := [item.key for item in held.items if item.key in known]:
        raise DataError(f"{place}: {len(both)} of {len(held.items)} images are training images too, first {both[0]}")
    strange = sorted(set(held.classes) - set(train.classes))
    if strange:
        raise DataError(f"{place}: {len(strange)} of {len(held.classes)} classes are not in train, first {strange[0]}")
    index = torch.tensor([train.classes.index(name) for name in held.classes])
    return train, Labelled(held.items, index[held.labels], train.classes)


def read_queries(
    root: str | Path, train: str | Path | None = None, per_class: int | None = None
) -> tuple[Labelled | None, Labelled]:
    """What kNN takes: training images, and those that are classified by them.

    Args:
        root: a folder with train and val; or one set, as `read_gallery` reads it.
        train: where the training images are, if not in `root`: folders of classes, or shards.
        per_class: keep only that many training images of each class.

    Returns:
        Both; None for the training images if there are none: each image is to be classified by all others of its set.

    Raises:
        DataError: see `read_train_and_val` and `read_gallery`; `per_class` without training images.
    """
    if train is not None:
        root, train = (Path(os.path.abspath(place)) for place in (root, train))  # so that equal images have equal names
        base = root if is_folder(root) else root.parent
        return _of_one_index(read_labelled(train, base, per_class), read_gallery(root), root)
    if is_folder(root) and {"train", "val"} & set(folders_in(root)):
        return read_train_and_val(root, per_class)
    if per_class is not None:
        raise DataError(f"--per-class is of training images, and {root} is one set; give --train, or train/ and val/")
    return None, read_gallery(root)


def read_val(root: str | Path) -> Labelled:
    """The folder `val` in `root`, as `read_labelled`, or flat as ImageNet's with LOC_val_solution.csv beside it.

    Raises:
        DataError: missing pictures, a table of other columns, see also `read_labelled`.
    """
    root = require_folder(root, ["val"], LAYOUT)
    val, table = root / "val", root / "LOC_val_solution.csv"
    if not table.is_file() or folders_in(val):
        return read_labelled(val, root)
    lines = read_table(table, ["ImageId", "PredictionString"], IMAGENET)
    told = {line["ImageId"]: line["PredictionString"].split()[0] for line in lines}
    paths = [val / f"{name}.JPEG" for name in told]
    require([(path, table) for path in paths], "pictures of val", IMAGENET)
    classes = sorted(set(told.values()))
    labels = torch.tensor([classes.index(name) for name in told.values()])
    return Labelled([file_source(path, root) for path in paths], labels, classes)


def read_gallery(root: str | Path) -> Labelled:
    """One set of images with classes: `val` where there is one, or else folders of classes, or shards.

    Raises:
        DataError: folders of splits instead of classes, see also `read_val` and `read_labelled`.
    """
    if Path(root, "val").is_dir():
        return read_val(root)
    found = read_labelled(root)
    if set(found.classes) <= SPLITS:
        raise DataError(f"{root} holds splits ({', '.join(found.classes)}), no classes; give one of them, or {LAYOUT}")
    return found


def limit_labelled(data: Labelled, limit: int | None, seed: int) -> Labelled:
    """Fewer pictures."""
    chosen = limited(data.items, limit, seed)
    return replace(data, items=[data.items[i] for i in chosen], labels=data.labels[torch.tensor(chosen)])


def check_ks(ks: Sequence[int], gallery: int) -> None:
    """Raises DataError for a k beyond the number of gallery pictures."""
    if max(ks) > gallery:
        raise DataError(f"k = {max(ks)} neighbours of {gallery} pictures; give smaller --k or more pictures")
