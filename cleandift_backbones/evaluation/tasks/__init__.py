"""The paper's tasks as objects of one shape: pictures that features are wanted of, and what is measured on one map."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..bootstrap import Tally
from ..cache import Features
from ..items import Item, check_answers
from ..probes import Recipe
from . import depth, knn, matching, segmentation
from .pairs import PairSet

Size = tuple[int, int]


class Task:
    """What all have in common.

    Attributes:
        items: the pictures; features come in this order.
        pool: spatial means are enough.
        unit: what the bootstrap draws. main, lower: see `report.Report`.
        facts: about the data, for the report.
    """

    pool = False
    unit = "pictures"
    lower = frozenset()

    def __init__(self, items: list[Item]):
        self.items, self.facts = items, {}

    def measure(self, features: Features, size: Size, progress: bool = True) -> dict[str, Tally]:
        """Everything measured on one map; `size` is the (height, width) of the model's input."""
        raise NotImplementedError

    def main(self, metrics: Sequence[str]) -> tuple[str, ...]:
        """The metrics that matter most."""
        return tuple(metrics)

    def heading(self, metric: str) -> str:
        """A key of `measure` as tables show it."""
        return metric


class Correspondence(Task):
    """Keypoints of pairs, see `matching`."""

    unit = "target pictures"

    def __init__(self, data: PairSet, alphas: Sequence[float], mode="squash", window=0, temperature=0.04):
        super().__init__(data.items)
        self.data, self.alphas, self.mode = data, alphas, mode
        self.window, self.temperature = window, temperature
        points = sum(len(pair.source_points) for pair in data.pairs)
        self.facts |= dict(data_set=data.name, pairs=len(data.pairs), points=points, points_skipped=data.skipped)
        self.facts |= dict(mode=mode, answer=f"soft-argmax, window {window}, T={temperature}" if window else "argmax")

    def measure(self, features, size, progress=True):
        found = matching.match_pairs(
            features, self.data, self.mode, size, self.window, self.temperature, progress=progress
        )
        return matching.pck_tallies(found, self.data, self.alphas)

    def same_position(self):
        """What the place of a point alone is worth: as `measure`, without features."""
        return matching.pck_tallies(matching.same_position(self.data), self.data, self.alphas)

    def main(self, metrics):
        return tuple(key for key in metrics if f"@{self.alphas[0]:g} " in key and "," not in key)

    def heading(self, metric):
        return f"PCK {metric}"


class Knn(Task):
    """Classes by the nearest training images, see `knn`; without any, by the nearest others of the one set."""

    pool = True

    def __init__(self, train: knn.Labelled | None, val: knn.Labelled, ks: Sequence[int], weighted=False):
        super().__init__((train.items if train else []) + val.items)
        knn.check_ks(ks, len(train.items) if train else len(val.items) - 1)
        self.train, self.val, self.ks, self.weighted = train, val, ks, weighted
        self.facts |= dict(classes=len((train or val).labels.unique()))
        if train:
            self.facts |= dict(train_pictures=len(train.items), val_pictures=len(val.items))
        self.facts |= dict(votes="weighted" if weighted else "equal")

    def measure(self, features, size, progress=True):
        vectors = features.stack(range(len(features)))
        if not self.train:
            labels = self.val.labels
            possible = knn.with_others(labels, labels, same=True)
            self.facts["queries"] = int(possible.sum())
            hits = knn.knn_hits(vectors, labels, vectors, labels, self.ks, self.weighted, same=True)
            return {f"leave-one-out kNN accuracy, k={k}": knn.tally(found, possible) for k, found in hits.items()}
        gallery, queries = vectors[: len(self.train.items)], vectors[len(self.train.items) :]
        hits = knn.knn_hits(queries, self.val.labels, gallery, self.train.labels, self.ks, self.weighted)
        return {f"kNN accuracy, k={k}": knn.tally(found) for k, found in hits.items()}


class Retrieval(Task):
    """Pictures of the same class, each picture asking all others."""

    pool = True

    def __init__(self, data: knn.Labelled, ks: Sequence[int]):
        super().__init__(data.items)
        knn.check_ks(ks, len(data.items) - 1)
        self.data, self.ks = data, ks
        self.facts |= dict(classes=len(data.labels.unique()))

    def measure(self, features, size, progress=True):
        vectors, labels = features.stack(range(len(features))), self.data.labels
        hits, possible = knn.recall_hits(vectors, labels, vectors, labels, self.ks, same=True)
        self.facts["queries"] = int(possible.sum())
        return {f"recall@{k}": knn.tally(found, possible) for k, found in hits.items()}


