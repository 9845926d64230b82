"""The page of `make app`, over the results of `cleandift_backbones.visualize`; it needs the extra `[demo]`.

page: what it consists of. sessions: the state of each visitor. answers: from a state to results. views: from results to
HTML. routes: the files that it serves.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..visualize import compare, maps, match

__all__ = ["compare", "maps", "match"]  # aliases, for code that imports them from here


def __getattr__(name: str):
    if name in __all__:
        from .. import visualize

        return getattr(visualize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
