"""Keypoints of many pairs found by their features, and PCK of what was found.

A map is read once as a source and once as a target, whatever the number of pairs: 12,234 pairs of SPair-71k need one
map of SD 2.1's us6 in memory at a time, and the vectors of the keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...features.correspondence import EPS, interpolated_norm, interpolation_matrix, pck, window_matrix
from ...utils.progress import tqdm
from ..bootstrap import Tally
from ..features import MapFeatures
from ..items import DataError
from .pairs import PairSet, Size, categories

CHUNK = 2**22  # scores in memory at a time, 16 MB: about what stays in a processor's cache
ALPHAS = (0.1, 0.05, 0.15)


def frame(size: Size, cells: Size, mode: str = "squash", whole: Size = (0, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices that bring a map of `cells` to a picture of `size` pixels: H x h and W x w.

    "squash": the map shows the picture. "pad": it shows a canvas of `whole` pixels, in which the picture was fitted as
    `images.to_input` does it.
    """
    if mode == "squash":
        return tuple(interpolation_matrix(n, m) for n, m in zip(cells, size, strict=True))
    ratio = min(whole[0] / size[0], whole[1] / size[1])
    matrices = []
    for n, m, canvas in zip(cells, size, whole, strict=True):
        length = max(1, round(m * ratio))
        matrices.append(window_matrix(n, m, (canvas - length) // 2, length, canvas))
    return tuple(matrices)


def match_pairs(
    features: MapFeatures | Sequence[torch.Tensor],
    data: PairSet,
    mode: str = "squash",
    whole: Size = (0, 0),
    window: int = 0,
    temperature: float = 0.04,
    progress: bool = True,
) -> list[torch.Tensor]:
    """Finds every pair's source points in its target picture.

    The protocol of DIFT (section 4), exactly: both maps upsampled bilinearly to their pictures, cosine similarity of
    the source's vector at its pixel with every target pixel, the best one.

    Args:
        features: maps C x h x w of `data.items`.
        data: the pairs.
        mode, whole: how pictures were brought to the model's input, see `frame`.
        window: 0 for the best pixel; otherwise the mean position under a softmax of the scores in a window of that many
            pixels' side around it (the window soft-argmax of GeoAware-SC, arXiv 2311.17034, here on the
            upsampled scores).
        temperature: of that softmax.

    Returns:
        P x 2 of (x, y) in pixels of the target picture, per pair.
    """
    sources, targets = _by_picture(data, "source"), _by_picture(data, "target")
    vectors: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}
    with tqdm(total=len(data.pairs), desc="pairs", unit="pair", disable=not progress, leave=False) as bar:
        for picture, pairs in sources.items():
            maps = features[picture].float()
            rows, columns = frame(data.sizes[picture], maps.shape[1:], mode, whole)
            points = torch.cat([data.pairs[k].source_points for k in pairs]).round().long()
            unique, back = points.unique(dim=0, return_inverse=True)  # pairs of a picture share most of its keypoints
            partial = torch.einsum("pw,chw->pch", columns[unique[:, 0]], maps)
            vector = torch.einsum("ph,pch->pc", rows[unique[:, 1]], partial)
            vector = F.normalize(vector, dim=1, eps=EPS)[back]
            counts = [len(data.pairs[k].source_points) for k in pairs]
            vectors |= dict(zip(pairs, vector.split(counts), strict=True))
        for picture, pairs in targets.items():
            maps = features[picture].float()
            rows, columns = frame(data.sizes[picture], maps.shape[1:], mode, whole)
            queries = torch.cat([vectors.pop(k) for k in pairs])
            if queries.shape[1] != len(maps):
                raise DataError(
                    f"maps have {queries.shape[1]} and {len(maps)} channels; take all from one model and map"
                )
            answers = _answers(queries, maps, rows, columns, window, temperature)
            counts = [len(data.pairs[k].target_points) for k in pairs]
            found |= dict(zip(pairs, answers.split(counts), strict=True))
            bar.update(len(pairs))
    return [found[k] for k in range(len(data.pairs))]


def _by_picture(data: PairSet, side: str) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for k, pair in enumerate(data.pairs):
        groups.setdefault(getattr(pair, side), []).append(k)
    return dict(sorted(groups.items()))


def _answers(queries, maps, rows, columns, window, temperature) -> torch.Tensor:
    """Places Q x 2 of unit vectors Q x C in one upsampled map."""
    inverse = interpolated_norm(maps[None], rows, columns)[0].reciprocal_()
    small = (queries @ maps.flatten(1)).unflatten(1, maps.shape[1:])
    answers = []
    for part in small.split(max(1, CHUNK // inverse.numel())):
        scores = (rows @ (part @ columns.T)).mul_(inverse)
        y = scores.amax(2).argmax(1)
        x = scores[torch.arange(len(part)), y].argmax(1)
        best = torch.stack([x, y], 1).float()
        answers.append(_soft(scores, x, y, window, temperature) if window else best)
    return torch.cat(answers)


def _soft(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor, window: int, temperature: float) -> torch.Tensor:
    radius, (height, width) = window // 2, scores.shape[1:]
    places = []
    for score, column, row in zip(scores, x.tolist(), y.tolist(), strict=True):
        top, left = max(0, row - radius), max(0, column - radius)
        part = score[top : min(height, row + radius + 1), left : min(width, column + radius + 1)]
        weight = (part / temperature).flatten().softmax(0).view_as(part)
        down, right = (torch.arange(n, dtype=torch.float32) for n in part.shape)
        places.append(torch.stack([left + (weight.sum(0) * right).sum(), top + (weight.sum(1) * down).sum()]))
    return torch.stack(places)


def same_position(data: PairSet) -> list[torch.Tensor]:
    """The answer that looks at no image: each source point's place, in parts of the image's sides, in the target.

    Returns:
        P x 2 of (x, y) in pixels of the target image, per pair.
    """
    found = []
    for pair in data.pairs:
        (source_height, source_width), (height, width) = data.sizes[pair.source], data.sizes[pair.target]
        scale = torch.tensor([width / source_width, height / source_height])
        found.append((pair.source_points + 0.5) * scale - 0.5)  # whole numbers are centres of pixels
    return found


def pck_tallies(found: Sequence[torch.Tensor], data: PairSet, alphas: Sequence[float] = ALPHAS) -> dict[str, Tally]:
    """PCK of what was found, to be resampled over target pictures.

    Keys are "REFERENCE@ALPHA MODE": the reference length is that of the target's `bbox` or `img` (its longer side);
    `per point` pools all points (the CleanDIFT paper's), `per image` is the mean over pairs of each pair's share. With
    the first alpha also "... per point, CATEGORY". bbox is left out where a pair has no box.
    """
    targets = {picture: k for k, picture in enumerate(sorted({pair.target for pair in data.pairs}))}
    names = categories(data.pairs)
    references = {"bbox": [pair.box for pair in data.pairs], "img": [max(data.sizes[p.target]) for p in data.pairs]}
    tallies = {}
    for reference, lengths in references.items():
        if None in lengths:
            continue
        for alpha in alphas:
            modes = {mode: np.zeros((2, len(targets), 1)) for mode in ("per point", "per image", *names)}
            for pair, points, length in zip(data.pairs, found, lengths, strict=True):
                hits = pck(points, pair.target_points, length, alpha).float()
                k = targets[pair.target]
                modes["per point"][:, k, 0] += hits.sum().item(), len(hits)
                modes["per image"][:, k, 0] += hits.mean().item(), 1
                if pair.category:
                    modes[pair.category][:, k, 0] += hits.sum().item(), len(hits)
            for mode in ("per point", "per image"):
                tallies[f"{reference}@{alpha:g} {mode}"] = Tally(*modes[mode])
            if alpha == alphas[0] and len(names) > 1:
                tallies |= {f"{reference}@{alpha:g} per point, {name}": Tally(*modes[name]) for name in names}
    return tallies