class Segmentation(Task):
    """The linear probe's mIoU, see `segmentation`."""

    def __init__(self, train: segmentation.Scenes, val: segmentation.Scenes, recipe: Recipe):
        super().__init__(train.items + val.items)
        check_answers(train.files + val.files, "masks", train.masks + val.masks)
        self.train, self.val, self.recipe = train, val, recipe
        self.facts |= dict(classes=train.classes)
        if train.names:
            self.facts |= dict(class_names=f"{', '.join(train.names)} ({train.origin})")
        self.facts |= dict(train_pictures=len(train.items), val_pictures=len(val.items), probe=str(recipe))
        self.known: tuple[Size, list, list] | None = None

    def _labels(self, cells: Size):
        if self.known is None or self.known[0] != cells:  # runs of a sweep share them
            self.known = (cells, *(segmentation.all_labels(scenes, cells) for scenes in (self.train, self.val)))
            self.facts["empty_masks"] = sum(not len(one.counts) for labels in self.known[1:] for one in labels)
        return self.known[1:]

    def measure(self, features, size, progress=True):
        train, val = self._labels(tuple(features[0].shape[1:]))
        count, classes = len(self.train.items), self.train.classes
        probe = segmentation.train_segmenter(features.part(0, count), train, classes, self.recipe, progress)
        iou = segmentation.miou(probe, features.part(count), val, classes)
        by_class = {f"IoU, {name}": iou.group(number) for number, name in enumerate(self.train.names)}
        occurring = {key: tally for key, tally in by_class.items() if tally.trials.any()}
        return {"mIoU": iou, "pixel accuracy": segmentation.accuracy(iou, val), **occurring}

    def main(self, metrics):
        return ("mIoU", "pixel accuracy")

    def heading(self, metric):
        return f"mIoU of {self.train.classes} classes" if metric == "mIoU" else metric


class Depth(Task):
    """The bins probe's errors, see `depth`; trained, or `probe_file` taken as it is."""

    lower = frozenset({"RMSE (m)", "AbsRel"})

    def __init__(self, train: depth.DepthSet | None, test: depth.DepthSet, recipe: Recipe, probe_file=None, crop=True):
        super().__init__((train.items if train else []) + test.items)
        check_answers((train.files if train else []) + test.files, "depth maps")
        self.train, self.test, self.recipe, self.probe_file, self.crop = train, test, recipe, probe_file, crop
        self.facts |= dict(train_pictures=len(train.items) if train else 0, test_pictures=len(test.items))
        self.facts |= dict(probe=str(probe_file or recipe), eigen_crop=crop)

    def measure(self, features, size, progress=True):
        count = len(self.train.items) if self.train else 0
        if self.train:
            probe = depth.train_depth(features.part(0, count), self.train, self.recipe, progress)
        else:
            probe = depth.BinsProbe.load(self.probe_file, features[0].shape[0])
        found = depth.evaluate_depth(probe, features.part(count), self.test, self.crop)
        names = dict(rmse="RMSE (m)", abs_rel="AbsRel", delta1="delta < 1.25", delta2="delta < 1.25^2")
        return {names.get(key, "delta < 1.25^3"): value for key, value in found.items()}


def limited(items: Sequence, limit: int | None, seed: int) -> list[int]:
    """Places of at most `limit` items, drawn by the seed, in their order."""
    if limit is None or limit >= len(items):
        return list(range(len(items)))
    return sorted(random.Random(seed).sample(range(len(items)), limit))


def limit_pairs(data: PairSet, limit: int | None, seed: int) -> PairSet:
    """Fewer pairs, and only the pictures that they need."""
    pairs = [data.pairs[i] for i in limited(data.pairs, limit, seed)]
    used = sorted({i for pair in pairs for i in (pair.source, pair.target)})
    place = {old: new for new, old in enumerate(used)}
    pairs = [replace(pair, source=place[pair.source], target=place[pair.target]) for pair in pairs]
    return replace(data, pairs=pairs, items=[data.items[i] for i in used], sizes=[data.sizes[i] for i in used])


def limit_labelled(data: knn.Labelled, limit: int | None, seed: int) -> knn.Labelled:
    """Fewer pictures."""
    chosen = limited(data.items, limit, seed)
    return replace(data, items=[data.items[i] for i in chosen], labels=data.labels[torch.tensor(chosen)])


def limit_scenes(data, limit: int | None, seed: int):
    """Fewer pictures of `segmentation.Scenes` or `depth.DepthSet`."""
    chosen, answers = limited(data.items, limit, seed), "masks" if hasattr(data, "masks") else "depths"
    kept = [getattr(data, answers)[i] for i in chosen]
    files = [data.files[i] for i in chosen] if data.files else []
    return replace(data, items=[data.items[i] for i in chosen], files=files, **{answers: kept})
