"""How much of a noisy feature is the noise: the parts of its variance, over the timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .features import Extractor, ModelError, Pictures, extract


@dataclass
class Shares:
    """Parts of a noisy feature's variance, each 0..1, together 1: image, noise, and what both do only together."""

    image: float
    noise: float
    both: float


def variance_shares(features: torch.Tensor) -> Shares:
    """Two-way decomposition of features I x J x D: I images, each under the same J noises.

    The model is f_ij = m + a_i + b_j + e_ij, vectors of D numbers: a_i is what the image adds whatever the noise, b_j
    what the noise adds whatever the image, e_ij the rest, a different answer of each image to each noise (features are
    deterministic: there is no other error). Summed over the D numbers, with means over a dot,

        MS_A = J / (I - 1)             sum_i  |f_i. - f..|^2       of expectation   J var(a) + var(e)
        MS_B = I / (J - 1)             sum_j  |f_.j - f..|^2                        I var(b) + var(e)
        MS_E = 1 / ((I - 1) (J - 1))   sum_ij |f_ij - f_i. - f_.j + f..|^2          var(e)

    (analysis of variance, one observation per cell: Searle, Casella, McCulloch, Variance Components, 1992). Hence
    var(a) = (MS_A - MS_E) / J and var(b) = (MS_B - MS_E) / I are unbiased; below 0 they are taken as 0.

    Raises:
        ValueError: fewer than two images or noises; features that are all equal.
    """
    images, noises = features.shape[:2]
    if min(images, noises) < 2:
        raise ValueError(f"{images} images under {noises} noises; a decomposition needs at least two of each")
    f = features.double().flatten(2)
    by_image, by_noise, mean = f.mean(1, keepdim=True), f.mean(0, keepdim=True), f.mean((0, 1), keepdim=True)
    rest = (f - by_image - by_noise + mean).square().sum().item() / ((images - 1) * (noises - 1))
    a = (by_image - mean).square().sum().item() * noises / (images - 1)
    b = (by_noise - mean).square().sum().item() * images / (noises - 1)
    parts = [max(0.0, (a - rest) / noises), max(0.0, (b - rest) / images), rest]
    total = sum(parts)
    if total <= 0:
        raise ValueError("all features are equal; there is no variance to take apart")
    return Shares(*(part / total for part in parts))


def noise_shares(
    extractor: Extractor, pictures: Pictures, noises: int = 8, batch_size: int = 8, progress: bool = False
) -> dict[str, Shares]:
    """Of all maps of a noisy model at its timestep, with one noise at a time: {map name: Shares}.

    Raises:
        ModelError: a model without noise, or one that averages several.
    """
    if not extractor.reseed(0):
        raise ModelError(f"{extractor.name} draws no noise; give a dift_* model")
    if any(getattr(module, "ensemble_size", 1) != 1 for module in extractor.model.modules()):
        raise ModelError(f"{extractor.name} averages noises; the decomposition is of one: ensemble_size=1")
    runs: dict[str, list[torch.Tensor]] = {name: [] for name in extractor.maps}
    for seed in range(noises):
        extractor.reseed(seed)
        for name, maps in extract(extractor, pictures, batch_size, progress, "cpu").items():
            runs[name].append(maps)
    return {name: variance_shares(torch.stack(parts, 1)) for name, parts in runs.items()}
