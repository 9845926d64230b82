"""Features that `cleandift extract` wrote, read as a data set."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..utils.errors import InputError, UnknownKeyError
from .formats import FORMATS
from .store import StoreError, read_failures, read_meta, read_rows

OPEN_SHARDS = 16


class Element(dict):
    """Features of an image; a name that is missing raises an error that lists those there are."""

    def __missing__(self, name: str) -> None:
        raise UnknownKeyError(f"{name!r} is not stored for {self.get('key')}, which has {', '.join(self)}")


class Features(Dataset):
    """Features of pictures in a folder, by key or by number; one is read when it is asked for.

        features = Features("features")
        features["cat.jpg"]["us6"]          # C x h x w, or C if the run pooled
        for one in features: one["key"], one["us6"]

    An element is a dict: "key"; "width" and "height" of the picture in pixels; "input", the (height, width) that the
    model got; and a tensor by the name of each map, in the dtype that was stored. The order is that of sorted keys.

    Args:
        folder: `--out` of `cleandift extract`. It may still be written to: what was whole at the start is seen.
        maps: of those stored, the ones wanted. None: all.

    Attributes:
        keys: all keys. maps: names. meta: what the features were made with (meta.json).

    Raises:
        StoreError: the folder holds no features.
        ShardError: a shard is damaged.
        FileError: a shard cannot be read at the moment.
        KeyError: a map that is not there.
    """

    def __init__(self, folder: str | Path, maps: list[str] | None = None):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        settings = self.meta["settings"]
        self.kind = FORMATS[settings["format"]]
        self.maps = list(settings["maps"] if maps is None else maps)
        for name in self.maps:
            self._check(name)
        self.rows = read_rows(self.folder, settings["format"])
        if lacking := [row["key"] for row in self.rows if not row["shapes"].keys() >= set(self.maps)]:
            raise StoreError(f"{self.folder} is damaged: not all of {', '.join(self.maps)} are stored for {lacking[0]}")
        self.keys = [row["key"] for row in self.rows]
        self.numbers = {key: number for number, key in enumerate(self.keys)}
        self._open: OrderedDict[str, object] = OrderedDict()

    def _check(self, name: str) -> None:
        held = self.meta["settings"]["maps"]
        if name not in held:
            raise UnknownKeyError(f"map {name!r} is not in {self.folder}, which holds {', '.join(held)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: str) -> bool:
        return key in self.numbers

    def __iter__(self) -> Iterator[dict]:
        return (self[number] for number in range(len(self)))

    def _row(self, key: str | int) -> dict:
        if isinstance(key, str) and key not in self.numbers:
            raise UnknownKeyError(
                f"no features of {key!r} in {self.folder}, e.g. {', '.join(map(repr, self.keys[:3]))}"
            )
        return self.rows[self.numbers[key] if isinstance(key, str) else key]

    def __getitem__(self, key: str | int) -> dict:
        row = self._row(key)
        shard = self._shard(row["shard"])
        found = Element({name: row[name] for name in ("key", "width", "height", "input")})
        found.update({name: shard.get(row, name) for name in self.maps})
        return found

    def read(self, key: str | int, name: str) -> Tensor:
        """One map of one image, C x h x w, or C if the run pooled, without reading its other maps.

        Raises:
            UnknownKeyError: there is no such image, or no such map.
        """
        self._check(name)
        row = self._row(key)
        return self._shard(row["shard"]).get(row, name)

    def __repr__(self) -> str:
        settings = self.meta["settings"]
        shapes = {name: {"x".join(map(str, row["shapes"][name])) for row in self.rows} for name in self.maps}
        maps = ", ".join(f"{name} {min(found)}{', ...' * (len(found) > 1)}" for name, found in shapes.items() if found)
        return (
            f"Features({str(self.folder)!r}: {len(self):,} images; {maps or ', '.join(self.maps)}; "
            f"{settings.get('store_dtype')}, by {settings.get('model')})"
        )

    def stack(self, name: str | None = None) -> Tensor:
        """One map of all pictures, in the order of `keys`: N x ..., the first map unless `name` is given.

        Raises:
            ValueError: maps of different shapes. KeyError: a map that is not there.
        """
        name = name or self.maps[0]
        self._check(name)
        shapes = {tuple(row["shapes"][name]) for row in self.rows}
        if len(shapes) != 1:
            raise InputError(
                f"{len(shapes)} shapes of {name} in {self.folder} cannot be stacked; extract with --pool mean"
            )
        found = None
        for number, row in enumerate(self.rows):
            one = self._shard(row["shard"]).get(row, name)
            found = one.new_empty(len(self), *one.shape) if found is None else found
            found[number] = one
        return found

    @property
    def failures(self) -> list[dict]:
        """Pictures that could not be read: dicts of key, path, error."""
        return read_failures(self.folder, set(self.keys))

    def _shard(self, name: str):
        if name not in self._open:
            self._open[name] = self.kind(self.folder / name)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def __getstate__(self) -> dict:  # open files do not travel to workers
        return self.__dict__ | dict(_open=OrderedDict())
