"""Which runs a command makes: its models with their settings, for the tasks and for the suites."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm

from ..features.extractor import PIXELS, ModelError, list_maps
from ..features.model_names import defaults_of, is_noisy, model_spec, twin
from ..features.options import check_noise, model_arguments, pick_maps
from ..utils.atomic import is_file
from ..utils.errors import FileError
from .task import task_of


@dataclass
class Run:
    """One model with settings, to be measured; `name` is the model as it was asked for, "random:..." included."""

    name: str
    label: str
    kind: str
    model: str
    maps: list[str] | None = None  # None: all
    pretrained: bool = True
    settings: dict = field(default_factory=dict)
    kwargs: dict = field(default_factory=dict)


def make_plan(args: argparse.Namespace) -> list[Run]:
    """Every run, its maps found."""
    check_noise(args.model, timesteps=args.timesteps, ensemble=getattr(args, "ensemble", None))
    files = {}
    for entry in args.weights:
        name, _, file = entry.rpartition("=")
        if not name or not is_file(file):
            raise FileError(f"--weights {entry}: expected MODEL=FILE with a file that is there")
        files[name] = file
    strange = set(files) - set(args.model)
    if strange:
        raise ModelError(f"--weights are given for {', '.join(sorted(strange))}, which is not among --model")
    strange = {entry.rpartition("=")[0] for entry in args.map if "=" in entry} - set(args.model)
    if strange:
        raise ModelError(f"--map is given for {', '.join(sorted(strange))}, which is not among --model")
    plan, task = [], task_of(args.task)
    for name in dict.fromkeys(args.model):
        random, bare = name.startswith("random:"), name.removeprefix("random:")
        maps = _maps(args, name, bare)
        weights = files.get(name)
        if is_noisy(bare):
            own = int(defaults_of(bare).timestep) if task.timestep is None else task.timestep
            steps = args.timesteps or [own]
            counts = getattr(args, "ensemble", None) or [task.ensemble]
            for count in counts:
                for step in steps:
                    label = f"{name}, t={step}, {count} noise{'s' if count > 1 else ''}"
                    kind = "control" if random else "noisy"
                    kwargs = model_arguments(step, count, weights)
                    settings = dict(timestep=step, ensemble=count)
                    plan.append(Run(name, label, kind, bare, maps, not random, settings, kwargs))
        elif task.noisy_only:
            raise ModelError(f"{name} draws no noise; give dift_* models")
        else:
            kind = "control" if random else "clean" if model_spec(bare) else "baseline"
            label = f"{bare}, random weights" if random else name
            plan.append(Run(name, label, kind, bare, maps, not random, {}, model_arguments(weights=weights)))
    return plan


def _maps(args: argparse.Namespace, name: str, bare: str) -> list[str]:
    infos = list_maps(bare)
    own = [entry.rpartition("=")[2] for entry in args.map if entry.rpartition("=")[0] == name]
    wanted = own or [entry for entry in args.map if "=" not in entry]
    if not wanted or bare == PIXELS:
        wanted = ["-1"] if task_of(args.task).last_map else []
    nearest = min(reversed(infos), key=lambda info: abs(info["reduction"] - 16))["name"]
    try:
        return pick_maps(bare, infos, wanted, nearest)
    except ModelError as error:
        raise ModelError(f"{name}: {error}; --map {name}=MAP is for this model alone") from None


def make_suite_plan(args: argparse.Namespace, twins: bool = False) -> list[Run]:
    """The runs of a suite: noisy models over timesteps and ensembles, and their UNets on clean images.

    Args:
        args: with `models`, `timesteps`, `ensemble`, `student_weights` and `teacher_weights`.
        twins: each cleandift_* model brings its twin with random weights.
    """
    plan = []
    for name in dict.fromkeys(args.models):
        if name.startswith("random:"):
            bare = name.removeprefix("random:")
            plan.append(Run(name, f"{bare}, random weights", "control", bare, pretrained=False))
        elif is_noisy(name):
            weights = model_arguments(weights=args.teacher_weights)
            for count in args.ensemble:
                for step in args.timesteps:
                    settings = dict(timestep=step, ensemble=count)
                    label = f"{name}, t={step}, {count} noise{'s' if count > 1 else ''}"
                    kwargs = model_arguments(step, count) | weights
                    plan.append(Run(name, label, "noisy", name, settings=settings, kwargs=kwargs))
            label, clean = f"{name}'s UNet on the clean picture", twin(name, "clean")
            for step in args.timesteps:
                kwargs = dict(timestep=step) | (weights or _twin_weights(name))
                plan.append(Run(label, f"{label}, best t", "teacher", clean, None, True, dict(timestep=step), kwargs))
        elif model_spec(name):
            plan.append(Run(name, name, "clean", name, kwargs=model_arguments(weights=args.student_weights)))
            if twins:
                plan.append(Run(f"random:{name}", f"{name}, random weights", "control", name, pretrained=False))
        else:
            plan.append(Run(name, "pixels, 32 x 32" if name == PIXELS else name, "baseline", name))
    return plan


def _twin_weights(name: str) -> dict:
    """Where the weights of a noisy model come from, for its clean twin to load."""
    source, colon, place = name.partition(":")
    if colon:
        return dict(pretrained_cfg_overlay=dict(file=place) if source == "local-dir" else dict(hf_hub_id=place))
    config = timm.get_pretrained_cfg(name).to_dict()
    found = {key: config[key] for key in ("file", "hf_hub_id", "hf_hub_filename") if config.get(key)}
    return dict(pretrained_cfg_overlay=found) if found else {}


def digests(plan: Sequence[Run]) -> dict[str, str]:
    """First digits of the SHA-256 of local weight files, so that a table can be assigned to them."""
    found = {}
    for run in plan:
        if not run.pretrained or run.model == PIXELS or ":" in run.model:
            continue
        file = run.kwargs.get("pretrained_cfg_overlay", {}).get("file") or timm.get_pretrained_cfg(run.model).file
        if file and os.path.isfile(path := Path(file)) and path.name not in found:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found
