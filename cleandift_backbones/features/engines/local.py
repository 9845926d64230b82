"""Batches through the model: pictures are loaded ahead of it and features stored behind it, while it computes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.images import ImageError
from ...data.loading import Read, Resize, SizedBatch, ahead, batches, reads
from ...data.sources import ImageSource
from ...utils.progress import tqdm
from ..extractor import Extractor, ModelError, OutOfMemory, memory_told
from ..formats import DTYPES, Computed
from ..store import Store

BEHIND = 2  # batches of features that wait to be stored
Prepare = Callable[[Sequence[ImageSource]], None]


class Place(NamedTuple):
    """Of a process: its number among all, how many there are, and its number on this machine."""

    rank: int
    world: int
    local: int


def process_place(part: tuple[int, int] = (0, 1)) -> Place:
    """This process's place, by what torchrun and accelerate launch leave in the environment.

    Args:
        part: (i, n): this machine's processes take part i of n, whatever others have.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    number, parts = part
    return Place(number + parts * rank, parts * world, int(os.environ.get("LOCAL_RANK", 0)))


def default_workers(device: torch.device) -> int:
    """How many processes read images: one beside a CPU, which the model needs, up to 8 beside a GPU."""
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


@dataclass
class ExtractReport:
    """What a run did, and where its time went: seconds from the first picture's reading to the last shard's writing.

    `computing` is the time that the device spent on the model, pooling and rounding; `reading` and `storing` are the
    times that it waited for pictures and for the disk. `lines` are sentences for people, of `features.extract`.
    """

    pictures: int = 0
    failed: int = 0
    seconds: float = 0.0
    computing: float = 0.0
    reading: float = 0.0
    storing: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """Share of the time that the device was computing, 0..1."""
        return min(1.0, self.computing / self.seconds) if self.seconds else 0.0

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.pictures / seconds:.1f} images/s; time: model {self.busy:.0%}, waiting for images "
            f"{self.reading / seconds:.0%}, waiting for the disk {self.storing / seconds:.0%}"
        )


