"""Semantic segmentation by a linear probe: VOC and ADE20K layouts, mIoU.

The paper's protocol: a 1x1 convolution on us6, predictions upsampled by nearest neighbour. Then all
pixels that see one cell share its prediction, so that counts of labels per cell are all that the cross entropy over the
pixels, and the intersections and unions, need: both are computed from them, exactly, at the map's size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...data.decoding import endings
from ...data.listing import list_names
from ...data.sources import ImageSource, file_source
from ...utils.atomic import is_file
from ...utils.errors import CleanDIFTError
from ...utils.records import read_text, split_lines
from ..bootstrap import Tally
from ..items import DataError, check_answers, limit_scenes, read_lines, read_target, require, require_folder
from ..probes import ProbeOptions, ProbeSettings, train_probe
from ..task import Size, Task, option, register_task

IGNORED = 255
VOC = "VOC: JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt"
ADE20K = "ADE20K: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png"
CLASSES_FILE = "classes.txt"
MOST_CLASSES = 255  # of 8-bit masks, in which 255 is to ignore
#: layout -> (FOLDER/NAME of the data set's own images, its number of classes)
OWN_CLASSES = {
    VOC: (r".*/\d{4}_\d{6}|VOC2007/\d{6}", 21),
    ADE20K: (r".*/ADE_(train|val)_\d{8}", 150),
}


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
    """Images with masks: `masks[i]()` gives H x W uint8 of classes, 255 to ignore; `files` are where they lie.

    Attributes:
        classes: their number, background included. names: of the classes, or [] where they are unknown.
        origin: where the number comes from: "classes.txt", "--classes", "VOC" or "ADE20K".
    """

    items: list[ImageSource]
    masks: list[Callable[[], np.ndarray]]
    classes: int
    files: list[tuple[Path, Path]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    origin: str = ""


def read_scenes(root: str | Path, split: str, classes: int | None = None) -> Scenes:
    """A split, "train" or "val", of a VOC or ADE20K folder.

    VOC (VOC2012, or one of the two folders around it): masks are palette or grey PNGs whose values are the classes,
    background included, 255 to ignore. ADE20K (ADEChallengeData2016): grey PNGs, 0 to ignore, 1... the classes, which
    become 0... .

    Args:
        root: the folder.
        split: its name.
        classes: their number, 2..255. None: as many as `classes.txt` in the folder has names, one a line; without that
            file VOC's 21 and ADE20K's 150 for the images of these data sets, which are known by their names.

    Raises:
        DataError: another layout, missing splits or files, an unknown number of classes, a bad classes.txt.
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
        files, shift = [root / "annotations" / folder / f"{p.stem}.png" for p in images], 1
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
        files, shift = [root / "SegmentationClass" / f"{name}.png" for name in names], 0
    require([(path, source) for path in images], "pictures", layout)
    require([(path, source) for path in files], "masks", layout)
    if classes is not None:
        class_names, origin = [], "--classes"
    elif is_file(root / CLASSES_FILE):
        class_names, origin = read_class_names(root / CLASSES_FILE), CLASSES_FILE
        classes = len(class_names)
    else:
        class_names, origin, classes = [], layout.partition(":")[0], _own_classes(root, images, layout)
    masks = [lambda path=path: read_mask(path, classes, shift, origin) for path in files]
    items = [file_source(path, root) for path in images]
    return Scenes(items, masks, classes, list(zip(images, files, strict=True)), class_names, origin)


def read_class_names(path: Path) -> list[str]:
    """The names of the classes of a text file: one a line, the first is that of class 0.

    Raises:
        DataError: an empty line, a name twice, fewer than 2 or more than 255.
    """
    try:
        names = [line.strip() for line in split_lines(read_text(path).rstrip())]
    except CleanDIFTError as error:
        raise DataError(str(error)) from None
    if names == [""]:
        raise DataError(f"{path} holds no names; write those of the classes, one a line")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise DataError(f"{path} has {len(names)} class{'es' * (len(names) > 1)}; a probe needs 2 to {MOST_CLASSES}")
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            wrong = f"line {number}: the name {name!r} is there already" if name else f"line {number} is empty"
            raise DataError(f"{path}, {wrong}; each line is a class, from class 0 on")
    return names


