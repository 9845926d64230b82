"""From files to batches of one size: decoded by worker processes, gathered by size, a little ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..utils.guard import started
from .decoding import ImageError, memory_named
from .images import stack_pixels, to_pixels
from .sources import ImageSource

T = TypeVar("T")
PREFETCH = 4  # pictures that wait at each worker
AHEAD = 2  # batches that wait for the model


@dataclass(frozen=True)
class Resize:
    """How a picture becomes a model's input.

    Attributes:
        mode: "squash", "pad" or "crop" to `size` (height, width), see `images.to_input`; "keep": as it comes, but
        longest: shrunk until its longer side has at most so many pixels, not fewer than `multiple`, and
        multiple: both sides rounded to multiples of it, where `longest` allows.
        least: sides shorter than this are refused.
        mean: what "pad" fills with, 0..1 per channel.
    """

    mode: str = "squash"
    size: tuple[int, int] | None = None
    longest: int | None = None
    multiple: int = 1
    least: int = 1
    mean: Sequence[float] = (0.5, 0.5, 0.5)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the input made of a picture."""
        if self.mode != "keep":
            return self.size
        factor = min(1, self.longest / max(width, height)) if self.longest else 1
        counts = [max(1, round(side * factor / self.multiple)) for side in (height, width)]
        if self.longest:  # rounding up ends there
            counts = [min(count, self.longest // self.multiple) for count in counts]
        return counts[0] * self.multiple, counts[1] * self.multiple

    def __call__(self, image: Image.Image) -> Tensor:
        """3 x H x W, see `images.to_pixels`. Raises ImageError if it would be too small."""
        target = self.target(*image.size)
        if min(target) < self.least:
            raise ImageError(
                f"{target[1]}x{target[0]} pixels, but both sides must be at least {self.least}; "
                "leave it out, or give --size without --keep-size"
            )
        return to_pixels(image, target, "squash" if self.mode == "keep" else self.mode, self.mean)


class Read(NamedTuple):
    """A picture that was read: 3 x H x W, and its own (width, height); or None, and the reason."""

    entry: ImageSource
    picture: Tensor | None
    size: tuple[int, int] = (0, 0)
    error: str = ""


class SizedBatch(NamedTuple):
    """Pictures of one size: B x 3 x H x W, uint8 or in 0..1; their entries; their own (width, height)."""

    pictures: Tensor
    entries: list[ImageSource]
    sizes: list[tuple[int, int]]

    def part(self, start: int, stop: int) -> SizedBatch:
        return SizedBatch(*(field[start:stop] for field in self))


class Pictures(Dataset):
    """Reads entries. Its indices are the entries themselves: workers need not hold the list."""

    def __init__(self, resize: Resize):
        self.resize = resize

    def __getitem__(self, entry: ImageSource) -> Read:
        try:
            image = entry.read()
            with memory_named(entry.path):
                return Read(entry, self.resize(image), image.size)
        except ImageError as error:
            told = str(error)
            return Read(entry, None, error=told if entry.path in told else f"{entry.path}: {told}")


def _itself(read: Read) -> Read:
    return read


def reads(entries: Sequence[ImageSource], resize: Resize, workers: int) -> Iterator[Read]:
    """All entries read, in their order, by `workers` processes (0: by the thread that asks)."""
    kwargs = dict(prefetch_factor=PREFETCH) if workers else {}
    return started(
        DataLoader(
            Pictures(resize), sampler=entries, batch_size=None, num_workers=workers, collate_fn=_itself, **kwargs
        )
    )


def batches(
    found: Iterable[Read],
    batch_size: int,
    waiting: int,
    failed: Callable[[Read], None],
    pin: bool = False,
    group: Callable[[ImageSource], Hashable] | None = None,
) -> Iterator[SizedBatch]:
    """Gathers pictures by size. What is batched with what depends on the order of the pictures alone.

    Args:
        found: from `reads`.
        batch_size: of pictures of one size.
        waiting: pictures that may wait for others of their size; then those that wait longest go in a smaller batch.
        failed: is told what could not be read.
        pin: into memory from which a GPU fetches faster.
        group: batches hold images of one group only.
    """
    buckets: dict[tuple, list[Read]] = {}  # in the order of their first pictures
    count = 0

    def take(shape: tuple) -> SizedBatch:
        bucket = buckets.pop(shape)
        pictures = stack_pixels([read.picture for read in bucket])
        return SizedBatch(
            pictures.pin_memory() if pin else pictures, [read.entry for read in bucket], [read.size for read in bucket]
        )

    for read in found:
        if read.picture is None:
            failed(read)
            continue
        shape = (tuple(read.picture.shape), group(read.entry) if group else None)
        # A copy: what comes from a worker holds a file handle open.
        buckets.setdefault(shape, []).append(read._replace(picture=read.picture.clone()))
        count += 1
        if len(buckets[shape]) == batch_size:
            count -= batch_size
            yield take(shape)
        elif count > waiting:
            oldest = next(iter(buckets))
            count -= len(buckets[oldest])
            yield take(oldest)
    for shape in list(buckets):
        yield take(shape)


def ahead(items: Iterable[T], depth: int = AHEAD) -> Iterator[T]:
    """Iterates in a thread of its own, up to `depth` items ahead; errors come through."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, iterator, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
