"""What else the emoji benchmark asks of maps: the subgroup of a picture, and where its figure ends.

Subgroups are Unicode's ("face-smiling", "animal-mammal"). A picture's nearest pictures of other concepts vote for it:
other drawings of its own concept would tell it too easily. The figure is what the drawing's own opacity says; a linear
map from each cell's feature to "figure" is fitted by least squares on half of the concepts and judged on the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from .tasks.segmentation import foreground_labels, overlaps

K = 10
RIDGE = 1e-3  # added to the correlations of standardised channels: only against channels that depend on each other


def subgroup_hits(
    embeddings: torch.Tensor, concepts: Sequence[str], subgroups: Sequence[str], k: int = K
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pictures get their subgroup by a vote of the k nearest pictures of other concepts.

    Args:
        embeddings: N x D of unit vectors.
        concepts, subgroups: N names each; "" for no subgroup.

    Returns:
        N bools; and N bools of which pictures count: those with another concept in their subgroup. None counts if there
        are fewer than k pictures of other concepts.
    """
    names = sorted(set(subgroups))
    labels = torch.tensor([names.index(name) for name in subgroups])
    numbers = {name: i for i, name in enumerate(dict.fromkeys(concepts))}
    of = torch.tensor([numbers[name] for name in concepts])
    other = of[:, None] != of
    members = {name: {c for c, s in zip(concepts, subgroups) if s == name} for name in names}
    counts = torch.tensor([bool(s) and len(members[s]) > 1 for s in subgroups]) & (other.sum(1) >= k)
    if not counts.any():
        return torch.zeros(len(labels), dtype=torch.bool), counts
    similarity = (embeddings @ embeddings.T).cpu().masked_fill(~other, -torch.inf)
    nearest = labels[similarity.topk(k, dim=1).indices]
    votes = torch.zeros(len(labels), len(names)).scatter_add_(1, nearest, torch.ones(nearest.shape))
    return (votes.argmax(1) == labels) & counts, counts


def halves(concepts: Sequence[str], seed: int) -> torch.Tensor:
    """N bools: pictures of the half of the concepts, drawn by the seed, that the probe is fitted on."""
    names = sorted(set(concepts))
    random.Random(seed).shuffle(names)
    chosen = set(names[: len(names) // 2])
    return torch.tensor([name in chosen for name in concepts])


def figure_counts(maps: torch.Tensor, alphas: torch.Tensor, fitted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The figure probe: intersections and unions of the pictures that it was not fitted on.

    Args:
        maps: N x C x h x w.
        alphas: N x S x S opacities, 0..1.
        fitted: N bools.

    Returns:
        Intersections and unions in pixels, M x 2 (ground, figure), of the M other pictures in their order; predictions
        upsampled by nearest neighbour, as in `segmentation`.
    """
    cells, maps = tuple(maps.shape[2:]), maps.float().cpu()
    share = torch.nn.functional.interpolate((alphas[:, None] >= 0.5).float(), cells, mode="area")[:, 0]
    x = maps[fitted].movedim(1, -1).flatten(0, 2)
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, y = (x - mean) / deviation, share[fitted].flatten() - 0.5
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean()) / len(x))
    scores = torch.einsum("nchw,c->nhw", maps[~fitted] - mean[:, None, None], weights / deviation) + y.mean()
    hits, unions = [], []
    for score, alpha in zip(scores, alphas[~fitted], strict=True):
        one = foreground_labels(alpha.numpy(), cells)
        both, union = overlaps(one, (score > 0).long().flatten(), 2)
        hits.append(both)
        unions.append(union)
    return torch.stack(hits), torch.stack(unions)
