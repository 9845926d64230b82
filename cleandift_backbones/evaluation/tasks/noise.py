"""How much of a noisy feature is the noise: the parts of its variance, over the timestep."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...data.listing import left_out_report
from ...data.sources import ImageSource
from ...features.engines.local import process_place
from ...features.extractor import Extractor, ModelError, Pictures, extract
from ...utils.errors import InputError
from ...utils.progress import tqdm
from ..items import DataError, list_images
from ..task import Options, Task, limited, option, register_task
from .noise_report import Entry, Shares, shares_table, write_shares

CHUNK = 2**16  # numbers of each feature in memory in double precision at a time


def variance_shares(features: torch.Tensor) -> Shares:
    """Two-way decomposition of features I x J x D: I images, each under the same J noises.

    The model is f_ij = m + a_i + b_j + e_ij, vectors of D numbers: a_i is what the image adds whatever the noise, b_j
    what the noise adds whatever the image, e_ij the rest, a different answer of each image to each noise (features are
    deterministic: there is no other error). Summed over the D numbers, with means over a dot,

        MS_A = J / (I - 1)             sum_i  |f_i. - f..|^2       of expectation   J var(a) + var(e)
        MS_B = I / (J - 1)             sum_j  |f_.j - f..|^2                        I var(b) + var(e)
        MS_E = 1 / ((I - 1) (J - 1))   sum_ij |f_ij - f_i. - f_.j + f..|^2          var(e)

    (analysis of variance, one observation per cell: Searle, Casella, McCulloch, Variance Components, 1992). Hence
    var(a) = (MS_A - MS_E) / J and var(b) = (MS_B - MS_E) / I are unbiased; below 0 they are taken as 0. All of them are
    sums of dot products of the I J features with each other, which is what is computed.

    Intervals: 1.96 standard errors of the jackknife over images (Efron and Stein 1981), which leaves out each once. A
    bootstrap would not do: an image drawn twice looks like something that the noises have in common.

    Raises:
        ValueError: fewer than two images or noises; features that are all equal.
    """
    images, noises = features.shape[:2]
    if min(images, noises) < 2:
        raise InputError(f"{images} images under {noises} noises; a decomposition needs at least two of each")
    products = torch.zeros(images * noises, images * noises, dtype=torch.float64)
    for part in features.reshape(images * noises, -1).split(CHUNK, 1):
        part = part.double()
        part = part - part.mean(0)
        products += (part @ part.T).cpu()
    products = products.unflatten(1, (images, noises)).unflatten(0, (images, noises))
    parts = _parts(products)
    names = ("image", "noise", "both")
    if images == 2:
        return Shares(*parts.tolist())
    left = [[k for k in range(images) if k != i] for i in range(images)]
    found = torch.stack([_parts(products[some][:, :, some]) for some in left])
    error = ((images - 1) * found.var(0, unbiased=False)).sqrt() * 1.96
    intervals = torch.stack([parts - error, parts + error], 1).clamp(0, 1).tolist()
    return Shares(*parts.tolist(), {name: tuple(pair) for name, pair in zip(names, intervals, strict=True)})


def _parts(products: torch.Tensor) -> torch.Tensor:
    """The three shares from the dot products of the features, I x J x I x J."""
    images, noises = products.shape[:2]
    mean = products.mean()  # |f..|^2
    a = noises * (torch.einsum("ijik->", products) / noises**2 - images * mean)
    b = images * (torch.einsum("ijkj->", products) / images**2 - noises * mean)
    rest = (torch.einsum("ijij->", products) - images * noises * mean - a - b) / ((images - 1) * (noises - 1))
    rest = rest.clamp_min(0)
    parts = [(a / (images - 1) - rest) / noises, (b / (noises - 1) - rest) / images, rest]
    parts = torch.stack(parts).clamp_min(0)
    if parts.sum() <= 0:
        raise InputError("all features are equal; there is no variance to take apart")
    return parts / parts.sum()


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
        label = progress and f"{extractor.name}, noise {seed + 1} of {noises}"
        for name, maps in extract(extractor, pictures, batch_size, label, "cpu").items():
            runs[name].append(maps)
    return {name: variance_shares(torch.stack(parts, 1)) for name, parts in runs.items()}


@dataclass(frozen=True)
class NoiseOptions(Options):
    """Of the task noise."""

    noises: int = option(8, "noises per picture, at least 2", low=2)


@register_task
class Noise(Task):
    """The shares of all maps of noisy models over their timesteps. Each image goes through the model once per noise."""

    name = "noise"
    about = "how much of a noisy feature's variance is the noise: any folder of images, or shards"
    Options = NoiseOptions
    counted = "pictures"
    limit = 32
    stored = False
    noisy_only = True

    def __init__(self, images: Sequence[ImageSource], noises: int = 8):
        super().__init__(images)
        self.noises, self.info = noises, {}

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        left_out: Counter[str] = Counter()
        images = list_images(data, left_out)
        if len(images) < 2:
            words = left_out_report(left_out)
            raise DataError(f"{data}: {len(images)} pictures; a share of variance needs at least two {words}".strip())
        if left_out:
            tqdm.write(f"{data}: {left_out_report(left_out)}", file=sys.stderr)
        return cls([images[i] for i in limited(images, limit, seed)], options.noises)

    def run(self, context) -> list[Entry] | None:
        if process_place().rank:
            return None
        images, shares, config = [image.read() for image in self.items], [], context.config
        for run in tqdm(context.plan, desc="runs", unit="run", disable=not config.progress):
            extractor = context.load(run)
            found = noise_shares(extractor, images, self.noises, config.batch_size, progress=config.progress)
            shares += [(run.name, name, run.settings["timestep"], share) for name, share in found.items()]
        self.info = dict(task=self.name, command=context.command, pictures=len(images), noises=self.noises)
        self.info |= dict(seed=config.seed, device=str(context.device))
        return shares

    def write(self, report, folder):
        return write_shares(folder, report, self.info)

    def lines(self, report):
        return [shares_table(report)]
