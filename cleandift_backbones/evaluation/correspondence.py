"""Alias of `cleandift_backbones.features.correspondence`, for code that imports from here."""

from ..features.correspondence import *  # noqa: F403
