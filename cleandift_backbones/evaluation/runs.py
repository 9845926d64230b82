"""Models measured on a task: loaded, their features computed or read, and what was found as rows of a report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data.sources import ImageSource
from ..features.engines.local import process_place
from ..features.extractor import Extractor, ModelError
from ..features.options import load_model
from ..utils.progress import tqdm
from .features import FeatureStores
from .plans import Run
from .report import Report, Row
from .task import Task

if TYPE_CHECKING:
    from .api import EvaluateConfig


class RunContext:
    """What a task's `run` has at hand.

    Attributes:
        config: `api.EvaluateConfig`.
        plan: the models with their settings.
        device: where models run.
        out: folder of the report.
    """

    def __init__(self, config: EvaluateConfig, plan: Sequence[Run], device: torch.device, out: Path):
        self.config, self.plan, self.device, self.out = config, list(plan), device, out

    @property
    def command(self) -> str:
        """The command that this process runs."""
        return shlex.join(["python", *sys.argv])

    def load(self, run: Run) -> Extractor:
        """A run's model on the device, optimised if that is asked for."""
        extractor = load(self.config, run, self.device)
        if self.config.prompt not in ("auto", "none"):
            extractor.set_prompts([self.config.prompt])
        if self.config.optimize:
            extractor.optimize()
        return extractor

    def report(self, task: Task) -> Report | None:
        """All runs measured on a task whose features are stored."""
        config = self.config
        stores = FeatureStores(
            config.cache or Path(self.out, "features"), config.batch_size, task.mode, task.pool, config.dtype,
            config.seed, progress=config.progress,
        )  # fmt: skip
        rows, details = [], {}
        for run in tqdm(self.plan, desc="runs", unit="run", disable=len(self.plan) == 1 or not config.progress):
            found = measure(config, run, task, stores, self.device)
            if found is not None:
                rows.append(found[0])
                details[run.label] = found[1]
        if not rows:  # a process that only computes features
            return None
        metrics = list(dict.fromkeys(key for row in rows for tallies in row.results.values() for key in tallies))
        info = dict(task=task.name, command=self.command, pictures=len(task.items), **task.facts)
        info |= dict(features=config.dtype, device=str(self.device), threads=torch.get_num_threads(), details=details)
        names, lower = {key: task.heading(key) for key in metrics}, task.lower & set(metrics)
        return Report(rows, names, info, config.seed, task.main(metrics), lower, task.unit)


def load(settings, run: Run, device: torch.device) -> Extractor:
    """The run's model, with the size of the model's own input unless `settings.size` is another."""
    return load_model(run.model, run.maps, run.pretrained, device, settings.size, settings.seed, **run.kwargs)


def check_models(settings, plan: Sequence[Run], always: bool = False) -> dict[str, str]:
    """Loads every model once, where one that is unavailable would be found after the work on another.

    Args:
        settings: with `prompt`, `size` and `seed`.
        plan: the runs.
        always: also where there is but one.

    Returns:
        Hashes of the models' weights by the runs' names; empty where none was loaded.

    Raises:
        ModelError: a model or its weights are unavailable; a prompt is given, but none of the models takes one.
    """
    models = {run.name: run for run in plan}
    prompted = settings.prompt not in ("auto", "none")
    if len(models) == 1 and not prompted and not always:
        return {}
    takes, weights = [], {}
    for name, run in models.items():
        extractor = load(settings, run, torch.device("cpu"))
        weights[name] = extractor.weights_digest()
        if extractor.takes_prompts and prompted:
            extractor.set_prompts([settings.prompt])
        takes.append(extractor.takes_prompts)
        del extractor  # two big models need not be in memory at once
    if prompted and not any(takes):
        raise ModelError(f"{', '.join(models)}: none takes prompts, or knows a text encoder; give --prompt none")
    return weights


def measure(
    settings,
    run: Run,
    task: Task,
    stores: FeatureStores,
    device: torch.device,
    latents: dict[bytes, torch.Tensor] | None = None,
    keep: bool = True,
) -> tuple[Row, str] | None:
    """One run measured on one task.

    Args:
        settings: with `size`, `prompt`, `optimize` and `seed`.
        run: the model and its settings.
        task: what is measured.
        stores: where features are kept.
        device: where the model runs.
        latents: encoded images that runs share, see `Extractor.remember_latents`.
        keep: False removes the features after they were measured.

    Returns:
        The row; and its prompt, size and seconds in words. None from all processes but the first, which only compute
        features.
    """
    clock = time.perf_counter()
    extractor = load(settings, run, device)
    items, words = _prompted(settings, task, extractor)
    if settings.optimize:
        extractor.optimize(fixed_prompt=not extractor.takes_prompts)  # the stores set that of each image
    if latents is not None:
        extractor.remember_latents(latents)
    drawn = {} if run.pretrained else dict(random_weights=True)  # no "other weights" of the trained model's
    found = stores.features(extractor, items, run.settings | drawn)
    if process_place().rank:
        return None
    seconds, size = time.perf_counter() - clock, extractor.size
    del extractor  # free the model's memory before measuring
    results = {name: task.measure(features, size) for name, features in found.items()}
    if not keep:
        stores.remove(found)
    total = time.perf_counter() - clock
    words += f", {size[1]}x{size[0]}, {total - seconds:.1f} s after {seconds:.1f} s for the features"
    return Row(run.label, run.kind, results, run.settings, total), words


def _prompted(settings, task: Task, extractor: Extractor) -> tuple[list[ImageSource], str]:
    """The items with the prompts that this model gets, and words about them."""
    texts = [item.caption for item in task.items]
    if settings.prompt == "none" or (settings.prompt == "auto" and not (extractor.takes_prompts and any(texts))):
        return [replace(item, caption="") for item in task.items], "no prompt"
    if not extractor.takes_prompts:
        return [replace(item, caption="") for item in task.items], "no prompt (it takes none)"
    if settings.prompt != "auto":
        return [replace(item, caption=settings.prompt) for item in task.items], f"prompt {settings.prompt!r}"
    return task.items, f"prompt {next(filter(None, texts))!r}{' and alike' if len(set(texts)) > 1 else ''}"
