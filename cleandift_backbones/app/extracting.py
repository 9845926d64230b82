"""Features of pictures, computed once: models are loaded when first wanted, work can be watched and stopped."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import timm
import torch

from ..extractor import PIXELS, Extractor, ModelError, extract, list_maps, load_extractor, resolve_device
from .pictures import Picture
from .store import Entry, FeatureStore

TIMESTEP, ENSEMBLE = 261, 8  # of noisy features: DIFT's own choice
MODELS_KEPT = 2  # a clean one and its noisy twin; Stable Diffusion's take 3 GB each
DEFAULT_SIDE = 224  # of models that do not say

Watch = Callable[[float], None]


class Cancelled(Exception):
    """Somebody wants the work no longer."""


@dataclass(frozen=True)
class Spec:
    """What features are computed by: a model's name, a text ("" for none), and for dift_* its noise."""

    model: str
    prompt: str = ""
    timestep: int | None = None
    ensemble_size: int | None = None

    @property
    def noisy(self) -> bool:
        return is_noisy(self.model)

    def settled(self) -> Spec:
        """With the noise that is used if none is named; none for models that take none."""
        if not self.noisy:
            return Spec(self.model, self.prompt)
        timestep = TIMESTEP if self.timestep is None else self.timestep
        return Spec(self.model, self.prompt, timestep, self.ensemble_size or ENSEMBLE)


def is_noisy(model: str) -> bool:
    return model.startswith("dift_")


def twin(model: str) -> str | None:
    """The noisy model with the same parts as a clean one, or None."""
    name = model.replace("cleandift_", "dift_", 1)
    return name if model.startswith("cleandift_") and timm.is_model(name) else None


def own_size(model: str) -> int:
    """The side in pixels that a model wants its pictures in."""
    config = None if model == PIXELS or ":" in model else timm.get_pretrained_cfg(model)
    return config.input_size[-1] if config and config.input_size else DEFAULT_SIDE


def shown_maps(names: Sequence[str]) -> list[str]:
    """Up to three of a model's maps, coarse to fine where the paper's block outputs are among them."""
    if {"us3", "us6", "us9"} <= set(names):
        return ["us3", "us6", "us9"]
    return list(names[:: -max(1, len(names) // 3)][:3][::-1])


def matched_map(shown: Sequence[str]) -> str:
    """The map to match points on: us6, or the middle one."""
    return "us6" if "us6" in shown else shown[len(shown) // 2]


@dataclass
class _Loaded:
    extractor: Extractor
    lock: threading.Lock = field(default_factory=threading.Lock)


class Features:
    """Maps of pictures from any timm model, kept in a store.

    Args:
        memory: bytes of maps to keep.
        device: where to compute; the maps lie on the CPU.
        pretrained: False for random weights (tests).
    """

    def __init__(self, memory: int = 1 << 30, device: str = "cpu", pretrained: bool = True):
        self.store = FeatureStore(memory)
        self.device, self.pretrained = resolve_device(device), pretrained
        self._models: OrderedDict[str, _Loaded] = OrderedDict()
        self._loading = threading.Lock()

    def map_names(self, model: str) -> list[str]:
        """Names of a model's maps, fine to coarse. Raises ModelError for a model that does not exist."""
        return [info["name"] for info in list_maps(model)]

    def kept(self, spec: Spec, pictures: Sequence[Picture], owner: Hashable) -> list[Entry] | None:
        """The pictures' entries, if all of them are there."""
        entries = [self.store.get(key, owner) for key in _keys(spec.settled(), pictures)]
        return None if None in entries else entries

    def compute(
        self, spec: Spec, pictures: Sequence[Picture], owner: Hashable = None, watch: Watch | None = None
    ) -> list[Entry]:
        """The pictures' entries, computed where they are not there yet.

        The i-th picture gets the noise of seed i, so that no two pictures share theirs, as in DIFT.

        Args:
            watch: called again and again with the share of the work that is done, 0..1; may raise, which ends it.

        Raises:
            ModelError: a model, its weights or a prompt that cannot be had; out of memory. And what `watch` raises.
        """
        spec, watch = spec.settled(), watch or (lambda share: None)
        keys = _keys(spec, pictures)
        entries = [self.store.get(key, owner) for key in keys]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        for number, i in enumerate(missing):
            done = number / len(missing)
            watch(done)
            loaded = self._load(spec)
            with _held(loaded.lock, lambda done=done: watch(done)):
                entries[i] = self.store.get(keys[i], owner)  # another visitor may have wanted the same
                if entries[i] is None:
                    part = 1 / len(missing)
                    inside = lambda share, done=done, part=part: watch(done + part * share)  # noqa: E731
                    entries[i] = _forward(loaded.extractor, spec, pictures[i], i, inside)
                    self.store.put(keys[i], entries[i], owner)
        watch(1.0)
        return entries

    def _load(self, spec: Spec) -> _Loaded:
        with self._loading:
            if spec.model not in self._models:
                while len(self._models) >= MODELS_KEPT:
                    self._models.popitem(last=False)
                noise = dict(timestep=spec.timestep, ensemble_size=spec.ensemble_size) if spec.noisy else {}
                extractor = load_extractor(
                    spec.model, None, self.pretrained, self.device, own_size(spec.model), **noise
                )
                _warm_up(extractor)
                self._models[spec.model] = _Loaded(extractor)
            self._models.move_to_end(spec.model)
            return self._models[spec.model]


def _keys(spec: Spec, pictures: Sequence[Picture]) -> list[Hashable]:
    return [(spec, picture.key, i if spec.noisy else 0) for i, picture in enumerate(pictures)]


@torch.inference_mode()
def _warm_up(extractor: Extractor) -> None:
    """The first pass through a model takes longer than any later one, which would make times unfair."""
    if hasattr(getattr(extractor.model, "model", None), "unet"):
        extractor.model(torch.zeros(1, 3, 64, 64, device=extractor.device))


def _forward(extractor: Extractor, spec: Spec, picture: Picture, seed: int, watch: Watch) -> Entry:
    if spec.prompt or extractor.takes_prompts:
        extractor.set_prompts([spec.prompt] if spec.prompt else [])
    if spec.noisy:
        extractor.model.model.set_noise(spec.timestep, spec.ensemble_size, seed)
    with _watched(extractor.model, watch):
        started = time.perf_counter()
        maps = extract(extractor, [picture.image], 1, progress=False, store="cpu")
        seconds = time.perf_counter() - started
    return Entry({name: m[0].float().clone() for name, m in maps.items()}, seconds)


@contextmanager
def _held(lock: threading.Lock, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock; while it cannot be had, `waiting` is called, which may raise."""
    while not lock.acquire(timeout=0.2):
        waiting()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _watched(model: torch.nn.Module, watch: Watch) -> Iterator[None]:
    """Calls `watch` with the share of a model's layers that have run."""
    layers = [module for module in model.modules() if not any(module.children())]
    done = 0

    def before(*_) -> None:
        nonlocal done
        done += 1
        watch(min(1.0, done / len(layers)))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def how_to_get(error: ModelError) -> str:
    """An error of loading in full: which weights are missing, and how to get them."""
    cause = str(error.__cause__ or "")
    return cause if " cannot be loaded, because of" in cause else str(error)
