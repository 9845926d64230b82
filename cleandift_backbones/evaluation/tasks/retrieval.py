"""Images of the same class among the nearest: the task retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..labelled import Labelled, check_ks, limit_labelled, read_gallery
from ..neighbours import recall_hits, tally
from ..task import Options, Task, option, register_task


@dataclass(frozen=True)
class RetrievalOptions(Options):
    """Of the task retrieval."""

    k: tuple[int, ...] = option((1, 5, 10), "nearest pictures that count as found", low=1, metavar="K")


@register_task
class Retrieval(Task):
    """Pictures of the same class, each picture asking all others."""

    name = "retrieval"
    about = (
        "images of the same class: CLASS/*, or the val of train/CLASS/*, val/CLASS/*, or of ImageNet; shards "
        "with labels in place of CLASS folders"
    )
    text = """Spatial mean of a map, cosine similarity. recall@k: the share of pictures that find one of their
class among their k nearest; each asks all others, pictures without another of their class are left out."""
    Options = RetrievalOptions
    last_map = True
    pool = True

    def __init__(self, data: Labelled, ks: Sequence[int]):
        super().__init__(data.items)
        check_ks(ks, len(data.items) - 1)
        self.data, self.ks = data, ks
        self.facts |= dict(classes=len(data.labels.unique()))

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        return cls(limit_labelled(read_gallery(data), limit, seed), options.k)

    def measure(self, features, size, progress=True):
        vectors, labels = features.stack(range(len(features))), self.data.labels
        hits, possible = recall_hits(vectors, labels, vectors, labels, self.ks, same=True)
        self.facts["queries"] = int(possible.sum())
        return {f"recall@{k}": tally(found, possible) for k, found in hits.items()}
