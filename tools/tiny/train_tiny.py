#!/usr/bin/env python
"""Trains the small teacher and its student within a number of minutes, such as a GPU's quarter of an hour.

    python tools/tiny/train_tiny.py --packed packed --vae runs/vae/vae --out runs/tiny --minutes 14
    python tools/tiny/train_tiny.py --packed packed --vae runs/vae/vae --out runs/tiny --teacher "--lr 1e-3"

PACKED is the folder of tools/tiny/pack_pictures.py. In turn: tools/tiny/train_teacher.py into OUT/teacher (on a GPU
256 images a step, bf16, CUDA graphs; the clock anneals its learning rate), tools/finetune.py with the recipe
cleandift_tiny into OUT/student, tools/convert.py --cut into OUT/dift_tiny.safetensors and
OUT/cleandift_tiny.safetensors. Trainings save at least every two minutes; the same command goes on from there, and
skips what is finished. A training that runs out of time ends with the weights that it has.

OUT/results holds what is worth keeping, in parts of at most --file-mb: the teacher without its optimizer, the student,
logs and sheets. `cat OUT/results/results.tar.* | tar x` unpacks them.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    from cleandift_backbones.data.listing import counted
    from cleandift_backbones.distill.checkpoint import Checkpoints
    from cleandift_backbones.features.extractor import resolve_device
    from cleandift_backbones.utils.atomic import readable_size, replacing
    from cleandift_backbones.utils.errors import InputError, MissingFileError, StateError, file_errors
    from cleandift_backbones.utils.locks import hold

    sys.path.insert(0, str(Path(__file__).parents[2]))  # for those who run this file by its path

    from tools.tiny.arguments import above_zero
    from tools.tiny.training import CHECKPOINT

TOOLS = Path(__file__).resolve().parents[1]
RECIPE = TOOLS.parent / "configs/finetune/cleandift_tiny.yaml"
GPU_OPTIONS = ["--batch-size", "256", "--lr", "8e-4", "--ema", "0.9995", "--cuda-graph"]
CONVERT_MINUTES = 0.5  # of the two conversions and the results, at the end
PARTS = r"results\.tar\.\d{3}"
# What comes first matters most: a reader may have room for some parts alone.
RESULTS = ("teacher/log.jsonl", "teacher/samples.png", "teacher/model_index.json", "teacher/unet", "teacher/vae",
           "teacher/text_encoder", "teacher/tokenizer", "teacher/scheduler", "student/log.jsonl", "student/recipe.yaml",
           "cleandift_tiny.safetensors", "student/samples")  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--packed", required=True, type=Path, help="folder that tools/tiny/pack_pictures.py wrote")
    add("--vae", required=True, help="the VAE's folder, made by tools/tiny/train_vae.py (its OUT/vae)")
    add("--out", required=True, type=Path, help="folder for teacher, student, feature files and results/")
    add("--results", type=Path, help="folder for the results in parts (default: OUT/results)")
    add("--minutes", type=above_zero(float), default=14.0, help="for all of it (default: 14)")
    add("--student-minutes", type=above_zero(float), default=3.0, help="of these, for the student (default: 3)")
    add(
        "--start-minutes",
        type=above_zero(float),
        default=1.0,
        help="for reading images and the last sheet (default: 1)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--file-mb", type=above_zero(float), default=16.0, help="largest file of the results in MB (default: 16)")
    add("--student", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the student's recipe")
    add("--teacher", default="", metavar="OPTIONS", help="of tools/tiny/train_teacher.py, in quotation marks")
    options = parser.parse_args(arguments)
    try:
        options.teacher = shlex.split(options.teacher)
    except ValueError as error:
        raise InputError(f"--teacher {options.teacher}: {error}") from None
    options.results = options.results or options.out / "results"
    if options.minutes <= options.student_minutes + options.start_minutes + CONVERT_MINUTES:
        raise InputError(
            f"--minutes {options.minutes:g} leaves the teacher no time beside --student-minutes "
            f"{options.student_minutes:g}, --start-minutes {options.start_minutes:g} and {CONVERT_MINUTES:g} to convert"
        )
    return options


def sets(packed: Path) -> list[str]:
    """The options of tools/tiny/train_teacher.py for the sets that a packed folder holds.

    Raises:
        MissingFileError: there is none.
    """
    found = ["--data", str(packed / "emoji")] if (packed / "emoji").is_dir() else []
    if (packed / "photos").is_dir():
        found += ["--photos", str(packed / "photos/train/*.tar.gz")]
        found += ["--photos-heldout", str(packed / "photos/heldout/*.tar.gz")]
    if not found:
        raise MissingFileError(
            f"{packed} holds neither photos/ nor emoji/: run tools/tiny/pack_pictures.py --out {packed}"
        )
    return found


def run(tool: str, *arguments: object, minutes: float | None = None) -> int:
    """Runs a tool; returns its exit code. After so many minutes SIGTERM lets it save and stop."""
    script = next(path for path in (TOOLS / f"tiny/{tool}.py", TOOLS / f"{tool}.py") if path.is_file())
    process = subprocess.Popen([sys.executable, str(script), *map(str, arguments)])
    try:
        return process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        print(f"{tool} has used its time", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return process.returncode


def check(code: int, done: Path, tool: str) -> None:
    """Raises StateError unless a tool left what it should have."""
    if code or not done.exists():
        raise StateError(f"{tool} ended with {code} before {done} was written: see its messages above")


def train_teacher(options: argparse.Namespace, minutes: float) -> None:
    """Writes OUT/teacher in at most so many minutes; where they end before the schedule, with the weights so far."""
    out = options.out / "teacher"
    given = ["--vae", options.vae, "--out", out, "--device", options.device, "--save-dtype", "fp16"]
    given += sets(options.packed)
    given += [*GPU_OPTIONS] * (resolve_device(options.device).type == "cuda") + options.teacher
    code = run("train_teacher", "--max-minutes", f"{minutes - options.start_minutes:.3f}", *given, minutes=minutes)
    if not (out / "model_index.json").exists() and (out / CHECKPOINT).exists():
        print(f"the teacher is not finished (exit code {code}): its last checkpoint is used", flush=True)
        code = run("train_teacher", *given, "--export")
    check(code, out / "model_index.json", "train_teacher")


def train_student(options: argparse.Namespace, minutes: float) -> None:
    """Writes OUT/student/native likewise. Raises StateError if there is no time left."""
    if minutes <= 0:
        raise StateError("no time is left for the student: the same command goes on with it")
    out = options.out / "student"
    first, *more = [options.packed / name for name in ("photos", "emoji") if (options.packed / name).is_dir()]
    fields = {
        "data.path": first / "train/*.tar.gz",
        "data.more": f"[{','.join(str(place / 'train/*.tar.gz') for place in more)}]",
        "data.heldout": first / "heldout/*.tar.gz",
        "teacher_weights": options.out / "teacher",  # the folder: with the text encoder that was trained with it
        "output_dir": out,
        "device": options.device,
        "num_workers": min(8, os.cpu_count() or 1),
        "checkpoint_every": 50,
        "tensorboard": "false",
    }
    given = [RECIPE, *(f"{name}={value}" for name, value in fields.items()), *options.student]
    code = run("finetune", *given, minutes=minutes)
    if not (out / "native").exists() and (steps := Checkpoints(out / "checkpoints").steps()):
        print(f"the student is not finished (exit code {code}): its last checkpoint is used", flush=True)
        code = run("finetune", *given, f"max_steps={steps[0]}")
    check(code, out / "native", "finetune")


def convert(source: Path, to: Path, *more: str) -> None:
    if not to.exists():
        check(run("convert", source, "--out", to, "--cut", *more), to, "convert")


def collect(out: Path, folder: Path, most: float) -> str:
    """Writes what there is of RESULTS as one tar file in parts of at most `most` bytes; returns a sentence."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in RESULTS:
            if (out / name).exists():
                tar.add(out / name, name)
    data, size = file.getbuffer(), int(most)
    with replacing(folder, written=lambda name: re.fullmatch(PARTS, name) is not None) as aside:
        aside.mkdir()
        for number, start in enumerate(range(0, len(data), size)):
            (aside / f"results.tar.{number:03}").write_bytes(data[start : start + size])
    return f"{folder}: {readable_size(len(data))} in {counted(-(-len(data) // size), 'file')}"


@guard("finished parts and checkpoints are kept; the same command goes on")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sets(options.packed)
    with hold(options.out), file_errors(options.out):
        return train(options, time.monotonic() + 60 * options.minutes)


def train(options: argparse.Namespace, end: float) -> int:
    def left() -> float:
        return (end - time.monotonic()) / 60

    try:
        if not (options.out / "teacher/model_index.json").exists():
            train_teacher(options, left() - options.student_minutes - CONVERT_MINUTES)
            print(collect(options.out, options.results, options.file_mb * 1e6), flush=True)
        convert(options.out / "teacher", options.out / "dift_tiny.safetensors", "--model", "dift_tiny")
        if not (options.out / "student/native").exists():
            train_student(options, left() - CONVERT_MINUTES / 2)
        convert(options.out / "student/native", options.out / "cleandift_tiny.safetensors")
    finally:
        print(collect(options.out, options.results, options.file_mb * 1e6), flush=True)
    print(f"done with {left():.1f} of {options.minutes:g} minutes left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
