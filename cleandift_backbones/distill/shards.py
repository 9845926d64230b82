"""WebDataset shards (as img2dataset writes them), streamed in a seeded order that a resumed run continues."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import InputError
from ..tars import SUFFIXES, find_shards
from .data import Batch, DecodeOptions, Picture, caption_of_json, decode_batch
from .trainer import mix_seed, step_generator

__all__ = ["ShardBatches", "caption_of", "find_shards"]


def caption_of(sample: dict) -> str:
    """The caption of a sample: its .txt, else "caption" or "text" of its .json."""
    if "txt" in sample:
        return sample["txt"].decode("utf-8", "replace").strip()
    return caption_of_json(json.loads(sample["json"])) if "json" in sample else ""


class ShardBatches(IterableDataset):
    """Endless training batches from shards. Give it to a DataLoader with batch_size=None.

    Shards are permuted in each epoch and split over all workers of all processes (samples in turn, where there are
    fewer shards than workers); samples pass a shuffle buffer. The order depends on seed, number of processes and of
    workers alone, so that a run resumed at `start` with the same numbers sees what it would have seen: what was seen
    before is read past without being decoded.

    Args:
        shards: paths. options: see `data.DecodeOptions`. seed.
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
        self._last: list[Picture] = []  # for a batch without any readable picture

    def __iter__(self) -> Iterator[Batch]:
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
            chosen = [self._picture(next(samples)) for _ in range(self.batch_size)]
            batch = decode_batch(chosen, self.options, self.seed, part, done, spare=self._last)
            self._last = [picture for picture in chosen if picture.name in batch.names] or self._last
            batch.broken.extend(self._corrupt)
            self._corrupt.clear()
            yield batch
            done += self.batch_size

    def _picture(self, sample: dict) -> Picture:
        name = f"{sample['__url__']}:{sample['__key__']}"
        data = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), b"")
        try:
            return Picture(name, data, caption_of(sample))
        except ValueError as error:
            self._corrupt.append(f"{name}: {error}")
            return Picture(name, data, "")

    def _shuffled(self, part: int, parts: int) -> Iterator[dict]:
        draw, held = random.Random(mix_seed(self.seed, part, 17)), []
        for sample in self._stream(part, parts):
            held.append(sample)
            if len(held) >= max(self.buffer, 1):
                index = draw.randrange(len(held))
                held[index], held[-1] = held[-1], held[index]
                yield held.pop()

    def _stream(self, part: int, parts: int) -> Iterator[dict]:
        from webdataset import tarfile_to_samples

        def corrupt(error: Exception) -> bool:
            self._corrupt.append(f"shard: {error}")
            return True

        for epoch in itertools.count():
            order = torch.randperm(len(self.shards), generator=step_generator(torch.device("cpu"), self.seed, epoch, 1))
            shards = [self.shards[index] for index in order]
            by_shard = len(shards) >= parts
            found = 0
            opened = ({"url": shard} for shard in (shards[part::parts] if by_shard else shards))
            for number, sample in enumerate(tarfile_to_samples(handler=corrupt)(opened)):
                if by_shard or number % parts == part:
                    found += 1
                    yield sample
            if not found:
                raise InputError(
                    f"no samples in the shards of part {part} of {parts}, e.g. {shards[0]}: {self._corrupt}"
                )
