"""Metrics of a run, through Accelerate's trackers: log.jsonl, TensorBoard, W&B, MLflow, Trackio; and its figures."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor

from ..utils.atomic import save_png, set_aside, write_text
from ..utils.errors import CleanDIFTError, InputError
from ..visualize import figures

_logger = logging.getLogger(__name__)
PROJECT = "cleandift_backbones"
RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}  # arguments that name the run within the project
LIST_OF_IMAGES = ("tensorboard", "wandb", "swanlab")  # trackers whose log_images takes N x H x W x 3


def read_log(path: Path) -> list[dict]:
    """The lines of a `JsonLog`; one that was cut off (full disk, power cut) is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: str) -> float:
    """The step of a line of the log; of one that was cut off (full disk, power cut) infinity: it is dropped."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


class JsonLog(GeneralTracker):
    """A tracker that writes JSON lines. Started at step `start`, it forgets later lines, those of work that is redone.

    A file of that name without any line of such a log becomes NAME.other. "loss/us6" is written as "loss_map_us6".
    """

    name, requires_logging_directory = "log.jsonl", False

    def __init__(self, path: Path, begin: int):
        super().__init__()
        self.path, self.begin = path, begin

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        """See GeneralTracker."""
        path = self.path
        lines = path.read_text(errors="replace").splitlines(True) if path.is_file() else []
        if lines and all(_step_of(line) == math.inf for line in lines):
            print(f"{path} was not written by a run: kept as {set_aside(path, 'other').name}", file=sys.stderr)
        write_text(path, "".join(line for line in lines if self.begin and _step_of(line) <= self.begin))

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        """See GeneralTracker."""
        line = {"step": step} | {name.replace("/", "_map_"): _rounded(value) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _rounded(value: object) -> object:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None  # JSON has no such number
    return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.4g}")


def choose_trackers(tensorboard: bool, others: Sequence[str] | None) -> list[str]:
    """The trackers of a run, by Accelerate's names; TensorBoard is left out with a warning where it is not installed.

    Raises:
        InputError: one of `others` is no tracker of Accelerate, or its package is not installed.
    """
    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    for name in others or ():
        if name not in known:
            raise InputError(f"report_to={name}: there is no such tracker; give some of {', '.join(known)}")
        if LoggerType(name) not in get_available_trackers():
            raise InputError(f"report_to={name} needs a package that is not installed: pip install {name}")
    if tensorboard and LoggerType.TENSORBOARD not in get_available_trackers():
        _logger.warning("no TensorBoard files are written: pip install tensorboard, or set tensorboard=false")
        tensorboard = False
    return list(dict.fromkeys([*["tensorboard"] * tensorboard, *(others or ())]))


class Monitor:
    """Collects scalars of steps and gives their means to all trackers; figures go to `samples/`, too.

    Args:
        accelerator: whose trackers are started, on the first process; others write nothing.
        out: the run's folder, for log.jsonl, tensorboard/ and samples/.
        start: step that the run goes on from; later lines and points of an earlier attempt are forgotten.
        trackers: names of Accelerate's trackers beside log.jsonl, of `choose_trackers`.
        settings: name -> number or text, for trackers that show them.

    Raises:
        InputError: a tracker does not start (nobody is logged in, no server).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        start: int,
        trackers: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ):
        self.accelerator, self.out = accelerator, out
        self.sums: dict[str, Tensor] = {}
        self.steps, self.images, self.since = 0, 0, time.monotonic()
        purge = dict(purge_step=start + 1) if start else {}
        accelerator.project_configuration.set_directories(str(out))
        accelerator.log_with = [JsonLog(out / "log.jsonl", start)]
        for name in trackers:
            # TensorBoard's own would lie in a folder of the project's name
            own = TensorBoardTracker("tensorboard", out, **purge) if name == "tensorboard" else LoggerType(name)
            accelerator.log_with.append(own)
        named = {tracker: {argument: out.name} for tracker, argument in RUN_NAMES.items()}
        try:
            accelerator.init_trackers(PROJECT, init_kwargs=named)
            for tracker in accelerator.trackers:
                if settings and tracker.name != "tensorboard":  # it would show them as a run of its own
                    tracker.store_init_configuration(dict(settings))
        except CleanDIFTError:
            raise
        except Exception as error:  # of many types, one library's each
            reason = f"a tracker does not start ({error}): log in there, or leave it out"
            raise InputError(f"log.jsonl, {', '.join(trackers)}: {reason}") from error

    def track(self, images: int, **values: Tensor) -> None:
        """Adds one step; nothing waits for the device here."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.images = self.steps + 1, self.images + images

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        """Logs the means since the last time, with images/s and the memory's peak; returns them."""
        if not self.steps:
            return {}
        now = time.monotonic()
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        means |= {"images_per_s": self.images / max(now - self.since, 1e-9), "memory_gb": peak_memory()}
        self.sums, self.steps, self.images, self.since = {}, 0, 0, now
        self.write(step, means | extra)
        return means

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Gives values of a step to every tracker."""
        for tracker in self.accelerator.trackers:
            with self._tolerant(tracker.name):
                tracker.log(dict(values), step)

    def picture(self, step: int, image: Image.Image) -> None:
        """`samples/step_0000100.png`, and the same in the trackers that take images."""
        if not self.accelerator.is_main_process:
            return
        with self._tolerant("samples/"):
            save_png(image, self.out / "samples" / f"step_{step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name in LIST_OF_IMAGES:
                layout = dict(dataformats="NHWC") if tracker.name == "tensorboard" else {}
                with self._tolerant(tracker.name):
                    tracker.log_images({"features": np.asarray(image.convert("RGB"))[None]}, step, **layout)

    def close(self) -> None:
        """Ends the trackers."""
        for tracker in self.accelerator.trackers:
            with self._tolerant(tracker.name):
                tracker.finish()
        self.accelerator.trackers.clear()

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """A full disk, or a server that is gone, costs what is shown, not the run."""
        try:
            yield
        except Exception as error:  # trackers' libraries raise errors of many types
            _logger.warning(f"{self.out}: {what} is not written: {error}; the run goes on")


def peak_memory() -> float:
    """The most memory held so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def feature_sheet(images: Tensor, rows: Mapping[str, Sequence[Tensor]], side: int = 128) -> Image.Image:
    """Images on top, and below each row the maps' three principal components as colours, in one basis a row.

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
