"""WebDataset shards (as img2dataset writes them), streamed in a seeded order that a resumed run continues."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..utils.errors import InputError
from ..utils.seeding import mix_seed, step_generator
from .batches import SPARE, DecodeOptions, TrainingBatch, decode_batch
from .captioned import read_shard
from .shards import find_shards
from .sources import ImageSource

__all__ = ["ShardBatches", "find_shards"]


class ShardBatches(IterableDataset):
    """Endless training batches from shards. Give it to a DataLoader with batch_size=None.

    Shards are permuted in each epoch and split over all workers of all processes (samples in turn, where there are
    fewer shards than workers); samples pass a shuffle buffer. The order depends on seed, number of processes and of
    workers alone, so that a run resumed at `start` with the same numbers sees what it would have seen: what was seen
    before is read past without being decoded.

    Args:
        shards: paths. options: see `batches.DecodeOptions`. seed.
        batch_size: of one process. start: batches of each process that are done.
        rank, world: of this process. buffer: samples to shuffle among.
    """

    def __init__(
        self,
        shards: list[str],
        options: DecodeOptions,
        seed: int,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int = 256,
    ):
        self.shards, self.options, self.seed, self.batch_size = shards, options, seed, batch_size
        self.start, self.rank, self.world, self.buffer = start, rank, world, buffer
        self._corrupt: list[str] = []
        self._last: list[ImageSource] = []  # for a batch without any readable picture

    def __iter__(self) -> Iterator[TrainingBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # DataLoader takes batches from its workers in turn, beginning with the first: batch n is of worker n % workers.
        place = (worker + self.start) % workers
        done = len(range(place, self.start, workers)) * self.batch_size
        part = self.rank * workers + place
        samples = self._shuffled(part, self.world * workers)
        for _ in range(done):
            next(samples)
        while True:
            chosen = [next(samples) for _ in range(self.batch_size)]
            batch = decode_batch(chosen, self.options, self.seed, part, done, spare=self._spare())
            self._last = [picture for picture in chosen if picture.name in batch.names] or self._last
            batch.broken.extend(self._corrupt)
            self._corrupt.clear()
            yield batch
            done += self.batch_size

    def _spare(self) -> Iterator[ImageSource]:
        """For a batch of which nothing can be read: the last good ones; before there are any, the first of all."""
        yield from self._last or itertools.islice(self._stream(0, 1), SPARE)

    def _shuffled(self, part: int, parts: int) -> Iterator[ImageSource]:
        draw, held = random.Random(mix_seed(self.seed, part, 17)), []
        for sample in self._stream(part, parts):
            held.append(sample)
            if len(held) >= max(self.buffer, 1):
                index = draw.randrange(len(held))
                held[index], held[-1] = held[-1], held[index]
                yield held.pop()

    def _stream(self, part: int, parts: int) -> Iterator[ImageSource]:
        for epoch in itertools.count():
            order = torch.randperm(len(self.shards), generator=step_generator(torch.device("cpu"), self.seed, epoch, 1))
            shards = [self.shards[index] for index in order]
            # Where a part finds no images (shards without any, fewer images than parts) it takes those of all.
            ways = [(shards[part::parts], 1)] * (len(shards) >= parts) + [(shards, parts), (shards, 1)]
            for chosen, step in ways:
                found = False
                for number, picture in enumerate(
                    itertools.chain.from_iterable(read_shard(path, self._corrupt) for path in chosen)
                ):
                    if number % step == part % step:
                        found = True
                        yield picture
                if found:
                    break
            else:
                reasons = "; ".join([*dict.fromkeys(self._corrupt)][:3])
                reasons = reasons or "no images"
                raise InputError(f"no samples in the shards, e.g. {shards[0]} ({reasons}); give shards of images")
