"""Looking at features: three results, from Python and on a page (`make app`).

    from cleandift_backbones.app import match
    result = match(["cat-face_noto.png", "cat-face_fluentflat.png"], [(0, 0.19, 0.17)], map="us6")
    result.save("match.png"), result.save("match.safetensors")

results: what a result can do. matching, mapping, comparing: the three kinds, each a function that takes pictures
(files, or names of the samples that come with the package). pictures: reading them. extracting, store: features,
computed once and kept within a bounded memory. naming: what a model's name stands for. sessions, answers, views,
routes, page: the page; it needs the extra `[demo]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparing import compare
    from .mapping import maps
    from .matching import match

__all__ = ["compare", "maps", "match"]

_LAZY = {"compare": "comparing", "maps": "mapping", "match": "matching"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
