"""Labelled pictures: nearest-neighbour classification, and retrieval of pictures of the same class.

The CleanDIFT paper's kNN: spatial mean of a map, cosine similarity, k = 10, ImageNet.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from ...data.decoding import endings
from ...data.listing import left_out_report, list_folder
from ...data.shards import LABEL_ENDING, Sample, open_shard, read_member
from ...utils.atomic import is_folder, is_text
from ...utils.records import decode_text, parse_json
from ..bootstrap import Tally
from ..items import (
    DataError,
    Item,
    file_item,
    folders_in,
    holds_shards,
    read_table,
    require,
    require_folder,
    shard_items,
)

_logger = logging.getLogger(__name__)
KS = (1, 5, 10, 20)
TEMPERATURE = 0.07  # of the weighted vote: Wu et al. 2018 (arXiv 1805.01978), as in DINO
CHUNK = 2**24  # similarities in memory at a time
SHARDS = '.tar shards of images with labels (NAME.cls, or "label" in NAME.json)'
LAYOUT = f"train/CLASS/IMAGE and val/CLASS/IMAGE, or one level of CLASS folders; or {SHARDS} in their place"
IMAGENET = (
    "ImageNet's flat val/ILSVRC2012_val_*.JPEG needs LOC_val_solution.csv beside val, with the columns ImageId and "
    "PredictionString (CLASS LEFT TOP RIGHT BOTTOM ...)"
)
SPLITS = {"train", "training", "val", "validation", "test"}


@dataclass
class Labelled:
    """Pictures with classes: `labels` index `classes`."""

    items: list[Item]
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
        items += [file_item(path, Path(root or folder)) for path in paths]
        labels += [number] * len(paths)
    if left_out:
        _logger.warning(f"{folder}: {left_out_report(left_out)}")
    return Labelled(items, torch.tensor(labels), classes)


def read_shards(place: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Images in WebDataset shards, with the labels there (`read_label`). Each label is a class.

    Args:
        place: a shard, a folder of shards, or a pattern.
        root: items are named by the paths of their shards below it; what these share if it is left out.
        per_class: keep only that many images of each class, the first in the shards.

    Raises:
        DataError: no images, images without a label, a bad label, see also `items.shard_items`.
    """
    items, labels, without, left_out, kept = [], [], [], Counter(), Counter()
    for shard, found in shard_items(place, Path(root) if root else None):
        left_out.update(shard.left_out)
        left_out[LABEL_ENDING] -= sum(sample.label is not None for sample in shard.samples)
        with open_shard(shard.path) as file:
            for sample, item in zip(shard.samples, found, strict=True):
                label = read_label(shard.path, file, sample)
                kept[label] += 1
                if not label:
                    without.append(f"{shard.path}:{sample.key}")
                elif per_class is None or kept[label] <= per_class:
                    items.append(item)
                    labels.append(label)
    if without:
        raise DataError(f"{len(without)} of {kept.total()} images have no label, first {without[0]}; expected {SHARDS}")
    if not items:
        raise DataError(f"{place} holds no images ({', '.join(endings())}); expected {SHARDS}")
    if left_out := +left_out:
        _logger.warning(f"{place}: {left_out_report(left_out)}")
    classes = sorted(set(labels))
    index = {name: number for number, name in enumerate(classes)}
    return Labelled(items, torch.tensor([index[label] for label in labels]), classes)


def read_label(path: str | Path, file: BinaryIO, sample: Sample) -> str:
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
    found = parse_json(name, decode_text(name, read_member(file, beside)))
    label = found.get("label") if isinstance(found, dict) else None
    label = "" if label is None else label
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not is_text(str(label)):
        raise DataError(f"{name}: a label must be text or a whole number, got {str(label)[:80]!r}")
    return str(label).strip()


def read_labelled(place: str | Path, root: str | Path | None = None, per_class: int | None = None) -> Labelled:
    """Images with classes: `read_shards` of shards, `read_image_folder` of all else."""
    return (read_shards if holds_shards(place) else read_image_folder)(place, root, per_class)


