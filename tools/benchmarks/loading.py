"""Seconds and memory that loading weights takes, each way in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from cleandift_backbones import checkpoints
from cleandift_backbones.models.architectures import spec_of
from cleandift_backbones.utils.errors import StateError, file_errors

COMMAND = Path(__file__).parents[1] / "benchmark.py"
WAYS = ("safetensors", "this package", "float32", "this package, us6", "plain")


def random_native(path: Path, model: str) -> None:
    """Writes a native file of a model in 16 bit, with random numbers."""
    import diffusers

    arch = spec_of(model).arch
    with torch.device("meta"):
        shapes = timm.create_model(model, final_map="us10").state_dict()
        unet = diffusers.UNet2DConditionModel(**arch.denoiser.config).state_dict()
    shapes |= {f"unet.{name}": tensor for name, tensor in unet.items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half() * 0.02
    state = {n: noise.repeat(-(-t.numel() // len(noise)))[: t.numel()].reshape(t.shape) for n, t in shapes.items()}
    state["timestep"] = torch.tensor(261.0)
    checkpoints.save_native(state, path, {"model": model})


def memory(what: str) -> float:
    """RSS in MB: "VmRSS" now, "VmHWM" the highest so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def load_once(way: str, file: str, model: str) -> dict:
    """Loads in this process; returns seconds, and MB held at the end and at the highest."""
    overlay = dict(pretrained_cfg_overlay=dict(file=file))
    timm.create_model("test_cleandift")  # imports
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, clock = memory("VmRSS"), time.perf_counter()
    if way == "safetensors":
        held = load_file(file)
    elif way == "plain":
        built = timm.create_model(model, final_map="us10")
        state = load_file(file)
        built.load_state_dict({name: state[name] for name in built.state_dict()})
        built.half()
        held = built.state_dict()
    else:
        kwargs = dict(features_only=True, out_indices=(4,)) if way.endswith("us6") else dict(final_map="us10")
        dtype = None if way == "float32" else "auto"
        held = timm.create_model(model, pretrained=True, dtype=dtype, **kwargs, **overlay).state_dict()
    for tensor in held.values():
        tensor.reshape(-1).view(torch.uint8)[::2048].sum()  # reads every page
    seconds = time.perf_counter() - clock
    return dict(seconds=seconds, held=memory("VmRSS") - before, peak=memory("VmHWM") - before)


def loading(options: argparse.Namespace) -> dict:
    with (
        file_errors(options.temporary or tempfile.gettempdir()),
        tempfile.TemporaryDirectory(dir=options.temporary) as folder,
    ):
        file = Path(options.file) if options.file else Path(folder, "model.safetensors")
        if not options.file:
            random_native(file, options.model)
        rows: dict[str, dict[str, list[dict]]] = {way: {"cold": [], "warm": []} for way in WAYS}
        for _ in range(options.repeat):
            for way in WAYS:  # in turn, so that a busy moment does not hit one of them alone
                for state in ("cold", "warm"):
                    with open(file, "rb") as handle:
                        if state == "cold":
                            os.fsync(handle.fileno())
                            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    command = [sys.executable, str(COMMAND), "loading-once", way, str(file), options.model]
                    run = subprocess.run(command, capture_output=True, text=True)
                    if run.returncode:
                        told = (run.stderr.strip() or "it was killed").splitlines()[-1]
                        raise StateError(f"loading {file} as {options.model} ({way}) failed: {told}")
                    rows[way][state].append(json.loads(run.stdout.splitlines()[-1]))
                took = {state: f"{runs[-1]['seconds']:.2f} s" for state, runs in rows[way].items()}
                print(f"{way}: {took['cold']} cold, {took['warm']} warm")
        size = file.stat().st_size / 2**20
    return dict(size=size, rows=rows)


def loading_table(found: dict, options: argparse.Namespace) -> str:
    def median(way: str, state: str, what: str) -> float:
        return statistics.median(run[what] for run in found["rows"][way][state])

    lines = [
        "| way | seconds, cold | seconds, warm | times safetensors, cold | warm | MB held | peak / file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        seconds = {state: median(way, state, "seconds") for state in ("cold", "warm")}
        ratio = {state: seconds[state] / median("safetensors", state, "seconds") for state in seconds}
        held, peak = (
            median(way, "warm", "held"),
            max(run["peak"] for s in ("cold", "warm") for run in found["rows"][way][s]),
        )
        lines.append(
            f"| {way} | {seconds['cold']:.2f} | {seconds['warm']:.2f} | {ratio['cold']:.2f} | {ratio['warm']:.2f} | "
            f"{held:.0f} | {peak / found['size']:.2f} |"
        )
    return (
        f"{options.model}, a file of {found['size']:.0f} MB, medians of {options.repeat}; "
        f"torch {torch.__version__}, {os.cpu_count()} cores\n\n" + "\n".join(lines) + "\n"
    )
