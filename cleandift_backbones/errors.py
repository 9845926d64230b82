"""Alias of `cleandift_backbones.utils.errors`, for code that imports from here."""

from .utils.errors import *  # noqa: F403