def read_train_and_val(root: str | Path, per_class: int | None = None) -> tuple[Labelled, Labelled]:
    """The two splits of a data set: ImageFolder's, ImageNet's (also with its flat validation folder), or shards.

    Raises:
        DataError: missing splits, other classes in val than in train, see also `read_labelled`.
    """
    root = require_folder(root, ["train", "val"], LAYOUT)
    return _of_one_index(read_labelled(root / "train", root, per_class), read_val(root), root / "val")


def _of_one_index(train: Labelled, held: Labelled, place: str | Path) -> tuple[Labelled, Labelled]:
    """Both with the classes of train. Raises DataError for other classes, or images of train, in `held` at `place`."""
    known = {item.name for item in train.items}
    if both := [item.name for item in held.items if item.name in known]:
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
    return Labelled([file_item(path, root) for path in paths], labels, classes)


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


def check_ks(ks: Sequence[int], gallery: int) -> None:
    """Raises DataError for a k beyond the number of gallery pictures."""
    if max(ks) > gallery:
        raise DataError(f"k = {max(ks)} neighbours of {gallery} pictures; give smaller --k or more pictures")


def neighbours(
    queries: torch.Tensor, gallery: torch.Tensor, count: int, same: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities and indices of the nearest gallery vectors, best first: Q x D, G x D -> two of Q x count.

    Args:
        same: queries are the gallery: none finds itself.
    """
    queries, gallery = F.normalize(queries.float(), dim=1), gallery.float()
    inverse = gallery.norm(dim=1).clamp_min(1e-12).reciprocal()  # instead of a second copy of ImageNet's features
    found = []
    for start in range(0, len(queries), step := max(1, CHUNK // len(gallery))):
        similarity = (queries[start : start + step] @ gallery.T).mul_(inverse)
        if same:
            rows = torch.arange(len(similarity))
            similarity[rows, start + rows] = -torch.inf
        found.append(similarity.topk(count, dim=1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn_hits(
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    ks: Sequence[int] = KS,
    weighted: bool = False,
    same: bool = False,
) -> dict[int, torch.Tensor]:
    """Which queries get their class by a vote of the k nearest: {k: Q bools}.

    Votes count 1, or exp(similarity / 0.07) if weighted; the first class wins a tie.

    Raises:
        DataError: fewer gallery pictures than the largest k.
    """
    check_ks(ks, len(gallery) - same)
    similarity, indices = neighbours(queries, gallery, max(ks), same)
    votes = (similarity / TEMPERATURE).exp() if weighted else torch.ones_like(similarity)
    labels = gallery_labels[indices]
    classes = int(gallery_labels.max()) + 1
    hits = {}
    for k in ks:
        parts = []
        for some, weights in zip(labels[:, :k].split(4096), votes[:, :k].split(4096), strict=True):
            parts.append(torch.zeros(len(some), classes).scatter_add_(1, some, weights).argmax(1))
        hits[k] = torch.cat(parts) == query_labels
    return hits


def recall_hits(
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    ks: Sequence[int] = KS,
    same: bool = False,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Recall@k: which queries have a picture of their class among the k nearest: {k: Q bools}.

    Also Q bools of which queries have such a picture at all; the others belong in no rate.

    Raises:
        DataError: no query has one; fewer gallery pictures than the largest k.
    """
    check_ks(ks, len(gallery) - same)
    possible = with_others(query_labels, gallery_labels, same)
    _, indices = neighbours(queries, gallery, max(ks), same)
    equal = gallery_labels[indices] == query_labels[:, None]
    return {k: equal[:, :k].any(1) for k in ks}, possible


def with_others(query_labels: torch.Tensor, gallery_labels: torch.Tensor, same: bool = False) -> torch.Tensor:
    """Q bools: which queries have an image of their class in the gallery, other than themselves.

    Raises:
        DataError: none has one.
    """
    length = int(max(query_labels.max(), gallery_labels.max())) + 1
    possible = torch.bincount(gallery_labels, minlength=length)[query_labels] > int(same)
    if not possible.any():
        raise DataError("no query has another picture of its class; nothing to retrieve")
    return possible


def tally(hits: torch.Tensor, counted: torch.Tensor | None = None) -> Tally:
    """Hits of pictures as a Tally that is resampled over them."""
    trials = torch.ones_like(hits) if counted is None else counted
    return Tally(*(np.asarray(x, dtype=float)[:, None] for x in (hits & trials, trials)))