def _own_classes(root: Path, images: list[Path], layout: str) -> int:
    """The number of classes of the data set that a layout is named after, for its own images alone."""
    pattern, classes = OWN_CLASSES[layout]
    folder = Path(os.path.abspath(root)).name
    others = [path for path in images if not re.fullmatch(pattern, f"{folder}/{path.stem}")]
    if others:
        name = layout.partition(":")[0]
        raise DataError(
            f"{root}: the layout is that of {name}, but {others[0].name} is no image of it: how many classes there are "
            f"is unknown. Write their names into {root / CLASSES_FILE}, one a line, or give --classes N"
        )
    return classes


def read_mask(path: Path, classes: int, shift: int = 0, origin: str = "") -> np.ndarray:
    """A mask H x W of classes 0..classes-1, 255 to ignore; `shift` 1: 0 is to ignore, and classes count from 1.

    Args:
        path: the file.
        classes: their number.
        shift: 0 or 1.
        origin: where the number comes from, for messages.

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
        why = f" ({origin})" if origin else ""
        raise DataError(f"{path}: class {int(strange[0]) + shift} of {classes} does not exist{why}; correct either")
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


def train_segmenter(
    features, labels: Sequence[Labels], classes: int, settings: ProbeSettings | None = None, progress=True
):
    """The probe, C -> classes: cross entropy, mean over the pixels of each batch that have a class."""

    def loss(logits: torch.Tensor, indices: list[int]) -> torch.Tensor | None:
        scores, parts, total = logits.flatten(2).log_softmax(1), [], 0
        for score, i in zip(scores, indices, strict=True):
            one = labels[i]
            parts.append((score[one.classes, one.cells] * one.counts).sum())
            total += int(one.counts.sum())
        return -torch.stack(parts).sum() / total if total else None

    return train_probe(features, classes, loss, settings, progress)


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


@dataclass(frozen=True)
class SegmentationOptions(ProbeOptions):
    """Of the task segmentation."""

    classes: int | None = option(
        None, "number of classes, background included; default: as many as classes.txt in the data's folder has lines, "
        "or 21 of VOC, 150 of ADE20K", int, low=2, high=MOST_CLASSES, metavar="N",
    )  # fmt: skip


@register_task
class Segmentation(Task):
    """The linear probe's mIoU."""

    name = "segmentation"
    about = "a linear probe on VOC's or ADE20K's layout, with classes of your own too: mIoU"
    text = """A 1x1 convolution on the map, trained on cached features; predictions upsampled by nearest
neighbour. mIoU over the classes that occur."""
    Options = SegmentationOptions
    timestep = 100
    memory_option = "--probe-batch"

    def __init__(self, train: Scenes, val: Scenes, settings: ProbeSettings):
        super().__init__(train.items + val.items)
        check_answers(train.files + val.files, "masks", train.masks + val.masks)
        self.train, self.val, self.settings = train, val, settings
        self.facts |= dict(classes=train.classes)
        if train.names:
            self.facts |= dict(class_names=f"{', '.join(train.names)} ({train.origin})")
        self.facts |= dict(train_pictures=len(train.items), val_pictures=len(val.items), probe=str(settings))
        self.known: tuple[Size, list, list] | None = None

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        train, val = (
            limit_scenes(read_scenes(data, split, options.classes), limit, seed) for split in ("train", "val")
        )
        return cls(train, val, options.probe_settings(seed))

    def _labels(self, cells: Size):
        if self.known is None or self.known[0] != cells:  # runs of a sweep share them
            self.known = (cells, *(all_labels(scenes, cells) for scenes in (self.train, self.val)))
            self.facts["empty_masks"] = sum(not len(one.counts) for labels in self.known[1:] for one in labels)
        return self.known[1:]

    def measure(self, features, size, progress=True):
        train, val = self._labels(tuple(features[0].shape[1:]))
        count, classes = len(self.train.items), self.train.classes
        probe = train_segmenter(features.part(0, count), train, classes, self.settings, progress)
        iou = miou(probe, features.part(count), val, classes)
        by_class = {f"IoU, {name}": iou.group(number) for number, name in enumerate(self.train.names)}
        occurring = {key: tally for key, tally in by_class.items() if tally.trials.any()}
        return {"mIoU": iou, "pixel accuracy": accuracy(iou, val), **occurring}

    def main(self, metrics):
        return ("mIoU", "pixel accuracy")

    def heading(self, metric):
        return f"mIoU of {self.train.classes} classes" if metric == "mIoU" else metric
