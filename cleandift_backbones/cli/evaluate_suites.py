"""What the suites of `cleandift evaluate` have in common: options, checks before any work, finished rows on disk."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..data.images import check_folder
from ..evaluation.plans import Run, digests
from ..evaluation.report import Row, check_report
from ..features.options import check_noise, check_ranges
from ..utils.atomic import DamagedFileError, is_file, set_aside
from ..utils.errors import FileError, needs
from ..utils.guard import command_line
from ..utils.progress import tqdm
from .arguments import MODELS_HELP, option
from .evaluate import Flat, numbers

RANGES = (
    ("timesteps", 0, 999),
    ("ensemble", 1, 1024),
    ("batch_size", 1, None),
    ("threads", 1, None),
    ("seed", 0, None),
)


def add_options(
    parser: argparse.ArgumentParser, models: Sequence[str], models_help: str, timesteps: str, maps: Sequence[str]
) -> None:
    """The options of every suite but its data set, `--out` and sizes.

    Args:
        models, maps: defaults. models_help: what follows the explanation of names.
        timesteps: the defaults of --timesteps in words.
    """
    several = dict(nargs="+", type=numbers(int), action=Flat)
    option(
        parser, "--model", f"{MODELS_HELP}; a dift_* model is swept{models_help}", nargs="+", dest="models",
        default=list(models),
    )  # fmt: skip
    option(
        parser, "--timesteps", "of the dift_* models (noise added), and of their UNets on clean pictures; " + timesteps,
        **several,
    )  # fmt: skip
    parser.add_argument("--ensemble", **several, metavar="N", help="noises averaged by dift_* models; 1 8 unless given")
    option(parser, "--map", "or all" if maps else "or all (default: some of each stride)", dest="maps", default=maps)
    parser.add_argument(
        "--student-weights", metavar="FILE", help="safetensors for the cleandift_* models, instead of the shipped"
    )
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="safetensors for the dift_* models, instead of the shipped"
    )
    option(parser, "--device")
    parser.add_argument("--threads", type=int, help="CPU threads")


def check_options(args: argparse.Namespace, ranges: Iterable[tuple[str, float, float | None]]) -> None:
    """Finds what is wrong with the options before any long work; sets the number of threads.

    Raises:
        ModelError: a number out of range; a timestep or number of noises without a model that adds noise.
        FileError: a weight file that does not exist; an output folder that cannot be used, or with files of others.
    """
    check_ranges(args, (*RANGES, *ranges))
    check_noise(args.models, timesteps=args.timesteps, ensemble=args.ensemble)
    check_folder(args.out)
    check_report(args.out, "results")
    for name in ("student_weights", "teacher_weights"):
        if (path := getattr(args, name)) and not is_file(path):
            raise FileError(f"--{name.replace('_', '-')} {path}: no such file")
    with needs("eval"):
        import matplotlib  # noqa: F401
    args.ensemble = args.ensemble or [1, 8]
    if args.threads:
        torch.set_num_threads(args.threads)


def row_path(out: str, run: Run, *facts: object) -> Path:
    """Where the row of a run is kept: named by the run and `facts`, which must be all that its numbers depend on."""
    told = json.dumps([*facts, asdict(run)], sort_keys=True, default=str)
    return Path(out, "runs", f"{hashlib.sha256(told.encode()).hexdigest()[:20]}.safetensors")


def kept_row(path: Path, measure: Callable[[], Row]) -> tuple[Row, bool]:
    """The row at `path`, or else measured and written there.

    Returns:
        The row, and whether it was on disk. A damaged file is renamed, and the row is measured again.
    """
    if path.is_file():
        try:
            return Row.load(path), True
        except DamagedFileError as error:
            tqdm.write(f"{error}; kept as {set_aside(path).name}, measured again")
    row = measure()
    row.save(path)
    return row, False


def facts_of(plan: Sequence[Run], rows: Sequence[Row], device: torch.device) -> dict:
    """What every suite reports of itself beside its results."""
    cuda = device.type == "cuda"
    return dict(
        command=command_line(),
        weights=digests(plan),
        device=torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        seconds=round(sum(row.seconds for row in rows), 1),  # also of rows that were measured earlier
    )
