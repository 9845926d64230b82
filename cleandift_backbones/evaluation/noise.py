"""Alias of `cleandift_backbones.evaluation.tasks.noise`, for code that imports from here."""

from ..evaluation.tasks.noise import *  # noqa: F403