class Computer:
    """Features of batches, as they are to be stored.

    Args:
        extractor: the model.
        pool: keep spatial means instead of maps.
        dtype: of the numbers to store, a name of `formats.DTYPES`.
        prepare: called with the images of each pass in front of it, such as to set their prompts; or None.
        log: called with messages.
    """

    def __init__(
        self, extractor: Extractor, pool: bool, dtype: str, prepare: Prepare | None, log: Callable[[str], None]
    ):
        self.extractor, self.pool, self.dtype, self.prepare, self.log = extractor, pool, DTYPES[dtype], prepare, log
        self.cuda = extractor.device.type == "cuda"
        self.most_pixels: int | None = None  # of a batch, known once memory ran out
        self.seconds = 0.0

    def __call__(self, batch: SizedBatch) -> Iterator[tuple[SizedBatch, dict[str, Tensor], Callable[[], None]]]:
        """Yields (part of the batch, {map: N x ...} on its way to the CPU, a function that waits for it to be there).

        All of it at once, unless memory runs out: then halves, and no larger batch is tried again.

        Raises:
            OutOfMemory: for a single picture too.
        """
        pixels, count, start = batch.pictures[0, 0].numel(), len(batch.entries), 0
        while start < count:
            step = count if self.most_pixels is None else max(1, self.most_pixels // pixels)
            part = batch.part(start, start + step)
            try:
                with memory_told(self.extractor.name, len(part.entries)):
                    found = self._features(part)
            except OutOfMemory as error:
                if len(part.entries) == 1:
                    raise OutOfMemory(f"{error}, --max-side with --keep-size, or --dtype bfloat16") from error
                found = None  # outside of this block the error, and all that it holds, is gone
            if found is None:
                self.most_pixels = len(part.entries) // 2 * pixels
                self.log(f"out of memory with {len(part.entries)} pictures at once; going on with halves of that")
                if self.cuda:
                    torch.cuda.empty_cache()
                continue
            yield part, *found
            start += len(part.entries)

    @torch.inference_mode()
    def _features(self, batch: SizedBatch) -> tuple[dict[str, Tensor], Callable[[], None]]:
        if self.prepare is not None:
            self.prepare(batch.entries)
        if self.cuda:
            begin, end, there = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            begin.record()
            maps = self._maps(batch.pictures)
            end.record()
            maps = {name: found.to("cpu", non_blocking=True) for name, found in maps.items()}  # into pinned memory
            there.record()

            def wait() -> None:
                there.synchronize()
                self.seconds += begin.elapsed_time(end) / 1000

            return maps, wait
        clock = time.perf_counter()
        maps = {name: found.cpu() for name, found in self._maps(batch.pictures).items()}
        self.seconds += time.perf_counter() - clock
        return maps, lambda: None

    def _maps(self, pictures: Tensor) -> dict[str, Tensor]:
        maps = self.extractor(pictures)
        if self.pool:
            maps = {name: found.float().mean((2, 3)) for name, found in maps.items()}
        return {name: found.to(self.dtype, memory_format=torch.contiguous_format) for name, found in maps.items()}


def _store(
    store: Store, computer: Computer, advice: str | None, batch: SizedBatch, maps: dict[str, Tensor], wait: Callable
) -> None:
    wait()
    for name, found in maps.items():
        finite = found.isfinite().flatten(1).all(1)
        if not finite.all():
            key = batch.entries[int(finite.int().argmin())].key
            half = "--store-dtype float32" if computer.dtype == torch.float16 else ""
            half += " --dtype bfloat16 or float32" if computer.extractor.dtype == torch.float16 else ""
            half = f"too large for float16? Give {half.strip()} and another --out" if half else ""
            remedy = (half if advice is None else advice) or "look at the weights"
            raise ModelError(f"{computer.extractor.name}: {name} of {key} is not finite; {remedy}")
    keys = [entry.key for entry in batch.entries]
    store.add(Computed(keys, batch.sizes, tuple(batch.pictures.shape[-2:]), maps))


def run(
    entries: Sequence[ImageSource],
    extractor: Extractor,
    resize: Resize,
    store: Store,
    pool: bool = False,
    dtype: str = "float16",
    batch_size: int = 8,
    workers: int = 2,
    prepare: Prepare | None = None,
    strict: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = tqdm.write,
    group: Callable[[ImageSource], Hashable] | None = None,
    advice: str | None = None,
) -> ExtractReport:
    """Features of all entries, into the store.

    At most 4 pictures per worker, 4 batches that wait for pictures of their size, 2 batches in front of the model, and
    behind it 3 batches and one shard are in memory at a time.

    Args:
        batch_size: pictures of one size per pass.
        workers: processes that read pictures; 0: a thread does.
        prepare: see `Computer`; so for the others.
        strict: stop at the first picture that cannot be read. Otherwise the store notes it.
        progress: show a bar.
        log: called with messages.
        group: a pass takes images of one group only.
        advice: what to do about features that are not finite, in place of the options of extraction.

    Raises:
        ImageError: with `strict`. ModelError: out of memory for one picture, features that are not finite. OSError: the
            disk does not take them. What was computed until then is stored, if it can be.
    """
    report = ExtractReport()
    computer = Computer(extractor, pool, dtype, prepare, log)
    clock = time.perf_counter()
    with (
        tqdm(total=len(entries), desc=extractor.name, unit="img", disable=not progress) as bar,
        ThreadPoolExecutor(1) as writer,
    ):

        def failed(read: Read) -> None:
            report.failed += 1
            store.fail(read.entry.key, read.entry.path, read.error)
            bar.update()
            if strict:
                raise ImageError(read.error)

        found = reads(entries, resize, workers)
        source = ahead(batches(found, batch_size, 4 * batch_size, failed, computer.cuda, group))
        pending: deque = deque()
        try:
            while True:
                waiting = time.perf_counter()
                batch = next(source, None)
                report.reading += time.perf_counter() - waiting
                if batch is None:
                    break
                for done in computer(batch):
                    pending.append(writer.submit(_store, store, computer, advice, *done))
                    report.pictures += len(done[0].entries)
                    waiting = time.perf_counter()
                    while len(pending) > BEHIND:
                        pending.popleft().result()
                    report.storing += time.perf_counter() - waiting
                bar.update(len(batch.entries))
            waiting = time.perf_counter()
        finally:  # what was computed is kept, also after an error or Ctrl-C
            source.close()
            errors = [error for future in pending if (error := future.exception())]  # waits for each
            store.flush()
            if errors:
                raise errors[0]
        report.storing += time.perf_counter() - waiting
    report.seconds, report.computing = time.perf_counter() - clock, computer.seconds
    return report
