"""Semantic segmentation by a linear probe: VOC and ADE20K layouts, mIoU.

The paper's protocol: a 1x1 convolution on us6, predictions upsampled by nearest neighbour. Then all
pixels that see one cell share its prediction, so that counts of labels per cell are all that the cross entropy over the
pixels, and the intersections and unions, need: both are computed from them, exactly, at the map's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..decoding import endings
from ..listing import list_names
from .bootstrap import Tally
from .items import DataError, Item, file_item, read_lines, read_target, require, require_folder
from .probes import Recipe, train_probe

IGNORED = 255
VOC = "VOC: JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt"
ADE20K = "ADE20K: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png"
VOC_CLASSES, ADE20K_CLASSES = 21, 150


@dataclass
class Labels:
    """How many pixels of each class each cell of a map sees: K entries, pixels to ignore left out.

    Attributes:
        cells: places in the flattened map. classes: 0... counts: pixels, at least 1.
    """

    cells: torch.Tensor
    classes: torch.Tensor
    counts: torch.Tensor


@dataclass
class Scenes:
    """Pictures with masks: `masks[i]()` gives H x W uint8 of classes, 255 to ignore; `files` are where they lie."""

    items: list[Item]
    masks: list[Callable[[], np.ndarray]]
    classes: int
    files: list[tuple[Path, Path]] = field(default_factory=list)


def read_scenes(root: str | Path, split: str) -> Scenes:
    """A split, "train" or "val", of a VOC or ADE20K folder.

    VOC (VOC2012, or one of the two folders around it): masks are palette PNGs whose indices are 21 classes, background
    included, 255 to ignore. ADE20K (ADEChallengeData2016): grey PNGs, 0 to ignore, 1..150 the classes, which become
    0..149.

    Raises:
        DataError: another layout, missing splits or files.
    """
    root = Path(root)
    root = next((p for p in (root / "VOCdevkit" / "VOC2012", root / "VOC2012") if p.is_dir()), root)
    if (root / "annotations").is_dir() and (root / "images").is_dir():
        folder = {"train": "training", "val": "validation"}.get(split, split)
        require_folder(root, [f"images/{folder}", f"annotations/{folder}"], ADE20K)
        source = root / "images" / folder
        images = [Path(path) for path in list_names(source, endings())]
        if not images:
            raise DataError(f"{source} holds no pictures; expected {ADE20K}")
        files, classes, shift = [root / "annotations" / folder / f"{p.stem}.png" for p in images], ADE20K_CLASSES, 1
        layout = ADE20K
    else:
        layout = VOC
        if root.is_dir() and not (root / "JPEGImages").is_dir():
            found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
            raise DataError(f"{root}: neither layout (found {found}); expected {VOC}; or {ADE20K}")
        require_folder(root, ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation"], VOC)
        source = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        names = read_lines(source, VOC)
        images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
        files, classes, shift = [root / "SegmentationClass" / f"{name}.png" for name in names], VOC_CLASSES, 0
    require([(path, source) for path in images], "pictures", layout)
    require([(path, source) for path in files], "masks", layout)
    masks = [lambda path=path: read_mask(path, classes, shift) for path in files]
    return Scenes([file_item(path, root) for path in images], masks, classes, list(zip(images, files, strict=True)))


def read_mask(path: Path, classes: int, shift: int = 0) -> np.ndarray:
    """A mask H x W of classes 0..classes-1, 255 to ignore; `shift` 1: 0 is to ignore, and classes count from 1.

    Raises:
        DataError: a file that cannot be decoded, colours instead of classes, or a class that does not exist.
    """
    mode, mask = read_target(path, "mask")
    if mode not in ("P", "L"):
        raise DataError(f"{path}: colour mode {mode}; expected a palette or grey PNG whose values are the classes")
    mask = mask.copy()
    if shift:
        mask = np.where(mask == 0, IGNORED, mask - 1).astype(np.uint8)
    strange = mask[(mask >= classes) & (mask != IGNORED)]
    if strange.size:
        raise DataError(f"{path}: class {int(strange[0]) + shift} of {classes} does not exist")
    return mask


def cell_labels(mask: np.ndarray, cells: tuple[int, int], classes: int) -> Labels:
    """What the cells of an h x w map see of a mask that it is upsampled to by nearest neighbour, torch's "nearest"."""
    (h, w), (height, width) = cells, mask.shape
    place = (np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width
    seen = mask != IGNORED
    pairs, counts = np.unique(place[seen] * classes + mask[seen], return_counts=True)
    return Labels(*(torch.from_numpy(x) for x in (pairs // classes, pairs % classes, counts)))


def all_labels(scenes: Scenes, cells: tuple[int, int]) -> list[Labels]:
    """Of all masks. Raises DataError if none has a pixel that counts."""
    labels = [cell_labels(mask(), cells, scenes.classes) for mask in scenes.masks]
    if not any(len(one.counts) for one in labels):
        raise DataError(f"all {len(labels)} masks are empty: no pixel has a class")
    return labels


def train_segmenter(features, labels: Sequence[Labels], classes: int, recipe: Recipe | None = None, progress=True):
    """The probe, C -> classes: cross entropy, mean over the pixels of each batch that have a class."""

    def loss(logits: torch.Tensor, indices: list[int]) -> torch.Tensor | None:
        scores, parts, total = logits.flatten(2).log_softmax(1), [], 0
        for score, i in zip(scores, indices, strict=True):
            one = labels[i]
            parts.append((score[one.classes, one.cells] * one.counts).sum())
            total += int(one.counts.sum())
        return -torch.stack(parts).sum() / total if total else None

    return train_probe(features, classes, loss, recipe, progress)


def overlaps(one: Labels, predicted: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersections and unions in pixels, a number per class, with predictions h*w of a map upsampled to the mask."""
    counts, predicted = one.counts.double(), predicted[one.cells]
    truth = torch.bincount(one.classes, counts, minlength=classes)
    guess = torch.bincount(predicted, counts, minlength=classes)
    both = torch.bincount(one.classes, counts * (predicted == one.classes), minlength=classes)
    return both, truth + guess - both


def miou(probe: nn.Conv2d, features, labels: Sequence[Labels], classes: int) -> Tally:
    """Intersections and unions, pictures x classes: the rate is the mean IoU over the classes that occur."""
    hits, unions = np.zeros((len(labels), classes)), np.zeros((len(labels), classes))
    for i, one in enumerate(labels):
        with torch.inference_mode():
            predicted = probe(features[i][None].float())[0].argmax(0).flatten()
        hits[i], unions[i] = (x.numpy() for x in overlaps(one, predicted, classes))
    return Tally(hits, unions)


def accuracy(iou: Tally, labels: Sequence[Labels]) -> Tally:
    """The share of pixels with the right class."""
    pixels = np.array([[float(one.counts.sum())] for one in labels])
    return Tally(iou.hits.sum(1, keepdims=True), pixels)


def foreground_labels(alpha: np.ndarray, cells: tuple[int, int]) -> Labels:
    """Two classes, ground 0 and figure 1, from opacity H x W in 0..1: figure from one half on."""
    return cell_labels((alpha >= 0.5).astype(np.uint8), cells, 2)
