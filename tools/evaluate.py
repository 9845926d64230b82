#!/usr/bin/env python3
"""Measure what feature maps are worth: the paper's tasks on data sets, or the emoji benchmark.

    python tools/evaluate.py correspondence --model cleandift_sd21 dift_sd21 --data SPair-71k

and the other tasks of the paper (knn, retrieval, segmentation, depth, noise) are described in docs/evaluation.md.

    python tools/evaluate.py --suite photos --data eval --out results/photos

matches keypoints of photographs, see `cleandift_backbones.cli.evaluate_photos`.

    python tools/evaluate.py --suite emoji --data data/emoji --out results

takes the pictures made by tools/tiny/make_pictures.py and compares raw pixels, the noisy features of dift_tiny over
timesteps and ensembles, its untouched UNet on clean pictures, cleandift_tiny, and a random network; any other timm
model name can join. It writes results.json, results.md and results.png, and says whether clean features win, and by how
much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
import time
from dataclasses import replace
from functools import partial

from cleandift_command import guard, importing

with importing(__name__):
    import torch

    from cleandift_backbones.cli import evaluate, evaluate_photos, evaluate_suites
    from cleandift_backbones.evaluation import emoji, emoji_probes, report, runs
    from cleandift_backbones.evaluation.plans import Run, make_suite_plan
    from cleandift_backbones.evaluation.plots import write_report
    from cleandift_backbones.features.extractor import PIXELS, load_extractor, resolve_device
    from cleandift_backbones.features.options import map_items
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.progress import tqdm

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
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(re.fullmatch(r"--suite(=.*)?|-h|--help", word) for word in arguments) or arguments[0] in evaluate.TASKS:
        return evaluate.main(arguments)
    if _suite(arguments) == "photos":
        return evaluate_photos.main(arguments)
    args = _parser().parse_args(arguments)
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


def _suite(arguments: list[str]) -> str | None:
    """The suite that is asked for; each has a parser of its own."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--suite", nargs="?")
    return parser.parse_known_args(arguments)[0].suite


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s TASK --model NAME ... --data PATH [...]\n       %(prog)s --suite emoji --data PATH [...]\n"
        "       %(prog)s --suite photos --data PATH [...]",
        description=f"{__doc__.splitlines()[0]} TASK is one of {', '.join(evaluate.TASKS)}: TASK --help tells more. "
        "With --suite emoji: cross-style retrieval, eye correspondence, subgroups and figures of held-out emoji. "
        "--suite photos --help tells of the keypoints of photographs.",
        formatter_class=evaluate.Formatter,
    )
    parser.add_argument(
        "--suite", choices=["emoji", "photos"], required=True, help="what to measure in place of a TASK"
    )
    parser.add_argument("--data", required=True, help="picture folder made by tools/tiny/make_pictures.py")
    parser.add_argument("--out", default="results", help="folder for results.json, results.md and results.png")
    evaluate_suites.add_options(
        parser, [PIXELS, "dift_tiny", "cleandift_tiny"], "; a cleandift_* model brings its random twin",
        "100 400 unless given, 1 50 100 200 300 400 with --full", ["all"],
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels, at least 64")
    parser.add_argument("--placements", type=int, default=1, help="random placements of each picture with eyes")
    parser.add_argument(
        "--full",
        action="store_true",
        help="all concepts and six timesteps: more than an hour on two cores, not minutes",
    )
    parser.add_argument(
        "--limit-concepts", type=int, metavar="N", help="use only N concepts; 120 unless given, all with --full"
    )
    parser.add_argument(
        "--shared-noise", action="store_true", help="one noise for all pictures instead of one per style"
    )
    parser.add_argument("--eyes", metavar="FILE", help="JSON of eye centres, instead of the package's own")
    parser.add_argument("--batch-size", type=int, help="pictures per pass; default 32, and 256 on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of placements, noises, random weights and the bootstrap")
    return parser


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
    benchmark = emoji.Benchmark(suite, args.placements, args.seed, not args.shared_noise)
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


if __name__ == "__main__":
    main()
