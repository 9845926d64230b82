"""Alias of `cleandift_backbones.optimization.cpu_malloc`, for code that imports from here."""

from .optimization.cpu_malloc import *  # noqa: F403
