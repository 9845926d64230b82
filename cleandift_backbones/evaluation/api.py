"""The evaluation as one call: `evaluate("cleandift_tiny", "knn", "photos")`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from ..data.images import check_folder
from ..features.engines.local import process_place
from ..features.extractor import resolve_device
from ..features.options import check_ranges
from ..utils.errors import InputError, needs
from ..utils.locks import hold
from . import tasks  # noqa: F401 (registers this package's tasks)
from .features import STORED
from .plans import make_plan
from .report import Report, check_report
from .runs import RunContext, check_models
from .task import defaults, task_of

RANGES = (
    ("timesteps", 0, 999), ("ensemble", 1, 1024), ("size", 16, 4096), ("batch_size", 1, None), ("limit", 2, None),
    ("threads", 1, None), ("seed", 0, None),
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings that all tasks have in common; those of the command line, with the same defaults.

    Attributes:
        maps: names or indices of maps for all models, "MODEL=MAP" for one of them; empty: the task's default.
        size: side of the model's input in pixels; None: the model's own.
        batch_size: images per pass.
        prompt: text for models that take text; "auto": the task's own; "none": the model's own.
        timesteps: of dift_* models, 0..999; empty: the task's default.
        ensemble: noises averaged by dift_* models; empty: the task's default.
        weights: "MODEL=FILE": safetensors in place of a model's published weights.
        limit: take so many images or pairs; None: the task's default.
        optimize: use what makes this package's models faster with the same maps up to rounding.
        dtype: of features on disk, "float16" or "float32".
        cache: folder of features; None: OUT/features.
        device: "cpu", "cuda", ... or "auto".
        threads: CPU threads; None leaves the number.
        seed: of noises, random weights, probes and the bootstrap.
        progress: shows bars.

    Raises:
        InputError: a value out of range.
    """

    maps: tuple[str, ...] = ()
    size: int | None = None
    batch_size: int = 8
    prompt: str = "auto"
    timesteps: tuple[int, ...] = ()
    ensemble: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    limit: int | None = None
    optimize: bool = True
    dtype: str = "float16"
    cache: str | None = None
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        for name in ("maps", "timesteps", "ensemble", "weights"):
            value = getattr(self, name) or ()
            value = (value,) if isinstance(value, (str, int)) else tuple(value)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "maps", tuple(map(str, self.maps)))
        given = {name: getattr(self, name) for name, *_ in RANGES}
        given |= {name: list(value) or None for name, value in given.items() if isinstance(value, tuple)}
        check_ranges(SimpleNamespace(**given), RANGES)
        if self.dtype not in STORED:
            raise InputError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(STORED)}")


@dataclass
class EvaluationResult:
    """What `evaluate` found.

    Attributes:
        report: with all rows; of a task with a `run` of its own, what that returns.
        paths: the files that were written: JSON, Markdown and a plot.
        lines: the same for people: what the numbers are, a table, and verdicts.
    """

    report: Report
    paths: list[Path]
    lines: list[str]


def evaluate(
    models: str | Sequence[str],
    task: str,
    data: str | os.PathLike,
    out: str | os.PathLike = "results",
    config: EvaluateConfig | None = None,
    **options: object,
) -> EvaluationResult | None:
    """Measures models on a task, and writes OUT/TASK.json, .md and .png.

    Under torchrun or accelerate launch the processes share the features of each model; the first one measures.

    Args:
        models: timm model names; "pixels" is the image itself, "random:NAME" has random weights.
        task: its name, see `task.TASKS`.
        data: the data set, in a layout that the task reads.
        out: folder for the report, and for features unless `config.cache` is another.
        config: what all tasks have in common.
        **options: of the task, see its `Options`.

    Returns:
        The report and its files; None from all processes but the first.

    Raises:
        InputError: an unknown task or option, a value out of range.
        ModelError: a model that is unavailable.
        DataError: a data set that cannot be used.
        FolderInUseError: another process writes this report.
    """
    config, kind = config or EvaluateConfig(), task_of(task)
    if unknown := options.keys() - defaults(kind.Options).keys():
        known = ", ".join(defaults(kind.Options)) or "none"
        raise InputError(f"{task} has no option {', '.join(sorted(unknown))}; its options are: {known}")
    chosen = kind.Options(**options)
    out = Path(out)
    check_folder(out)
    check_folder(config.cache or out)
    check_report(out, task)
    with needs("eval"):
        import matplotlib  # noqa: F401
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    rank, world, local = process_place()
    if device.type == "cuda" and device.index is None and world > 1:
        device = torch.device("cuda", local % torch.cuda.device_count())
    plan = make_plan(
        SimpleNamespace(
            task=task, model=[models] if isinstance(models, str) else list(models), map=list(config.maps),
            timesteps=list(config.timesteps) or None, ensemble=list(config.ensemble) or None,
            weights=list(config.weights),
        )
    )  # fmt: skip
    limit = kind.limit if config.limit is None else config.limit
    with hold(out, task if not rank else f"{task}-{rank}-of-{world}"):
        ready = kind.read(data, chosen, limit, config.seed)
        check_models(config, plan)
        report = ready.run(RunContext(config, plan, device, out))
        if report is None or rank:
            return None
        return EvaluationResult(report, ready.write(report, out), ready.lines(report))
