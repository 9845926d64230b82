"""Seeds of single steps: all randomness of a step comes from `(seed, step)`.

A resumed run sees the batches and the noise that an uninterrupted one would have seen, and no generator's
state has to be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError


def mix_seed(*parts: int) -> int:
    """Folds integers into one seed below 2**63 (splitmix64), so that neighbouring parts give unrelated seeds."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def step_generator(device: torch.device, *parts: int) -> torch.Generator:
    """A generator on `device` whose numbers depend on `parts` (seed, step, ...) alone."""
    return torch.Generator(device).manual_seed(mix_seed(*parts))


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which of `count` samples step number `step` trains on: int64, `batch_size` of them.

    Epochs are seeded permutations laid end to end, so that every sample comes up once before any comes up again.
    """
    if batch_size < 1 or count < 1:
        raise InputError(f"batch_size={batch_size} of {count} samples: both must be at least 1")
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // count, (last - 1) // count + 1):
        order = torch.randperm(count, generator=step_generator(torch.device("cpu"), seed, epoch, 1))
        parts.append(order[max(first - epoch * count, 0) : last - epoch * count])
    return torch.cat(parts)
