"""Cross-style retrieval: is the nearest picture in another style a picture of the same thing?

Query: a picture of concept c in style A; gallery: all pictures in style B; a hit if the nearest by cosine has concept
c. Reported is the mean over ordered pairs of styles, every pair counting the same however many pictures it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..utils.errors import InputError

POOLINGS = ("pooled", "whole")


def embed(maps: torch.Tensor, pooling: str = "pooled") -> torch.Tensor:
    """One unit vector per picture from its map: N x C x h x w -> N x D.

    "pooled": the map's spatial mean. "whole": the flattened map minus the mean over the N pictures, so that what all
    pictures share (their layout on the canvas) does not count.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    if pooling == "pooled":
        return F.normalize(maps.float().mean((2, 3)), dim=1)
    flat = maps.float().flatten(1)
    return F.normalize(flat - flat.mean(0), dim=1)


def cross_style_hits(
    embeddings: torch.Tensor, concepts: Sequence[str], styles: Sequence[str]
) -> dict[tuple[str, str], dict[str, bool]]:
    """Top-1 hits: {(style A, style B): {concept: hit}} for all concepts drawn in both styles.

    Args:
        embeddings: N x D of unit vectors.
        concepts: N concept names. styles: N style names; a concept has at most one picture in a style.

    Raises:
        ValueError: fewer than two styles share a concept, or two pictures have equal concept and style.
    """
    members: dict[str, dict[str, int]] = {}
    for i, (concept, style) in enumerate(zip(concepts, styles, strict=True)):
        if concept in members.setdefault(style, {}):
            raise InputError(f"two pictures of concept {concept!r} in style {style!r}; keep one")
        members[style][concept] = i
    similarity = embeddings @ embeddings.T
    hits = {}
    for a, sources in members.items():
        for b, gallery in members.items():
            queries = [concept for concept in sources if concept in gallery]
            if a == b or not queries:
                continue
            rows = torch.tensor([sources[concept] for concept in queries])
            columns = torch.tensor(list(gallery.values()))
            nearest = similarity[rows.to(similarity.device)][:, columns.to(similarity.device)].argmax(1).tolist()
            names = list(gallery)
            hits[a, b] = {concept: names[j] == concept for concept, j in zip(queries, nearest)}
    if not hits:
        raise InputError(f"no concept is drawn in two styles (styles: {', '.join(members)}); nothing to retrieve")
    return hits


def retrieval_accuracy(hits: dict[tuple[str, str], dict[str, bool]]) -> float:
    """Mean over ordered style pairs of the share of hits, 0..1."""
    shares = [sum(found.values()) / len(found) for found in hits.values()]
    return sum(shares) / len(shares)
