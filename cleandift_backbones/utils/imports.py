"""A function that runs once another package is imported, so that importing this one need not import that one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Calls a function at once if a module is imported already, otherwise right after its first import.

    Args:
        name: dotted name of the module.
        call: what it raises is raised by the `import` statement of the module.
    """
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    def __init__(self, name: str, call: Callable[[], object]):
        self.name, self.call = name, call

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        # Only the finders behind this one: another watch would ask this one again.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else sys.meta_path
        others = (getattr(finder, "find_spec", None) for finder in behind)
        spec = next(filter(None, (find(name, path, target) for find in others if find)), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: object) -> None:
            execute(module)
            if self in sys.meta_path:  # only once: a spec may have been made before without being used
                sys.meta_path.remove(self)
                self.call()

        spec.loader.exec_module = exec_module
        return spec
