"""The extraction as one call: `extract(data, out, ExtractConfig(model="cleandift_tiny"))`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch

from ..data.images import check_folder
from ..data.listing import left_out_report
from ..data.loading import Resize
from ..data.sources import ImageSource, SourceError, list_sources
from ..utils.atomic import readable_size
from ..utils.errors import InputError
from ..utils.locks import hold
from ..utils.progress import tqdm
from ..version import __version__
from .config import ExtractConfig
from .engines.local import ExtractReport, default_workers, process_place, run
from .extractor import Extractor, ModelError, list_maps, resolve_device
from .formats import DTYPES
from .options import load_model, model_arguments, pick_maps
from .store import FAILURES, Store, check_out, list_shards

ENGINES = ("local",)


def to_stderr(message: str) -> None:
    """Writes a message to the standard error, beside bars."""
    tqdm.write(message, file=sys.stderr)


def extract(
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: ExtractConfig,
    engine: str = "local",
    log: Callable[[str], None] = to_stderr,
    note: Callable[[str], None] | None = None,
) -> ExtractReport:
    """Features of many images into a folder, which `Features(out)` reads; goes on where an earlier call stopped.

    Under torchrun or accelerate launch each process takes its share of the images.

    Args:
        data: a folder, .tar shards (a pattern), or a list, see `data.sources.list_sources`.
        out: the folder, new or with features of the same settings.
        config: what to compute, and how.
        engine: what runs the batches: "local", this process.
        log: called with warnings.
        note: called with what is done, before it is done; None: `log` is.

    Returns:
        What this process did; its `lines` are sentences about that, and about the folder.

    Raises:
        SourceError: no images there, or none that can be read.
        ModelError: a model, map or device that is unavailable; out of memory.
        StoreError: `out` holds other files, or features of other settings.
        ImageError: an image that cannot be read, with `config.strict`.
        FolderInUseError: another process takes the same images.
    """
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    data, out = os.fspath(data), os.fspath(out)
    check_folder(out)
    check_out(out)
    if config.threads:
        torch.set_num_threads(config.threads)
    rank, world, _ = process_place(config.part)
    # Many processes may write into one folder, but not two that take the same images.
    images = json.dumps([os.path.abspath(data), config.limit, config.shard_names])
    share = f"{hashlib.sha256(images.encode()).hexdigest()[:8]}-{rank}-of-{world}"
    with hold(out, share):
        return _extract(data, out, config, log, note or log)


def load(config: ExtractConfig, device: torch.device) -> tuple[Extractor, Resize]:
    """The model, and how pictures become its input."""
    name = config.model.removeprefix("random:")
    kwargs = dict(config.model_args) | model_arguments(config.timestep, config.ensemble, config.weights)
    infos = list_maps(name, **kwargs)
    maps = pick_maps(infos, [str(item) for item in config.maps], infos[-1]["name"])
    extractor = load_model(
        name, maps, name == config.model, device, config.size, config.seed,
        DTYPES[config.dtype], config.keep_size, **kwargs,
    )  # fmt: skip
    extractor.name = config.model
    if not config.keep_size:
        return extractor, Resize(config.resize, extractor.size, mean=extractor.mean)
    if extractor.size:
        side = f"{extractor.size[1]}x{extractor.size[0]}"
        raise ModelError(f"{name} takes pictures of one size, {side}; leave out --keep-size")
    pretrained = getattr(extractor.core, "pretrained_cfg", None) or {}
    least = (pretrained.get("min_input_size") or (3, 1, 1))[-1]
    return extractor, Resize("keep", None, config.max_side, config.multiple, least, extractor.mean)


def _extract(
    data: str, out: str, config: ExtractConfig, log: Callable[[str], None], note: Callable[[str], None]
) -> ExtractReport:
    rank, world, local = process_place(config.part)
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    left_out: Counter[str] = Counter()
    entries, told = list_sources(data, shard_names=config.shard_names, left_out=left_out)
    entries = entries[: config.limit]
    extractor, resize = load(config, device)
    prompt = _prompt(config, extractor, entries)
    if config.compile and prompt is not None:
        raise InputError("--compile is for one prompt for all pictures: each number of prompts would be compiled anew")
    if config.optimize:
        extractor.optimize(prompt is None, config.compile)
    settings = dict(
        model=config.model, model_args={key: repr(value) for key, value in sorted(config.model_args.items())},
        timestep=config.timestep, ensemble=config.ensemble, prompt=config.prompt, maps=list(extractor.maps),
        weights=extractor.weights_digest()[:16], compute_dtype=config.dtype, optimize=extractor.optimized,
        resize=resize.mode, size=resize.size,
        max_side=config.max_side, multiple=config.multiple, pool=config.pool, store_dtype=config.store_dtype,
        format=config.format, mean=extractor.mean, std=extractor.std,
    )  # fmt: skip
    info = dict(
        command=shlex.join(["python", *sys.argv]), data=data, pictures=len(entries), device=_named(device),
        started=time.strftime("%Y-%m-%d %H:%M:%S"), channels=dict(zip(extractor.maps, extractor.channels)),
        versions=dict(
            cleandift_backbones=__version__, python=platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "diffusers", "pillow")},
        ),
    )  # fmt: skip
    store = Store(out, settings, info, config.shard_size * 10**6, config.shard_items, rank, log)
    done, damaged = store.done()
    for message in [*([*told, *filter(None, [left_out_report(left_out)])] if rank == 0 else []), *damaged]:
        log(message)
    if told and config.strict:
        raise SourceError(told[0])
    # By place in the list: the same whatever other processes do. What is there already is left out only then.
    mine = [entry for entry in entries[rank::world] if entry.key not in done]
    known = sum(entry.key in done for entry in entries[rank::world])
    if known and mine:
        note(f"{known:,} of {known + len(mine):,} images are in {out} already; computing the others")

    def prepare(images: Sequence[ImageSource]) -> None:
        extractor.set_prompts([image.caption or prompt for image in images])

    workers = default_workers(device) if config.workers is None else config.workers
    report = run(
        mine, extractor, resize, store, config.pool == "mean", config.store_dtype, config.batch_size,
        workers, None if prompt is None else prepare, config.strict, config.progress and local == 0 and bool(mine), log,
    )  # fmt: skip
    report.lines = _finish(store, entries, report, f"process {rank} of {world}: " if world > 1 else "")
    return report


def _prompt(config: ExtractConfig, extractor: Extractor, entries: list[ImageSource]) -> str | None:
    """Sets the one prompt of all pictures; or gives that of pictures without one, where others have their own."""
    if config.prompt == "none":
        return None
    if any(entry.caption for entry in entries):
        extractor.set_prompts([config.prompt or ""])  # finds out early whether the model takes text
        return config.prompt or ""
    if config.prompt:
        extractor.set_prompts([config.prompt])
    return None


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _finish(store: Store, entries: list[ImageSource], report: ExtractReport, who: str) -> list[str]:
    """Gathers the index of the folder; returns sentences about this process and the folder."""
    done, failures = store.merge()
    failed = {failure["key"] for failure in failures}
    missing = sum(entry.key not in done and entry.key not in failed for entry in entries)
    if not missing:
        store.clean()
    if not done and not missing:
        raise SourceError(f"none of {len(entries)} images can be read, the first: {failures[0]['error']}")
    size = sum(path.stat().st_size for path in list_shards(store.folder, store.format)[0])
    total = f"{store.folder} holds the features of {len(done):,} images ({readable_size(size)})"
    if report.pictures or report.failed:
        lines = [f"{who}{report.pictures:,} images in {report.seconds:.1f} s, {report}", total]
    else:
        lines = [f"{who}nothing to do: {total}"]
    if failed:
        lines.append(f"{len(failed):,} images cannot be read: {store.folder / FAILURES} lists the reasons")
    if missing:
        lines.append(
            f"{missing:,} are not there yet: other processes have them; if none runs, start this command again"
        )
    return lines
