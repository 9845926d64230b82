"""Semantic correspondence: where in the target picture is the thing that a point marks in the source picture?

The protocol of DIFT ("Emergent Correspondence from Image Diffusion", section 4) and of CleanDIFT: both maps are
upsampled bilinearly to their pictures' sizes, the source map is read at the point's pixel, and the pixel of the target
map with the largest cosine similarity is the answer.

Nothing of that size is ever built here. Upsampling is linear, so the dot product with a source vector can be taken on
the small map and upsampled afterwards; and the squared length of an upsampled vector is a quadratic form in the dot
products of neighbouring cells, which are five small maps. Both are exact, and cost C x h x w instead of C x H x W.

Points are (x, y) in pixel units where whole numbers are pixel centres (0 is the first pixel), as SPair-71k gives them.
Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..utils.errors import InputError

EPS = 1e-12
CANCELLED = 1e-5  # of the cells' own squared lengths: below, rounding is all that is left of a sum of opposite cells
Size = tuple[int, int]


def interpolation_matrix(cells: int, pixels: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The pixels x cells matrix of torch's linear interpolation (align_corners=False)."""
    return F.interpolate(torch.eye(cells, device=device)[None], size=pixels, mode="linear", align_corners=False)[0].T


def window_matrix(cells: int, pixels: int, start: float, length: float, whole: int) -> torch.Tensor:
    """Linear interpolation to a picture that takes only a part of what the map shows (mode "pad").

    The map's cells cover an input of `whole` pixels, of which [start, start + length) show the picture's `pixels`.
    Pixel centres lie at + 0.5, and beyond the outermost cells' centres the map goes on unchanged, as in torch's
    interpolation (align_corners=False), which this equals for start = 0 and length = whole.

    Returns:
        pixels x cells.
    """
    inside = start + (torch.arange(pixels, dtype=torch.float64) + 0.5) * length / pixels
    position = (inside * cells / whole - 0.5).clamp(0, cells - 1)
    low = position.floor().clamp(max=max(cells - 2, 0)).long()
    share = (position - low).float()
    matrix = torch.zeros(pixels, cells)
    matrix.scatter_(1, low[:, None], 1 - share[:, None])
    if cells > 1:
        matrix.scatter_(1, low[:, None] + 1, share[:, None])
    return matrix


