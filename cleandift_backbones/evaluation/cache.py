"""Features on disk: each picture goes through a model once, and an interrupted run goes on where it stopped.

A cache folder holds a folder per model, weights, map and preprocessing, named by a hash of them (`info.json` in it
tells them), and in it safetensors files of some tens of MB, whose tensors are named by picture, prompt and noise.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from ..data.images import ImageError, to_input
from ..features.extractor import Extractor, ModelError
from ..utils.atomic import DamagedFileError, open_tensors, reading, replacing, set_aside, write_text
from ..utils.errors import InputError
from ..utils.locks import hold
from ..utils.progress import tqdm
from ..version import __version__
from .items import Item

SHARD = re.compile(r"\d+-[0-9a-f]{6}\.safetensors")
SHARD_BYTES = 2**26  # features that an interruption may lose, and that wait in memory to be written
SHARD_SECONDS = 120.0
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Features:
    """One map of all items of a data set, on disk: features[i] is C x h x w, or C where it was pooled; float32."""

    def __init__(self, keys: Sequence[str], places: dict[str, Path]):
        self.keys, self.places = list(keys), places
        self._open: tuple[Path, object] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        key = self.keys[index]
        path = self.places[key]
        if self._open is None or self._open[0] != path:  # neighbours mostly lie in one file
            self._open = (path, open_tensors(path))
        return self._open[1].get_tensor(key).float()

    def part(self, start: int, stop: int | None = None) -> Features:
        """Those of the items from start to stop."""
        return Features(self.keys[start:stop], self.places)

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


class FeatureCache:
    """Computes what is missing of a data set's features and gives them all.

    Args:
        folder: where features are kept, across runs.
        batch_size: pictures per pass. Models that draw noise (DIFT) take pictures one by one, each with noises of its
            own, as DIFT draws them: a common noise would favour equal positions.
        mode: "squash" or "pad", see `images.to_input`.
        pool: keep spatial means instead of maps.
        dtype: of the numbers on disk, "float16" or "float32".
        seed: of the noises.
        progress: show a bar.
        say: takes the sentences about what was found on disk.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 8,
        mode: str = "squash",
        pool: bool = False,
        dtype: str = "float16",
        seed: int = 0,
        progress: bool = True,
        say: Callable[[str], None] = tqdm.write,
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        self.folder, self.batch_size, self.mode, self.pool = Path(folder), batch_size, mode, pool
        self.dtype, self.seed, self.progress, self.say = dtype, seed, progress, say

    def features(
        self, extractor: Extractor, items: Sequence[Item], settings: dict | None = None
    ) -> dict[str, Features]:
        """All maps of the extractor for all items.

        Args:
            extractor: with a size, because a batch needs one.
            items: the pictures.
            settings: what else the features depend on: timestep, ensemble, ...

        Raises:
            ModelError: out of memory, features beyond float16, an extractor without a size.
            ImageError: pictures that cannot be read: the first, and how many of how many.
            FileError: features on disk cannot be read at the moment; another process is computing the same.
        """
        if extractor.size is None:
            raise ModelError(f"{extractor.name}: pictures need one common size; load the extractor with size=")
        noisy = extractor.reseed(self.seed)
        keys = [_key(item, self._noise(item) if noisy else "") for item in items]
        digest = extractor.weights_digest()
        folders, places = {}, {}
        for name in extractor.maps:
            info = dict(
                model=extractor.name, map=name, size=list(extractor.size), mode=self.mode, pool=self.pool,
                dtype=self.dtype, code=_code(extractor), mean=list(extractor.mean), std=list(extractor.std),
                settings=(settings or {}) | (dict(optimize=extractor.optimized) if extractor.optimized else {}),
            )  # fmt: skip
            folders[name] = self._folder(info, digest, extractor.maps)
            places[name] = self._index(folders[name])
        missing = [i for i, key in enumerate(keys) if any(key not in found for found in places.values())]
        if missing and len(missing) < len(items):
            self.say(f"{extractor.name}: features of {len(items) - len(missing)} pictures are taken from {self.folder}")
        with ExitStack() as held:
            for folder in folders.values() if missing else ():
                held.enter_context(hold(folder))
            self._compute(extractor, [items[i] for i in missing], [keys[i] for i in missing], noisy, folders, places)
        return {name: Features(keys, places[name]) for name in extractor.maps}

    def remove(self, found: dict[str, Features]) -> None:
        """Removes the files of features that are not needed any more, and folders that are empty then; no other files.

        Args:
            found: what `features` returned.
        """
        for folder in {path.parent for one in found.values() for path in one.places.values()}:
            for path in (*folder.glob("*.safetensors"), folder / "info.json"):
                if SHARD.fullmatch(path.name) or path.name == "info.json":
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # others' files
                folder.rmdir()

    def _folder(self, info: dict, weights: str, maps: Sequence[str]) -> Path:
        told = json.dumps(info, sort_keys=True)
        stem = (
            re.sub(r"[^\w.-]+", "_", f"{info['model']}-{info['map']}-") + hashlib.sha256(told.encode()).hexdigest()[:12]
        )
        folder = self.folder / f"{stem}-{weights[:12]}"
        others = [path for path in self.folder.glob(f"{stem}-*") if path != folder]
        if others and not folder.exists():
            # A model has the layers that its maps need: their hash says nothing about those of other maps.
            alike = any(_maps_of(path) in (None, list(maps)) for path in others)
            why = f"of other weights ({others[0].name.rsplit('-', 1)[1]}, now {weights[:12]})"
            self.say(
                f"{info['model']}: the cached features of {info['map']} are "
                f"{why if alike else 'those of a run with other maps'}; computing them again"
            )
        if not (folder / "info.json").is_file():
            text = json.dumps(info | dict(weights=weights, maps=list(maps)), indent=1)
            write_text(folder / "info.json", text + "\n")
        return folder

    def _index(self, folder: Path) -> dict[str, Path]:
        """Which file holds which features. Files of others are not read; damaged ones are kept under another name."""
        places, others = {}, []
        with reading(folder):
            paths = sorted(folder.glob("*.safetensors"))
        for path in paths:
            if not SHARD.fullmatch(path.name):
                others.append(path.name)
                continue
            try:
                with open_tensors(path) as file:
                    places |= dict.fromkeys(file.keys(), path)
            except DamagedFileError as error:
                self.say(f"{error}; kept as {set_aside(path).name}, its features are computed again")
        if others:
            self.say(f"{folder} holds other files, which are not read: {', '.join(others[:3])}")
        return places

    def _noise(self, item: Item) -> int:
        """Seed of an item's noises: its own, the same in every run and for every order."""
        return int(hashlib.sha256(f"{self.seed} {item.name}".encode(errors="surrogateescape")).hexdigest()[:12], 16)

    def _compute(self, extractor, items, keys, noisy, folders, places) -> None:
        if not items:
            return
        pending: dict[str, dict[str, torch.Tensor]] = {name: {} for name in extractor.maps}
        bad: list[ImageError] = []
        step, last = 1 if noisy else self.batch_size, time.monotonic()
        # No batch mixes pictures with and without a prompt: "" is the prompt that the model came with.
        groups = [[i for i in range(len(items)) if bool(items[i].prompt) == told] for told in (False, True)]
        batches = [group[k : k + step] for group in groups for k in range(0, len(group), step)]
        try:
            with tqdm(total=len(items), desc=extractor.name, unit="img", disable=not self.progress, leave=False) as bar:
                for batch in batches:
                    good, pictures = [], []
                    for i in batch:
                        try:
                            pictures.append(self._input(extractor, items[i]))
                            good.append(i)
                        except ImageError as error:
                            bad.append(error)
                    if pictures and not bad:  # after the first bad picture the others are only looked at
                        if noisy:
                            extractor.reseed(self._noise(items[good[0]]))
                        prompts = [items[i].prompt for i in good if items[i].prompt]
                        if prompts or extractor.takes_prompts:
                            extractor.set_prompts(prompts)
                        for name, maps in extractor(torch.stack(pictures)).items():
                            for i, one in zip(good, self._kept(maps, extractor.name), strict=True):
                                pending[name][keys[i]] = one.clone()
                    bar.update(len(batch))
                    if _bytes(pending) >= SHARD_BYTES or time.monotonic() - last > SHARD_SECONDS:
                        _write(pending, folders, places)
                        last = time.monotonic()
        finally:
            if extractor.takes_prompts:
                extractor.set_prompts([])
            # also what was computed before an error or a Ctrl-C
            _write(pending, folders, places)
        if bad:
            raise ImageError(f"{len(bad)} of {len(items)} pictures cannot be used, the first: {bad[0]}")

    def _input(self, extractor: Extractor, item: Item) -> torch.Tensor:
        normalised = to_input(item.read(), extractor.size, self.mode, extractor.mean, extractor.std)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (extractor.mean, extractor.std))
        return normalised * std + mean  # extractors normalise by themselves; the padding is `mean` this way

    def _kept(self, maps: torch.Tensor, name: str) -> torch.Tensor:
        maps = maps.float()
        if self.pool:
            maps = maps.mean((2, 3))
        if not torch.isfinite(maps).all():
            raise ModelError(f"{name}: features are not finite; look at the weights")
        kept = maps.to("cpu", DTYPES[self.dtype])
        if not torch.isfinite(kept).all():
            raise ModelError(
                f"{name}: features reach {maps.abs().max():g}, too large for float16; give --dtype float32"
            )
        return kept.contiguous()


def _maps_of(folder: Path) -> list[str] | None:
    """The maps that the features of a folder were computed with, if that is known."""
    try:
        return json.loads((folder / "info.json").read_text(encoding="utf-8")).get("maps")
    except (OSError, ValueError, AttributeError):
        return None


def _code(extractor: Extractor) -> str:
    """Whose code computes the features, with its version: equal weights need not mean equal features."""
    own = type(extractor.core).__module__.startswith("cleandift_backbones.")
    return f"cleandift_backbones {__version__}" if own else f"timm {timm.__version__}"


def _key(item: Item, noise: int | str) -> str:
    told = json.dumps([item.name, item.stamp, item.prompt, noise])
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def _bytes(pending: dict[str, dict[str, torch.Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for tensors in pending.values() for x in tensors.values())


def _write(pending, folders, places) -> None:
    for name, tensors in pending.items():
        if tensors:
            path = folders[name] / f"{time.time_ns()}-{uuid.uuid4().hex[:6]}.safetensors"
            with replacing(path) as aside:
                save_file(tensors, aside)
            places[name] |= dict.fromkeys(tensors, path)
            tensors.clear()
