"""Alias of `cleandift_backbones.publish`, for code that imports from here."""

from .publish import *  # noqa: F403