def upsampled_norm(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Length of every vector of bilinearly upsampled maps: N x C x h x w -> N x H x W, without upsampling them."""
    rows, columns = (interpolation_matrix(n, m, maps.device) for n, m in zip(maps.shape[-2:], size, strict=True))
    return interpolated_norm(maps, rows, columns)


def interpolated_norm(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The same for any two matrices of linear interpolation, H x h and W x w.

    Where opposite neighbours cancel to less than 0.3 % of their lengths, that is given: cosines there tend to 0.
    """
    # weight of a cell with itself, and (twice, by symmetry) of a cell with its neighbour; only two neighbours ever meet
    rows_same, rows_next = rows.square(), 2 * rows[:, :-1] * rows[:, 1:]
    columns_same, columns_next = columns.square(), 2 * columns[:, :-1] * columns[:, 1:]
    up, down, left, right = maps[:, :, :-1], maps[:, :, 1:], maps[..., :-1], maps[..., 1:]
    cell = maps.square().sum(1)
    below = (up * down).sum(1)
    beside = (left * right).sum(1)
    across = ((up[..., :-1] * down[..., 1:]).sum(1) + (up[..., 1:] * down[..., :-1]).sum(1)) / 2
    squared = rows_same @ cell @ columns_same.T + rows_next @ below @ columns_same.T
    squared = squared + rows_same @ beside @ columns_next.T + rows_next @ across @ columns_next.T
    least = CANCELLED * (rows @ cell @ columns.T)
    return squared.maximum(least.clamp_min(EPS**2)).sqrt()


def read_points(maps: torch.Tensor, points: torch.Tensor, size: Size) -> torch.Tensor:
    """Vectors of bilinearly upsampled maps at pixels: maps N x C x h x w, points N x P x 2 -> N x P x C.

    Raises:
        ValueError: a point outside the picture.
    """
    height, width = size
    pixel = points.round().long()  # the pixel that holds the point
    x, y = pixel[..., 0], pixel[..., 1]
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        first = tuple(points[outside][0].tolist())
        raise InputError(f"point {first} lies outside the picture of {width}x{height} pixels")
    rows = interpolation_matrix(maps.shape[-2], height, maps.device)[y]  # N x P x h
    columns = interpolation_matrix(maps.shape[-1], width, maps.device)[x]
    weights = rows[..., :, None] * columns[..., None, :]
    return torch.einsum("nphw,nchw->npc", weights, maps)


def score_maps(
    vectors: torch.Tensor, maps: torch.Tensor, size: Size, norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Cosine similarity of vectors to every pixel of upsampled maps.

    Args:
        vectors: N x P x C.
        maps: N x C x h x w.
        size: height and width to upsample to.
        norms: `upsampled_norm(maps, size)` if it is known already.

    Returns:
        N x P x H x W, -1..1.
    """
    norms = upsampled_norm(maps, size) if norms is None else norms
    rows, columns = (interpolation_matrix(n, m, maps.device) for n, m in zip(maps.shape[-2:], size, strict=True))
    small = torch.einsum("npc,nchw->nphw", F.normalize(vectors, dim=-1, eps=EPS), maps)
    return rows @ small @ columns.T / norms[:, None]


def peaks(scores: torch.Tensor) -> torch.Tensor:
    """The best pixel of each score map: ... x H x W -> ... x 2, as (x, y)."""
    best = scores.flatten(-2).argmax(-1)
    return torch.stack([best % scores.shape[-1], best // scores.shape[-1]], -1).float()


def match_points(
    source_map: torch.Tensor, target_map: torch.Tensor, points: torch.Tensor, source_size: Size, target_size: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds points of a source picture in a target picture.

    Args:
        source_map: C x h x w, the source picture's features; any float type, computed in float32.
        target_map: C x h' x w'.
        points: P x 2, (x, y) in pixels of the source picture.
        source_size: (height, width) of the source picture.
        target_size: (height, width) of the target picture.

    Returns:
        The matches, P x 2, (x, y) in pixels of the target picture; and the score maps (cosine, -1..1), P x H x W.

    Raises:
        ValueError: maps of different channel counts, or a point outside the source picture.
    """
    if source_map.shape[0] != target_map.shape[0]:
        counts = f"{source_map.shape[0]} and {target_map.shape[0]}"
        raise InputError(f"maps have {counts} channels; take both from one model and map")
    source, target = source_map.float()[None], target_map.float()[None]
    points = torch.as_tensor(points, dtype=torch.float32, device=source.device).reshape(1, -1, 2)
    scores = score_maps(read_points(source, points, source_size), target, target_size)[0]
    return peaks(scores), scores


def heat_map(
    source_map: torch.Tensor, target_map: torch.Tensor, point: Sequence[float], source_size: Size, target_size: Size
) -> torch.Tensor:
    """Similarity of one source point to every place of the target picture, for looking at: H x W, 0..1."""
    _, scores = match_points(source_map, target_map, torch.as_tensor([list(point)]), source_size, target_size)
    return contrast(scores[0])


def contrast(scores: torch.Tensor) -> torch.Tensor:
    """Scores H x W stretched to 0..1."""
    low, high = scores.amin(), scores.amax()
    return (scores - low) / (high - low).clamp_min(EPS)


def pck(predicted: torch.Tensor, truth: torch.Tensor, sizes: torch.Tensor | float, alpha: float = 0.1) -> torch.Tensor:
    """Which points are found: those no farther than alpha times the reference length from the truth.

    Args:
        predicted, truth: ... x 2, (x, y) in pixels.
        sizes: reference length in pixels per point (or one for all): the longer side of the target's picture or box.
        alpha: the tolerated share of it.

    Returns:
        A bool per point; its mean is PCK@alpha per point.
    """
    return (predicted - truth).norm(dim=-1) <= alpha * torch.as_tensor(sizes, device=predicted.device)
