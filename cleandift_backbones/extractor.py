"""Alias of `cleandift_backbones.features.extractor`, for code that imports from here."""

from .features.extractor import *  # noqa: F403
