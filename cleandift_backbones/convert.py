"""Alias of `cleandift_backbones.publish.convert`, for code that imports from here."""

from .publish.convert import *  # noqa: F403
