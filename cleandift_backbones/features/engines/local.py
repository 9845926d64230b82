"""Batches through the model: pictures are loaded ahead of it and features stored behind it, while it computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.images import ImageError
from ...data.loading import Batch, Read, Resize, ahead, batches, reads
from ...data.sources import Entry
from ...utils.progress import tqdm
from ..extractor import Extractor, ModelError, OutOfMemory, memory_told
from ..formats import DTYPES, Computed
from ..store import Store

BEHIND = 2  # batches of features that wait to be stored


@dataclass
class Report:
    """What a run did, and where its time went: seconds from the first picture's reading to the last shard's writing.

    `computing` is the time that the device spent on the model, pooling and rounding; `reading` and `storing` are the
    times that it waited for pictures and for the disk.
    """

    pictures: int = 0
    failed: int = 0
    seconds: float = 0.0
    computing: float = 0.0
    reading: float = 0.0
    storing: float = 0.0

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
        prompt: for pictures without one of their own; None where no picture has one.
        say: takes sentences.
    """

    def __init__(self, extractor: Extractor, pool: bool, dtype: str, prompt: str | None, say: Callable[[str], None]):
        self.extractor, self.pool, self.dtype, self.prompt, self.say = extractor, pool, DTYPES[dtype], prompt, say
        self.cuda = extractor.device.type == "cuda"
        self.most_pixels: int | None = None  # of a batch, known once memory ran out
        self.seconds = 0.0

    def __call__(self, batch: Batch) -> Iterator[tuple[Batch, dict[str, Tensor], Callable[[], None]]]:
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
                self.say(f"out of memory with {len(part.entries)} pictures at once; going on with halves of that")
                if self.cuda:
                    torch.cuda.empty_cache()
                continue
            yield part, *found
            start += len(part.entries)

    @torch.inference_mode()
    def _features(self, batch: Batch) -> tuple[dict[str, Tensor], Callable[[], None]]:
        if self.prompt is not None:
            self.extractor.set_prompts([entry.prompt or self.prompt for entry in batch.entries])
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


def _store(store: Store, computer: Computer, batch: Batch, maps: dict[str, Tensor], wait: Callable[[], None]) -> None:
    wait()
    for name, found in maps.items():
        finite = found.isfinite().flatten(1).all(1)
        if not finite.all():
            key = batch.entries[int(finite.int().argmin())].key
            half = "--store-dtype float32" if computer.dtype == torch.float16 else ""
            half += " --dtype bfloat16 or float32" if computer.extractor.dtype == torch.float16 else ""
            remedy = f"too large for float16? Give {half.strip()} and another --out" if half else "look at the weights"
            raise ModelError(f"{computer.extractor.name}: {name} of {key} is not finite; {remedy}")
    keys = [entry.key for entry in batch.entries]
    store.add(Computed(keys, batch.sizes, tuple(batch.pictures.shape[-2:]), maps))


def run(
    entries: Sequence[Entry],
    extractor: Extractor,
    resize: Resize,
    store: Store,
    pool: bool = False,
    dtype: str = "float16",
    batch_size: int = 8,
    workers: int = 2,
    prompt: str | None = None,
    strict: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = tqdm.write,
) -> Report:
    """Features of all entries, into the store.

    At most 4 pictures per worker, 4 batches that wait for pictures of their size, 2 batches in front of the model, and
    behind it 3 batches and one shard are in memory at a time.

    Args:
        batch_size: pictures of one size per pass.
        workers: processes that read pictures; 0: a thread does.
        strict: stop at the first picture that cannot be read. Otherwise the store notes it.
        progress: show a bar. say: takes sentences. Others: see `Computer`.

    Raises:
        ImageError: with `strict`. ModelError: out of memory for one picture, features that are not finite. OSError: the
            disk does not take them. What was computed until then is stored, if it can be.
    """
    report = Report()
    computer = Computer(extractor, pool, dtype, prompt, say)
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
        source = ahead(batches(found, batch_size, 4 * batch_size, failed, computer.cuda))
        pending: deque = deque()
        try:
            while True:
                waiting = time.perf_counter()
                batch = next(source, None)
                report.reading += time.perf_counter() - waiting
                if batch is None:
                    break
                for done in computer(batch):
                    pending.append(writer.submit(_store, store, computer, *done))
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
