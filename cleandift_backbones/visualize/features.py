"""Features of pictures, computed once: models are loaded when first wanted, work can be watched and stopped."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ..features.extractor import Extractor, ModelError, extract, load_extractor, resolve_device
from ..features.model_names import defaults_of, is_noisy, map_names, model_spec, own_size
from ..utils.errors import InputError
from .memory import Entry, FeatureStore
from .pictures import Picture

LOOK_INSIDE = 0.02  # seconds between two looks at whether a pass is still wanted: they cost time
LOOK = 0.2  # seconds between two looks at whether work is still wanted
MODELS_KEPT = 2  # a clean one and its noisy twin; Stable Diffusion's take 3 GB each

T = TypeVar("T")
Watch = Callable[[float, str], None]


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
        """With the noise that is used if none is named; none for models that take none.

        Raises:
            ValueError: a timestep outside 0..999, or fewer than one noise; either for a model that adds no noise.
        """
        if not self.noisy:
            if self.timestep is not None or self.ensemble_size is not None:
                raise InputError(
                    f"timestep and ensemble_size: {self.model} adds no noise; leave them out, or take a dift_* model"
                )
            return Spec(self.model, self.prompt)
        defaults = defaults_of(self.model)
        timestep = int(defaults.timestep) if self.timestep is None else self.timestep
        count = defaults.ensemble_size if self.ensemble_size is None else self.ensemble_size
        if not (0 <= timestep <= 999 and int(timestep) == timestep):
            raise InputError(f"timestep {timestep} is none of the model's; give a whole number from 0 to 999")
        if not (count >= 1 and int(count) == count):
            raise InputError(f"ensemble_size {count} is no number of noises; give 1 or more")
        return Spec(self.model, self.prompt, int(timestep), int(count))


@dataclass
class _Loaded:
    """A model, held by one picture at a time, and at which shares of its last pass's time its layers began."""

    extractor: Extractor
    lock: threading.Lock = field(default_factory=threading.Lock)
    shares: list[float] = field(default_factory=list)


class FeatureProvider:
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
            watch: called again and again with the share of the work that is done, 0..1, and what is being done; may
                raise, which ends it, or at once leaves what cannot be interrupted, like the loading of a model.

        Raises:
            ModelError: a model, its weights or a prompt that is unavailable; out of memory. And what `watch` raises.
        """
        spec, watch = spec.settled(), watch or (lambda share, doing: None)
        keys = _keys(spec, pictures)
        entries = [self.store.get(key, owner) for key in keys]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if missing:
            loaded = self._load(spec, lambda: watch(0.0, "loading"))
            if spec.prompt:  # the text encoder is loaded for a text that is new
                told = lambda: loaded.extractor.set_prompts([spec.prompt])  # noqa: E731
                _aside(loaded.lock, told, lambda: watch(0.0, "reading the prompt"))
        for number, i in enumerate(missing):

            def inside(share: float, number: int = number) -> None:
                watch((number + share) / len(missing), "computing features")

            inside(0.0)
            with _held(loaded.lock, lambda: inside(0.0)):
                entries[i] = self.store.get(keys[i], owner)  # another visitor may have wanted the same
                if entries[i] is None:
                    entries[i] = _forward(loaded, spec, pictures[i], i, inside)
                    self.store.put(keys[i], entries[i], owner)
        watch(1.0, "")
        return entries

    def stamp(self, result: T) -> T:
        """A result of these features, which now says where they were computed."""
        result.device = str(self.device)
        return result

    def _load(self, spec: Spec, waiting: Callable[[], None]) -> _Loaded:
        def load() -> _Loaded:
            if spec.model not in self._models:  # another visitor may have wanted the same
                noise = dict(timestep=spec.timestep, ensemble_size=spec.ensemble_size) if spec.noisy else {}
                extractor = load_extractor(
                    spec.model, map_names(spec.model), self.pretrained, self.device, own_size(spec.model), **noise
                )
                loaded = _Loaded(extractor)
                _warm_up(loaded)
                while len(self._models) >= MODELS_KEPT:  # only now: weights that are missing cost nobody a model
                    self._models.popitem(last=False)
                self._models[spec.model] = loaded
            return self._models[spec.model]

        loaded = self._models.get(spec.model) or _aside(self._loading, load, waiting)
        with suppress(KeyError):  # dropped meanwhile for another one
            self._models.move_to_end(spec.model)
        return loaded


def _keys(spec: Spec, pictures: Sequence[Picture]) -> list[Hashable]:
    return [(spec, picture.key, i if spec.noisy else 0) for i, picture in enumerate(pictures)]


@torch.inference_mode()
def _warm_up(loaded: _Loaded) -> None:
    """The first pass through a model takes longer than any later one, which would make times unfair."""
    extractor = loaded.extractor
    if model_spec(loaded.extractor.name):
        with _watched(loaded, lambda share: None):
            extractor.model(torch.zeros(1, 3, 64, 64, device=extractor.device))


def _forward(loaded: _Loaded, spec: Spec, picture: Picture, seed: int, watch: Callable[[float], None]) -> Entry:
    extractor = loaded.extractor
    if spec.prompt or extractor.takes_prompts:
        extractor.set_prompts([spec.prompt] if spec.prompt else [])
    if spec.noisy:
        extractor.model.model.set_noise(spec.timestep, spec.ensemble_size, seed)
    with _watched(loaded, watch):
        started = time.perf_counter()
        maps = extract(extractor, [picture.image], 1, progress=False, store="cpu")
        seconds = time.perf_counter() - started
    return Entry({name: m[0].float().clone() for name, m in maps.items()}, seconds)


def _aside(lock: threading.Lock, function: Callable[[], T], waiting: Callable[[], None]) -> T:
    """What a function returns that cannot be interrupted; `waiting` is called meanwhile, and may raise.

    The function then runs on to its end, in a thread of its own; the lock is held until then.
    """
    while not lock.acquire(timeout=LOOK):
        waiting()
    done, threads = Future(), torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(threads)
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)
        finally:
            lock.release()

    threading.Thread(target=run, daemon=True).start()
    while not wait([done], LOOK).done:
        waiting()
    return done.result()


@contextmanager
def _held(lock: threading.Lock, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock; while another holds it, `waiting` is called, which may raise."""
    while not lock.acquire(timeout=LOOK):
        waiting()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _watched(loaded: _Loaded, watch: Callable[[float], None]) -> Iterator[None]:
    """Calls `watch` between layers with the share of a pass that is over: of its time, if one was timed before."""
    layers = [module for module in loaded.extractor.model.modules() if not any(module.children())]
    times: list[float] = []
    looked = 0.0

    def before(*_) -> None:
        nonlocal looked
        number, now = len(times), time.perf_counter()
        times.append(now)
        if now - looked < LOOK_INSIDE:
            return
        looked = now
        watch(min(1.0, loaded.shares[number] if number < len(loaded.shares) else number / len(layers)))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
        whole = time.perf_counter() - times[0] if times else 1.0
        loaded.shares = [(moment - times[0]) / whole for moment in times]
    finally:
        for hook in hooks:
            hook.remove()


def how_to_get(error: ModelError) -> str:
    """An error of loading in full: which weights are missing, and how to get them."""
    cause = str(error.__cause__ or "")
    return cause if " cannot be loaded, because of" in cause else str(error)
