"""What an extraction computes and how, as one frozen object that travels to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..utils.atomic import is_file
from ..utils.errors import InputError, MissingFileError, needs
from .formats import DTYPES, FORMATS
from .options import check_noise, check_ranges

RESIZES = ("squash", "pad", "crop")
POOLS = ("none", "mean")
RANGES = (
    ("batch_size", 1, None), ("workers", 0, None), ("threads", 1, None), ("limit", 1, None), ("size", 16, 4096),
    ("multiple", 1, 4096), ("max_side", 16, None), ("shard_size", 1, 1024), ("shard_items", 1, None),
    ("timestep", 0, 999), ("ensemble", 1, 1024), ("seed", 0, None),
)  # fmt: skip


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of `extract`; those of the command line, with the same names and defaults.

    Attributes:
        model: any timm model; random:NAME has random weights.
        maps: names or indices of maps; empty: the model's default map, or else the last.
        pool: "none", or "mean" for a vector per image and map.
        prompt: text for models that take text; "none": the empty one.
        timestep: of dift_* models, 0..999.
        ensemble: noises averaged by dift_* models.
        weights: safetensors file in place of the model's published weights.
        model_args: more keyword arguments of `timm.create_model`.
        limit: only the first so many images.
        seed: of random weights.
        size: side of the model's input in pixels; None: the model's own.
        resize: how images become squares: "squash", "pad" or "crop", see `data.images.to_input`.
        keep_size: images as they come, in batches of one size.
        multiple: with keep_size, sides are rounded to multiples of it.
        max_side: with keep_size, longer sides are shrunk to so many pixels.
        format: of the shards, "safetensors" or "parquet".
        store_dtype: of the features on disk: "float32", "float16" or "bfloat16".
        shard_size: of a shard in MB.
        shard_items: images per shard.
        shard_names: keys of images in .tar shards: SHARD/KEY in place of KEY.
        strict: stop at an image that cannot be read.
        batch_size: images per pass.
        dtype: to compute in.
        optimize: use what makes this package's models faster with the same maps up to rounding.
        compile: also compile the model.
        device: "cpu", "cuda", ... or "auto".
        workers: processes that read images; 0: a thread does; None: as many as suit the device.
        threads: CPU threads of the model; None leaves the number.
        part: (i, n): this machine takes part i of n.
        progress: shows a bar.

    Raises:
        InputError: a value out of range, or two that exclude each other.
        MissingFileError: no weights file.
    """

    model: str
    maps: tuple[str | int, ...] = ()
    pool: str = "none"
    prompt: str | None = None
    timestep: int | None = None
    ensemble: int | None = None
    weights: str | None = None
    model_args: Mapping[str, object] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    size: int | None = None
    resize: str = "squash"
    keep_size: bool = False
    multiple: int = 1
    max_side: int | None = None
    format: str = "safetensors"
    store_dtype: str = "float16"
    shard_size: int = 256
    shard_items: int = 50_000
    shard_names: bool = False
    strict: bool = False
    batch_size: int = 8
    dtype: str = "float32"
    optimize: bool = True
    compile: bool = False
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    part: tuple[int, int] = (0, 1)
    progress: bool = True

    def __post_init__(self):
        maps = (self.maps,) if isinstance(self.maps, (str, int)) else self.maps or ()
        object.__setattr__(self, "maps", tuple(maps))
        object.__setattr__(self, "model_args", dict(self.model_args))
        check_ranges(self, RANGES)
        choices = dict(pool=POOLS, resize=RESIZES, format=FORMATS, store_dtype=DTYPES, dtype=DTYPES)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if not 0 <= self.part[0] < self.part[1]:
            raise InputError(f"part={self.part}: expected (i, n) with i in 0..n-1")
        if self.keep_size and (self.size or self.resize != "squash"):
            raise InputError("--keep-size takes pictures as they come; leave out --size and --resize")
        if not self.keep_size and (self.multiple > 1 or self.max_side):
            raise InputError("--multiple and --max-side go with --keep-size")
        if self.max_side and self.max_side < self.multiple:
            raise InputError(
                f"--max-side {self.max_side} is less than --multiple {self.multiple}; give at least as much"
            )
        if self.compile and not self.optimize:
            raise InputError("--compile goes on from what --no-optimize leaves out; give one of them")
        if self.format == "parquet":
            if self.store_dtype == "bfloat16":
                raise InputError(
                    "Parquet has no bfloat16; give --store-dtype float16 or float32, or --format safetensors"
                )
            with needs("extract"):
                import pyarrow.parquet  # noqa: F401
        if self.weights and not is_file(self.weights):
            raise MissingFileError(f"--weights {self.weights}: no such file")
        check_noise([self.model], timestep=self.timestep, ensemble=self.ensemble)
