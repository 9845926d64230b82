"""Nearest images by their features: votes and recall, for the tasks knn and retrieval.

The CleanDIFT paper's kNN: spatial mean of a map, cosine similarity, k = 10, ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .bootstrap import Tally
from .items import DataError
from .labelled import check_ks

KS = (1, 5, 10, 20)
TEMPERATURE = 0.07  # of the weighted vote: Wu et al. 2018 (arXiv 1805.01978), as in DINO
CHUNK = 2**24  # similarities in memory at a time


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
