"""A shard of features as one file: safetensors or Parquet. Each holds its own index, so that a rename publishes both.

A row of the index: key; width and height of the picture; input, the (height, width) that the model got; shapes, of each
map; row, where in the shard.

safetensors: for each size of input and each map a tensor "us6/512x384", N x C x h x w ("us6", N x C, where pooled), of
which `row` counts the first dimension; the rows as JSON in the metadata, and a checksum.
Parquet: a row per picture: key, width, height, input, and for each map its numbers as a flat list and "us6_shape".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.save import write_file
from ..utils.atomic import DamagedFileError, open_tensors, readable_size, reading
from ..utils.errors import FileError, InputError, needs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GROUP_BYTES = 2**22  # of a row group of Parquet, which is read at once


class ShardError(InputError):
    """A shard that is damaged."""


def is_row(found: object) -> bool:
    """Whether something that was read is a row of an index, with all fields and of the right types."""

    def numbers(value: object) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(one, int) for one in value)

    return (
        isinstance(found, dict)
        and isinstance(found.get("key"), str)
        and all(isinstance(found.get(name), int) for name in ("width", "height", "row"))
        and numbers(found.get("input"))
        and len(found["input"]) == 2
        and isinstance(found.get("shapes"), dict)
        and all(map(numbers, found["shapes"].values()))
    )


class Computed(NamedTuple):
    """A batch on the CPU: keys; (width, height) of the pictures; (height, width) of the input; {map: N x ...}."""

    keys: list[str]
    sizes: list[tuple[int, int]]
    input: tuple[int, int]
    maps: dict[str, Tensor]

    def rows(self) -> list[dict]:
        shapes = {name: list(tensor.shape[1:]) for name, tensor in self.maps.items()}
        return [
            dict(key=key, width=size[0], height=size[1], input=list(self.input), shapes=shapes)
            for key, size in zip(self.keys, self.sizes)
        ]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.maps.values())


class Safetensors:
    """A safetensors shard, opened. `get(row, map)` is C x h x w, or C where it was pooled.

    Raises:
        ShardError: damaged. FileError: it cannot be opened at the moment.
    """

    suffix = ".safetensors"

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open_tensors(path)
            self._rows = json.loads((self.file.metadata() or {})["rows"])
            if not all(map(is_row, self._rows)):
                raise KeyError("rows")
        except DamagedFileError as error:
            raise ShardError(str(error)) from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is damaged (no rows in its metadata)") from error

    @staticmethod
    def write(path: Path, batches: Sequence[Computed]) -> list[dict]:
        """Writes a shard at once, not aside; returns its rows."""
        parts: dict[str, list[Tensor]] = {}
        rows, counts = [], {}
        for batch in batches:
            for row in batch.rows():
                place = _place(row)
                counts[place] = counts.get(place, -1) + 1
                rows.append(row | dict(row=counts[place]))
            for name, tensor in batch.maps.items():
                parts.setdefault(name + _place(row), []).append(tensor)
        state = {name: torch.cat(parts.pop(name)) for name in list(parts)}
        write_file(state, path, {"rows": json.dumps(rows, ensure_ascii=False)})
        return rows

    def rows(self) -> list[dict]:
        return self._rows

    def get(self, row: dict, name: str) -> Tensor:
        try:
            return self.file.get_slice(name + _place(row))[row["row"]]
        except (SafetensorError, IndexError) as error:
            raise ShardError(f"{self.path} is damaged (no {name} of {row['key']}: {error})") from error


def _place(row: dict) -> str:
    """Behind a map's name: the size of the input, where maps are kept."""
    pooled = all(len(shape) == 1 for shape in row["shapes"].values())
    return "" if pooled else "/{}x{}".format(*row["input"])


class Parquet:
    """A Parquet shard, opened. `get(row, map)` is C x h x w, or C where it was pooled.

    Raises:
        ShardError: damaged. FileError: it cannot be opened at the moment.
    """

    suffix = ".parquet"

    def __init__(self, path: Path):
        self.path = path
        with reading(path), self._damage_named():
            self.file = _parquet().ParquetFile(path)
        groups = self.file.metadata.num_row_groups
        counts = [self.file.metadata.row_group(i).num_rows for i in range(groups)]
        self.starts = np.cumsum([0, *counts])
        self.held: tuple[tuple[int, str], object] | None = None  # the column of a row group that was read last

    @staticmethod
    def write(path: Path, batches: Sequence[Computed]) -> list[dict]:
        """Writes a shard at once, not aside; returns its rows."""
        import pyarrow as pa

        rows = [row for batch in batches for row in batch.rows()]
        columns = {name: pa.array([row[name] for row in rows]) for name in ("key", "width", "height", "input")}
        for name in batches[0].maps:
            shapes = [row["shapes"][name] for row in rows]
            values = np.concatenate([batch.maps[name].numpy().reshape(-1) for batch in batches])
            if len(shapes[0]) == 1:  # pooled: all shards of a folder have the same columns
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), shapes[0][0])
            else:
                offsets = np.cumsum([0, *(np.prod(shape) for shape in shapes)]).astype(np.int32)
                columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
            columns[f"{name}_shape"] = pa.array(shapes, pa.list_(pa.int32()))
        table = pa.table(columns)
        group = max(1, GROUP_BYTES * len(rows) // max(1, table.nbytes))
        try:
            _parquet().write_table(
                table, path, row_group_size=group, compression="none", use_dictionary=False, write_statistics=["key"]
            )
        except OSError as error:
            raise FileError(
                f"{path.parent} did not take a file of {readable_size(table.nbytes)}: {error}. Is the disk full?"
            ) from error
        return [row | dict(row=number) for number, row in enumerate(rows)]

    def rows(self) -> list[dict]:
        shapes = [name for name in self.file.schema_arrow.names if name.endswith("_shape")]
        with reading(self.path), self._damage_named():
            table = self.file.read(["key", "width", "height", "input", *shapes])
        rows = []
        for number, row in enumerate(table.to_pylist()):
            found = {name.removesuffix("_shape"): row.pop(name) for name in shapes}
            rows.append(row | dict(shapes=found, row=number))
        if not all(map(is_row, rows)):
            raise ShardError(f"{self.path} is damaged (a row without all fields)")
        return rows

    def get(self, row: dict, name: str) -> Tensor:
        group = int(np.searchsorted(self.starts, row["row"], "right")) - 1
        if self.held is None or self.held[0] != (group, name):
            with reading(self.path), self._damage_named():
                self.held = (group, name), self.file.read_row_group(group, [name]).column(name)
        values = self.held[1][row["row"] - int(self.starts[group])].values.to_numpy()
        if values.size != np.prod(row["shapes"][name]):
            raise ShardError(f"{self.path} is damaged ({values.size} numbers of {name} of {row['key']})")
        return torch.from_numpy(values.copy()).reshape(row["shapes"][name])

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """pyarrow reports damage as ValueErrors, KeyErrors, and OSErrors without a number; the system's have one."""
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ShardError(f"{self.path} is damaged ({str(error).splitlines()[0]})") from error


def _parquet():
    with needs("extract"):
        import pyarrow.parquet
    return pyarrow.parquet


FORMATS = {"safetensors": Safetensors, "parquet": Parquet}
