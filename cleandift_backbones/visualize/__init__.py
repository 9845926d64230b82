"""Looking at features: three results as Python objects; `app` shows them on a page.

    from cleandift_backbones.visualize import match
    result = match(["cat-face_noto.png", "cat-face_fluentflat.png"], [(0, 0.19, 0.17)], map="us6")
    result.save("match.png"), result.save("match.safetensors")

results: what a result can do. matches, feature_maps, comparison: the three kinds, each a function that takes images
(files, or names of the samples that come with the package). figures: drawing them. pictures: reading images. features,
memory: features, computed once and kept within a bounded memory. The modules are not named like the functions: a
submodule `match` would replace the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import compare
    from .feature_maps import maps
    from .matches import match

__all__ = ["compare", "maps", "match"]

_LAZY = {"compare": "comparison", "maps": "feature_maps", "match": "matches"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
