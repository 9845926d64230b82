"""What a run tells: a progress bar's numbers, JSON lines, TensorBoard, pictures of features."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..utils.atomic import save_png
from ..visualize import figures
from .log import JsonLog

_logger = logging.getLogger(__name__)


class Monitor:
    """Collects scalars of steps and writes their means: `log.jsonl`, `tensorboard/`, `samples/`.

    Args:
        out: the run's folder.
        start: step that the run goes on from; later lines of an earlier attempt are forgotten.
        tensorboard: also write event files (needs the package tensorboard).
        active: False on all processes but the first: nothing is written.
    """

    def __init__(self, out: Path, start: int, tensorboard: bool = True, active: bool = True):
        self.out, self.active = out, active
        self.sums: dict[str, Tensor] = {}
        self.steps, self.images, self.since = 0, 0, time.monotonic()
        self.log = JsonLog(out / "log.jsonl", start) if active else None
        self.writer = None
        if active and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                _logger.warning("no TensorBoard files are written: pip install tensorboard, or set tensorboard=false")
            else:
                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)

    def track(self, images: int, **values: Tensor) -> None:
        """Adds one step; nothing waits for the device here."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.images = self.steps + 1, self.images + images

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        """Writes the means since the last time, with images/s and the memory's peak; returns them."""
        if not self.steps:
            return {}
        now = time.monotonic()
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        means |= {"images_per_s": self.images / max(now - self.since, 1e-9), "memory_gb": peak_memory()}
        self.sums, self.steps, self.images, self.since = {}, 0, 0, now
        self.write(step, **means, **extra)
        return means

    def write(self, step: int, **values: float) -> None:
        """One line of the log and one point of each curve."""
        if self.log is not None:
            self.log.write(step=step, **values)
        if self.writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self.writer.add_scalar(name.replace("_map_", "/"), value, step)
            with self._tolerant():
                self.writer.flush()

    def picture(self, step: int, image: Image.Image) -> None:
        """`samples/step_0000100.png`, and the same in TensorBoard."""
        if not self.active:
            return
        with self._tolerant():
            save_png(image, self.out / "samples" / f"step_{step:07d}.png")
        if self.writer is not None:
            from torchvision.transforms.functional import pil_to_tensor

            self.writer.add_image("features", pil_to_tensor(image.convert("RGB")), step)

    def close(self) -> None:
        if self.writer is not None:
            with self._tolerant():
                self.writer.close()

    @contextmanager
    def _tolerant(self):
        """A full disk costs what is shown, not the run."""
        try:
            yield
        except OSError as error:
            _logger.warning(f"{self.out}: {error}; the run goes on")


def peak_memory() -> float:
    """The most memory held so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def feature_sheet(images: Tensor, rows: Mapping[str, Sequence[Tensor]], side: int = 128) -> Image.Image:
    """Pictures on top, and below each row the maps' three principal components as colours, in one basis a row.

    Args:
        images: N x 3 x H x W in [-1, 1].
        rows: caption -> N maps, C x h x w each.
    """

    def panel(image: Image.Image, caption: str = "") -> figures.Panel:
        return figures.Panel(image.resize((side, side), Image.Resampling.NEAREST), caption)

    shown = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = [[panel(Image.fromarray(array)) for array in shown]]
    for caption, maps in rows.items():
        coloured, _ = figures.principal_colours([x.float().cpu() for x in maps])
        sheet.append([panel(image, caption if number == 0 else "") for number, image in enumerate(coloured)])
    return figures.grid(sheet, height=side)
