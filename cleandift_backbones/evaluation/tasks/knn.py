"""Classes by the nearest images: the task knn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..labelled import Labelled, check_ks, limit_labelled, read_queries
from ..neighbours import knn_hits, tally, with_others
from ..task import Options, Task, option, register_task


@dataclass(frozen=True)
class KnnOptions(Options):
    """Of the task knn."""

    k: tuple[int, ...] = option((10, 1, 5, 20), "nearest pictures that vote", low=1, metavar="K")
    weighted: bool = option(False, "votes count exp(similarity / 0.07)")
    per_class: int | None = option(None, "training images of each class", int, low=1, metavar="N")
    train: str | None = option(
        None, "training images, CLASS folders or shards; default: the train of the data, or else leave-one-out",
        metavar="PATH",
    )  # fmt: skip


@register_task
class Knn(Task):
    """Classes by the nearest training images, see `neighbours`; without any, by the nearest others of the one set."""

    name = "knn"
    about = (
        "classes by the nearest training images: train/CLASS/*, val/CLASS/*, or ImageNet; leave-one-out of CLASS/*; "
        "shards with labels in place of CLASS folders"
    )
    text = """Spatial mean of a map, cosine similarity, a vote of the k nearest training images. Leave-one-out: of the k
nearest other images of the same set; images without another of their class are left out."""
    Options = KnnOptions
    last_map = True
    pool = True

    def __init__(self, train: Labelled | None, val: Labelled, ks: Sequence[int], weighted=False):
        super().__init__((train.items if train else []) + val.items)
        check_ks(ks, len(train.items) if train else len(val.items) - 1)
        self.train, self.val, self.ks, self.weighted = train, val, ks, weighted
        self.facts |= dict(classes=len((train or val).labels.unique()))
        if train:
            self.facts |= dict(train_pictures=len(train.items), val_pictures=len(val.items))
        self.facts |= dict(votes="weighted" if weighted else "equal")

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        sets = read_queries(data, options.train, options.per_class)
        train, val = (found and limit_labelled(found, limit, seed) for found in sets)
        return cls(train, val, options.k, options.weighted)

    def measure(self, features, size, progress=True):
        vectors = features.stack(range(len(features)))
        if not self.train:
            labels = self.val.labels
            possible = with_others(labels, labels, same=True)
            self.facts["queries"] = int(possible.sum())
            hits = knn_hits(vectors, labels, vectors, labels, self.ks, self.weighted, same=True)
            return {f"leave-one-out kNN accuracy, k={k}": tally(found, possible) for k, found in hits.items()}
        gallery, queries = vectors[: len(self.train.items)], vectors[len(self.train.items) :]
        hits = knn_hits(queries, self.val.labels, gallery, self.train.labels, self.ks, self.weighted)
        return {f"kNN accuracy, k={k}": tally(found) for k, found in hits.items()}
