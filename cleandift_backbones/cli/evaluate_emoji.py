"""The emoji benchmark, `cleandift evaluate --suite emoji`: cross-style retrieval, eyes, subgroups and figures.

It takes the images made by tools/tiny/make_pictures.py and compares raw pixels, the noisy features of dift_tiny over
timesteps and ensembles, its untouched UNet on clean images, cleandift_tiny, and a random network; any other timm
model name can join. It writes results.json, results.md and results.png, and says whether clean features win, and by how
much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from dataclasses import replace
from functools import partial

import torch

from ..evaluation import emoji, emoji_probes, report, runs
from ..evaluation.plans import Run, make_suite_plan
from ..evaluation.plots import write_report
from ..features.extractor import PIXELS, load_extractor, resolve_device
from ..features.options import map_items
from ..utils.guard import guard, program
from ..utils.locks import hold
from ..utils.progress import tqdm
from . import evaluate_suites
from .arguments import Formatter, option

ABOUT = """# Held-out emoji: what the features are worth

Retrieval: the share of pictures whose nearest picture (cosine) in another style shows the same concept, mean over
ordered pairs of styles, each counting the same. "Pooled map" compares spatial means, "whole map" flattened maps minus
their mean over all pictures.

Eyes: PCK@{alpha} per point, left and right eye, all ordered pairs of styles; the tolerance is {alpha} of the picture's
side. "Centred" takes the pictures as they are, where an eye is mostly near the place it has in the other style: compare
with "same position". "Placed" shrinks each picture to {low}..{high} of the canvas at a random place (and measures the
tolerance on the shrunk side) and mirrors half of the targets, so that position does not help.

Subgroup: the share of pictures whose Unicode subgroup wins the vote of their {k} nearest pictures of other concepts
(cosine, pooled map). Figure: mean IoU of figure and ground, as the drawing's opacity tells them, by a linear map fitted
by least squares on half of the concepts and judged on the other half; predictions upsampled by nearest neighbour.

