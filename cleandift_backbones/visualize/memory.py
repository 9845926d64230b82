"""Features kept within a bounded memory, each as long as somebody looks at its picture."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Entry:
    """All maps of one picture from one model, and how long computing them took.

    Attributes:
        maps: {map name: C x h x w}, float32 on the CPU.
        seconds: wall-clock time of the forward pass.
    """

    maps: dict[str, torch.Tensor]
    seconds: float
    owners: set[Hashable] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(m.numel() * m.element_size() for m in self.maps.values())


class FeatureStore:
    """Entries by key, the longest unused of which make room for new ones.

    An entry belongs to those who asked for it: when the last of them is forgotten, it goes. Visitors with the same
    picture share an entry and cannot tell. Safe to use from several threads.

    Args:
        limit: bytes of all entries together.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(entry.size for entry in self._entries.values())

    def get(self, key: Hashable, owner: Hashable) -> Entry | None:
        """The entry, which from now on also belongs to `owner`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                entry.owners.add(owner)
            return entry

    def put(self, key: Hashable, entry: Entry, owner: Hashable) -> None:
        """Keeps an entry; one that alone is larger than the limit is not kept."""
        with self._lock:
            entry.owners.add(owner)
            self._entries[key] = entry
            self._entries.move_to_end(key)
            held = sum(entry.size for entry in self._entries.values())
            while held > self.limit:
                held -= self._entries.popitem(last=False)[1].size

    def forget(self, owner: Hashable) -> None:
        """Removes `owner`, and with it what belongs to nobody else."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                entry.owners.discard(owner)
                if not entry.owners:
                    del self._entries[key]
