"""Matching of keypoints at the size of SPair-71k's test split, on random features of SD 2.1's us6."""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time

import torch

from cleandift_backbones.evaluation.tasks.matching import match_pairs
from cleandift_backbones.evaluation.tasks.pairs import Pair, PairSet

PAIRS = 12234  # of SPair-71k's test split, of 18 categories
CATEGORIES = 18
POINTS = (3, 12)  # keypoints of a pair, between; 7.2 on average in SPair-71k
SIZES = ((375, 500), (375, 500), (500, 375), (333, 500))  # PASCAL's pictures, height and width
CHANNELS, CELLS = 1280, 48  # us6 of SD 2.1 at 768 x 768
KEPT = 32  # different maps; more would only take disk


class Maps:
    """Stands for features on the disk: float16, as the cache holds them, and a new tensor for each reading."""

    def __init__(self, count: int):
        self.count = count
        generator = torch.Generator().manual_seed(0)
        self.maps = torch.randn(min(KEPT, count), CHANNELS, CELLS, CELLS, generator=generator).half()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.maps[index % len(self.maps)].clone()


def make_pairs(count: int) -> PairSet:
    """All ordered pairs of as many pictures per category as give `count` pairs or a few more, cut to `count`."""
    rng = random.Random(0)
    members = 2
    while CATEGORIES * members * (members - 1) < count:
        members += 1
    sizes = [rng.choice(SIZES) for _ in range(CATEGORIES * members)]

    def points(place: int, number: int) -> torch.Tensor:
        height, width = sizes[place]
        return torch.tensor([[rng.randrange(width), rng.randrange(height)] for _ in range(number)]).float()

    pairs = []
    for category in range(CATEGORIES):
        for a in range(category * members, (category + 1) * members):
            for b in range(category * members, (category + 1) * members):
                if a != b:
                    number = rng.randint(*POINTS)
                    pairs.append(Pair(a, b, points(a, number), points(b, number), str(category), 200.0))
    rng.shuffle(pairs)
    return PairSet("random", [None] * len(sizes), sizes, pairs[:count])


def matching(options: argparse.Namespace) -> dict:
    """Pairs per second of `match_pairs`, several times, and the most memory that the process held."""
    if options.threads:
        torch.set_num_threads(options.threads)
    data = make_pairs(options.pairs)
    features, seconds = Maps(len(data.items)), []
    for _ in range(options.repeat):
        clock = time.perf_counter()
        match_pairs(features, data)
        seconds.append(time.perf_counter() - clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    points = sum(len(pair.source_points) for pair in data.pairs) / len(data.pairs)
    found = dict(pairs=len(data.pairs), pictures=len(data.items), points=points, seconds=seconds, peak=peak)
    return found | dict(threads=torch.get_num_threads())


def matching_table(found: dict, options: argparse.Namespace) -> str:
    rates = sorted(found["pairs"] / seconds for seconds in found["seconds"])
    return (
        f"{found['pairs']} pairs of {found['pictures']} pictures, {found['points']:.1f} keypoints each, maps of "
        f"{CHANNELS} x {CELLS} x {CELLS}: {rates[len(rates) // 2]:.0f} pairs/s ({rates[0]:.0f} to {rates[-1]:.0f} in "
        f"{len(rates)} runs), {found['peak'] / 2**30:.1f} GB at most; {found['threads']} CPU threads, "
        f"torch {torch.__version__}\n"
    )