Pictures lie on plain light grey {grey}. The best map, and for the noisy and teacher rows the best timestep, are chosen
on these same pictures, for every row alike."""


@guard("finished rows are kept in OUT/runs; the same command continues")
def main(arguments: list[str] | None = None) -> None:
    """Runs the suite. See `utils.guard.guard` for exit codes."""
    args = parser().parse_args(arguments)
    if args.limit_concepts is None and not args.full:
        args.limit_concepts = 120
    logging.getLogger("timm").setLevel(logging.ERROR)
    plan, weights, device = _check(args)
    with hold(args.out, "emoji"):
        suite = emoji.load_suite(
            args.data, args.size, args.eyes or emoji.EYES_FILE, args.limit_concepts, args.seed, progress=True
        )
        result = _run(args, plan, weights, suite, device)
        low, high = emoji.SCALES
        about = ABOUT.format(k=emoji_probes.K, alpha=emoji.ALPHA, low=low, high=high, grey=emoji.BACKGROUND)
        paths = write_report(result, args.out, about)
    print(result.legend(), "", result.table(), *result.verdicts(), sep="\n")
    print("wrote", *paths)


def parser() -> argparse.ArgumentParser:
    """The options of `--suite emoji`."""
    result = argparse.ArgumentParser(
        prog=program(),
        usage="%(prog)s --suite emoji --data PATH [...]",
        description="Held-out emoji: cross-style retrieval, eye correspondence, subgroups and figures.",
        formatter_class=Formatter,
    )
    result.add_argument("--suite", choices=["emoji"], required=True, help="this suite")
    option(result, "--data", "a folder made by tools/tiny/make_pictures.py", required=True)
    option(result, "--out", "a folder for results.json, results.md and results.png", default="results")
    evaluate_suites.add_options(
        result, [PIXELS, "dift_tiny", "cleandift_tiny"], "; a cleandift_* model brings its random twin",
        "100 400 unless given, 1 50 100 200 300 400 with --full", ["all"],
    )  # fmt: skip
    result.add_argument("--size", type=int, default=128, help="side of the pictures in pixels, at least 64")
    result.add_argument("--placements", type=int, default=1, help="random placements of each picture with eyes")
    result.add_argument(
        "--full",
        action="store_true",
        help="all concepts and six timesteps: more than an hour on two cores, not minutes",
    )
    result.add_argument(
        "--limit-concepts", type=int, metavar="N", help="use only N concepts; 120 unless given, all with --full"
    )
    result.add_argument(
        "--shared-noise", action="store_true", help="one noise for all pictures instead of one per style"
    )
    result.add_argument("--eyes", metavar="FILE", help="JSON of eye centres, instead of the package's own")
    result.add_argument("--batch-size", type=int, help="pictures per pass; default 32, and 256 on a GPU")
    result.add_argument("--seed", type=int, default=0, help="of placements, noises, random weights and the bootstrap")
    return result


def _check(args: argparse.Namespace) -> tuple[list[Run], dict[str, str], torch.device]:
    """Finds what is wrong before any long work; returns the runs to make, and hashes of their weights."""
    evaluate_suites.check_options(args, (("size", 64, 4096), ("placements", 1, 1000), ("limit_concepts", 2, None)))
    if args.timesteps is None:
        args.timesteps = [1, 50, 100, 200, 300, 400] if args.full else [100, 400]
    device = resolve_device(args.device)
    plan = [replace(run, maps=_chosen(args, run.model)) for run in make_suite_plan(args, twins=True)]
    weights = runs.check_models(argparse.Namespace(**vars(args), prompt="auto"), plan, always=True)
    return plan, weights, device


def _chosen(args: argparse.Namespace, model: str) -> list[str] | None:
    if args.maps == ["all"] or model == PIXELS:
        return None
    return map_items(args.maps)


def _run(
    args: argparse.Namespace, plan: list[Run], weights: dict[str, str], suite: emoji.Suite, device: torch.device
) -> report.Report:
    benchmark = emoji.EmojiBenchmark(suite, args.placements, args.seed, not args.shared_noise)
    batch_size = args.batch_size or (32 if device.type == "cpu" else 256)
    latents: dict[bytes, torch.Tensor] = {}
    rows = [report.Row("same position", "baseline", {"": benchmark.same_position()})]
    data = hashlib.sha256(suite.pictures.numpy()).hexdigest() + json.dumps([suite.concepts, suite.styles])
    data += json.dumps([{i: marks.tolist() for i, marks in suite.eyes.items()}, suite.subgroups])
    if suite.alphas is not None:
        data += hashlib.sha256(suite.alphas.numpy()).hexdigest()
    options = [args.size, args.seed, args.placements, args.shared_noise, args.maps, list(emoji.METRICS)]

    def measure(run: Run) -> report.Row:
        clock = time.perf_counter()
        torch.manual_seed(args.seed)
        extractor = load_extractor(run.model, run.maps, run.pretrained, device, args.size, **run.kwargs)
        extractor.remember_latents(latents)
        results = benchmark.run(extractor, max(1, batch_size // run.kwargs.get("ensemble_size", 1)))
        return report.Row(run.label, run.kind, results, run.settings, time.perf_counter() - clock)

    for run in tqdm(plan, desc="runs", unit="run"):
        path = evaluate_suites.row_path(args.out, run, data, options, weights[run.name])
        row, found = evaluate_suites.kept_row(path, partial(measure, run))
        rows.append(row)
        if found:
            tqdm.write(f"{run.label}: taken from {path}; delete it to measure again")
    info = dict(
        suite="emoji",
        concepts=len(suite.names),
        styles=", ".join(sorted(set(suite.styles))),
        pictures=len(suite.pictures),
        pictures_with_eyes=len(suite.eyes),
        concepts_with_eyes=len(set(benchmark.pair_concepts)),
        eye_pairs=len(benchmark.pairs),
        placements=args.placements,
        size=args.size,
        noise="one for all pictures" if args.shared_noise else "another for each style",
        **evaluate_suites.facts_of(plan, rows, device),
    )
    return report.Report(rows, emoji.METRICS, info, args.seed)
