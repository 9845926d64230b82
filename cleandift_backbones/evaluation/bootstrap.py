"""Hits counted per concept, and how sure one can be of their rate.

Pictures of one concept resemble each other, so concepts, not points or queries, are resampled. Rows of a table that are
resampled with the same weights can be compared pairwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
MOST = 4000  # units that are drawn one by one


@dataclass
class Tally:
    """Hits and trials, each K concepts (or pictures) x G groups.

    The rate is the mean over groups of hits / trials, pooled over concepts. Groups are style pairs in retrieval; PCK
    per point has a single one.
    """

    hits: np.ndarray
    trials: np.ndarray

    @property
    def rate(self) -> float:
        """0..1."""
        return float(self.resampled(np.ones((1, len(self.hits))))[0])

    def group(self, number: int) -> Tally:
        """One of the groups alone."""
        return Tally(self.hits[:, number : number + 1], self.trials[:, number : number + 1])

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """Rates under weights R x K of the concepts: R numbers; groups without trials are left out, NaN if all are."""
        hits, trials = (weights @ _pooled(x, weights.shape[1]) for x in (self.hits, self.trials))
        groups = (trials > 0).sum(1)
        rates = (hits / np.maximum(trials, 1)).sum(1)
        return np.where(groups > 0, rates / np.maximum(groups, 1), np.nan)


def _pooled(counts: np.ndarray, units: int) -> np.ndarray:
    """Sums over `units` groups of equal size, drawn at random, the same for all tallies."""
    if len(counts) <= units:
        return counts
    group = np.random.default_rng(0).permutation(len(counts)) % units
    return np.stack([np.bincount(group, column, units) for column in counts.T], 1)


def unit_weights(units: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each unit (concept, picture) is drawn in each of the bootstrap's resamples: resamples x units.

    More than 4000 units are pooled into 4000 groups at random, and these are drawn: of independent units that has the
    same expected variance, and ImageNet's 1.28 M take no more memory (64 MB) than 4000.
    """
    units = min(units, MOST)
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), resamples).astype(float)


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def rate_interval(tally: Tally, weights: np.ndarray) -> tuple[float, float]:
    """95 % interval of a rate; weights R x K from `unit_weights`."""
    return interval(tally.resampled(weights))


def difference(a: Tally, b: Tally, weights: np.ndarray) -> tuple[float, float, float]:
    """Rate of a minus rate of b, with its paired 95 % interval: (difference, low, high)."""
    return a.rate - b.rate, *interval(a.resampled(weights) - b.resampled(weights))
