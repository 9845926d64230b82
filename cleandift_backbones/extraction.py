"""Alias of `cleandift_backbones.features`, for code that imports from here."""

from .features import *  # noqa: F403
