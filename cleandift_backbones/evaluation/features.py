"""Features of a data set's images through the extraction's stores: computed once, by one or several processes.

A folder holds a store (`features.store`) per model, weights, maps and preprocessing, named by a hash of them. Images
are known there by their key, and by a hash of what else their features depend on: file, prompt and noise.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch

from ..data.images import ImageError
from ..data.loading import Resize
from ..data.sources import ImageSource
from ..features.dataset import Features
from ..features.engines.local import default_workers, process_place, run
from ..features.extractor import Extractor, ModelError
from ..features.formats import DTYPES
from ..features.store import META, Store, read_failures, read_meta, read_rows, remove_store
from ..utils.atomic import reading
from ..utils.errors import InputError
from ..utils.locks import hold
from ..utils.progress import tqdm
from ..version import __version__

STORED = tuple(name for name in ("float16", "float32") if name in DTYPES)
FORMAT = "safetensors"
SHARD_BYTES = 2**26  # features that an interruption may lose
WAIT_SECONDS = 0.5  # between looks at what other processes have stored


class MapFeatures:
    """One map of all images of a data set, in their order: features[i] is C x h x w, or C if pooled; float32."""

    def __init__(self, store: Features, name: str, keys: Sequence[str]):
        self.store, self.name, self.keys = store, name, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.read(self.keys[index], self.name).float()

    def part(self, start: int, stop: int | None = None) -> MapFeatures:
        """Those of the images from start to stop."""
        return MapFeatures(self.store, self.name, self.keys[start:stop])

    def stack(self, indices: Sequence[int]) -> torch.Tensor:
        """Several: N x ..., without holding them twice."""
        found = None
        for place, i in enumerate(indices):
            one = self[int(i)]
            found = one.new_empty(len(indices), *one.shape) if found is None else found
            found[place] = one
        if found is None:
            raise InputError("no features were asked for")
        return found


class FeatureStores:
    """Computes what is missing of a data set's features and gives them all.

    Under torchrun or accelerate launch each process computes its share, and waits for the others.

    Args:
        folder: of the stores, which stay for later runs.
        batch_size: images per pass. Models that draw noise (DIFT) take images one by one, each with noises of its own,
            as DIFT draws them: a common noise would favour equal positions.
        mode: "squash" or "pad", see `images.to_input`.
        pool: store spatial means instead of maps.
        dtype: of the numbers on disk, "float16" or "float32".
        seed: of the noises.
        workers: processes that read images; None: as many as suit the device.
        progress: shows a bar.
        log: called with messages.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 8,
        mode: str = "squash",
        pool: bool = False,
        dtype: str = "float16",
        seed: int = 0,
        workers: int | None = None,
        progress: bool = True,
        log: Callable[[str], None] = tqdm.write,
    ):
        if dtype not in STORED:
            raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(STORED)}")
        self.folder, self.batch_size, self.mode, self.pool = Path(folder), batch_size, mode, pool
        self.dtype, self.seed, self.workers, self.progress, self.log = dtype, seed, workers, progress, log

    def features(
        self, extractor: Extractor, images: Sequence[ImageSource], settings: dict | None = None
    ) -> dict[str, MapFeatures]:
        """All maps of the extractor for all images.

        Args:
            extractor: with a size, because a batch needs one.
            images: of the data set.
            settings: what else the features depend on: timestep, ensemble, ...

        Raises:
            ModelError: out of memory, features beyond float16, an extractor without a size.
            ImageError: images that cannot be read: the first, and how many of how many.
            FileError: features on disk cannot be read at the moment; another process is computing the same.
        """
        if extractor.size is None:
            raise ModelError(f"{extractor.name}: pictures need one common size; load the extractor with size=")
        noisy = extractor.reseed(self.seed)
        keys = [self._key(image, noisy) for image in images]
        known = self._settings(extractor, settings or {})
        folder = self._folder(known)
        rank, world, _ = process_place()
        if not self._stored(folder, keys):
            with hold(folder, f"share-{rank}-of-{world}"):
                self._compute(extractor, images, keys, noisy, folder, known)
            self._wait(folder, images, keys)
        store = Features(folder)
        return {name: MapFeatures(store, name, keys) for name in extractor.maps}

    def remove(self, found: dict[str, MapFeatures]) -> None:
        """Removes the files of features that are not needed any more, and folders that are empty then; no other files.

        Args:
            found: what `features` returned.
        """
        for folder in {one.store.folder for one in found.values()}:
            remove_store(folder)

    def _settings(self, extractor: Extractor, more: dict) -> dict:
        return dict(
            model=extractor.name, maps=list(extractor.maps), size=list(extractor.size), resize=self.mode,
            pool="mean" if self.pool else "none", store_dtype=self.dtype, format=FORMAT,
            # Equal weights need not mean equal features: whose code computes them, with its version.
            code=f"cleandift_backbones {__version__}" if extractor.spec else f"timm {timm.__version__}",
            mean=list(extractor.mean), std=list(extractor.std), compute_dtype=str(extractor.dtype).split(".")[-1],
            optimize=extractor.optimized, settings=more, weights=extractor.weights_digest(),
        )  # fmt: skip

    def _folder(self, settings: dict) -> Path:
        """The folder of a store; says so where there are features of other weights."""
        weights, model = settings["weights"][:12], settings["model"]
        rest = json.dumps({name: value for name, value in settings.items() if name != "weights"}, sort_keys=True)
        stem = re.sub(r"[^\w.-]+", "_", f"{model}-{'-'.join(settings['maps'])}")[:80]
        stem += "-" + hashlib.sha256(rest.encode()).hexdigest()[:12]
        folder = self.folder / f"{stem}-{weights}"
        with reading(self.folder):
            others = [path for path in self.folder.glob(f"{stem}-*") if path != folder]
        if others and not folder.exists():
            self.log(
                f"{model}: the stored features of {', '.join(settings['maps'])} are of other weights "
                f"({others[0].name.rsplit('-', 1)[1]}, now {weights}); computing them again"
            )
        return folder

    def _noise(self, image: ImageSource) -> int:
        """Seed of an image's noises: its own, the same in every run and for every order."""
        return int(hashlib.sha256(f"{self.seed} {image.key}".encode(errors="surrogateescape")).hexdigest()[:12], 16)

    def _key(self, image: ImageSource, noisy: bool) -> str:
        known = json.dumps([image.key, image.stamp, image.caption, self._noise(image) if noisy else ""])
        name = image.key.encode("utf-8", "backslashreplace").decode()
        return f"{name} {hashlib.sha256(known.encode()).hexdigest()[:16]}"

    def _stored(self, folder: Path, keys: Sequence[str]) -> bool:
        """Whether all features are in a store whose shards are whole."""
        if not (folder / META).is_file():
            return False
        store = Store(folder, read_meta(folder)["settings"], {}, log=self.log)
        done, messages = store.done()
        for message in messages:
            self.log(message)
        return done.issuperset(keys)

    def _compute(self, extractor, images, keys, noisy, folder, settings) -> None:
        rank, world, local = process_place()
        store = Store(folder, settings, {}, SHARD_BYTES, rank=rank, log=self.log)
        done = {row["key"] for row in read_rows(folder, store.format)}
        named = {key: _Named(image, key) for image, key in zip(images, keys)}  # each once
        share = [image for image in list(named.values())[rank::world] if image.key not in done]
        if done.intersection(keys) and share and rank == 0:
            count = sum(key in done for key in keys)
            self.log(f"{extractor.name}: features of {count} pictures are taken from {folder}")

        def prepare(batch: Sequence[_Named]) -> None:
            if noisy:
                extractor.reseed(self._noise(batch[0].image))
            prompts = [one.caption for one in batch if one.caption]
            if prompts or extractor.takes_prompts:
                extractor.set_prompts(prompts)

        workers = default_workers(extractor.device) if self.workers is None else self.workers
        try:
            run(
                share, extractor, Resize(self.mode, extractor.size, mean=extractor.mean), store, self.pool, self.dtype,
                1 if noisy else self.batch_size, workers, prepare, progress=self.progress and local == 0,
                log=self.log, group=lambda image: bool(image.caption),
                advice="too large for float16; give --dtype float32" if self.dtype == "float16" else "",
            )  # fmt: skip
        finally:
            if extractor.takes_prompts:
                extractor.set_prompts([])
            store.merge()
        store.clean()

    def _wait(self, folder: Path, images: Sequence[ImageSource], keys: Sequence[str]) -> None:
        """Until every image's features, or the reason why it cannot be read, are there, from whichever process."""
        known = False
        while True:
            done = {row["key"] for row in read_rows(folder, FORMAT)}
            failed = {line["key"]: line["error"] for line in read_failures(folder, done)}
            lacking = [key for key in keys if key not in done]
            if all(key in failed for key in lacking):
                break
            if not known:
                self.log("waiting for the features of other processes")
            known = True
            time.sleep(WAIT_SECONDS)
        if lacking:
            raise ImageError(
                f"{len(lacking)} of {len(images)} pictures cannot be used, the first: {failed[lacking[0]]}"
            )


class _Named:
    """An image under the key of its features; all else is the image's own."""

    def __init__(self, image: ImageSource, key: str):
        self.image, self.key = image, key
        self.path, self.caption = image.path, image.caption

    def read(self):
        return self.image.read()
