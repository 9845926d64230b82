"""Hits counted per concept, and how sure one can be of their rate.

Pictures of one concept resemble each other, so concepts, not points or queries, are resampled. Rows of a table that are
resampled with the same weights can be compared pairwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass
class Tally:
    """Hits and trials, each K concepts x G groups.

    The rate is the mean over groups of hits / trials, pooled over concepts. Groups are style pairs in retrieval; PCK
    per point has a single one.
    """

    hits: np.ndarray
    trials: np.ndarray

    @property
    def rate(self) -> float:
        """0..1."""
        return float(self.resampled(np.ones((1, len(self.hits))))[0])

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """Rates under weights R x K of the concepts: R numbers; groups without trials are left out, NaN if all are."""
        hits, trials = weights @ self.hits, weights @ self.trials
        groups = (trials > 0).sum(1)
        rates = (hits / np.maximum(trials, 1)).sum(1)
        return np.where(groups > 0, rates / np.maximum(groups, 1), np.nan)


def concept_weights(concepts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each concept is drawn in each of the bootstrap's resamples: resamples x concepts."""
    return np.random.default_rng(seed).multinomial(concepts, np.full(concepts, 1 / concepts), resamples).astype(float)


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def rate_interval(tally: Tally, weights: np.ndarray) -> tuple[float, float]:
    """95 % interval of a rate; weights R x K from `concept_weights`."""
    return interval(tally.resampled(weights))


def difference(a: Tally, b: Tally, weights: np.ndarray) -> tuple[float, float, float]:
    """Rate of a minus rate of b, with its paired 95 % interval: (difference, low, high)."""
    return a.rate - b.rate, *interval(a.resampled(weights) - b.resampled(weights))
