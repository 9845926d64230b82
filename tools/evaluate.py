#!/usr/bin/env python3
"""Measure what feature maps are worth: the paper's tasks on data sets, or the emoji benchmark.

    python tools/evaluate.py correspondence --model cleandift_sd21 dift_sd21 --data SPair-71k

and the other tasks of the paper (knn, retrieval, segmentation, depth, noise) are described in docs/evaluation.md.

    python tools/evaluate.py --suite emoji --data data/emoji --out results

takes the pictures made by tools/make_pictures.py and compares raw pixels, the noisy features of dift_tiny over
timesteps and ensembles, its untouched UNet on clean pictures, cleandift_tiny, and a random network; any other timm
model name can join. It writes results.json, results.md and results.png, and says whether clean features win, and by how
much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path

from cleandift_command import guard, importing

with importing(__name__):
    import timm
    import torch

    from cleandift_backbones.arguments import check_noise, check_ranges, map_items, model_arguments
    from cleandift_backbones.errors import FileError, needs
    from cleandift_backbones.evaluation import command, emoji, emoji_probes, report
    from cleandift_backbones.extractor import (
        PIXELS,
        Extractor,
        load_extractor,
        resolve_device,
    )
    from cleandift_backbones.files import DamagedFileError, is_file, set_aside
    from cleandift_backbones.images import check_folder
    from cleandift_backbones.locks import hold
    from cleandift_backbones.progress import tqdm

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
    if not any(re.fullmatch(r"--suite(=.*)?|-h|--help", word) for word in arguments) or arguments[0] in command.TASKS:
        return command.main(arguments)
    args = _parser().parse_args(arguments)
    if args.limit_concepts is None and not args.full:
        args.limit_concepts = 120
    logging.getLogger("timm").setLevel(logging.ERROR)
    plan, device = _check(args)
    with hold(args.out, "emoji"):
        suite = emoji.load_suite(
            args.data, args.size, args.eyes or emoji.EYES_FILE, args.limit_concepts, args.seed, progress=True
        )
        result = _run(args, plan, suite, device)
        low, high = emoji.SCALES
        about = ABOUT.format(k=emoji_probes.K, alpha=emoji.ALPHA, low=low, high=high, grey=emoji.BACKGROUND)
        paths = result.write(args.out, about)
    print(result.legend(), "", result.table(), *result.verdicts(), sep="\n")
    print("wrote", *paths)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s TASK --model NAME ... --data PATH [...]\n       %(prog)s --suite emoji --data PATH [...]",
        description=f"{__doc__.splitlines()[0]} TASK is one of {', '.join(command.TASKS)}: TASK --help tells more. "
        "With --suite emoji: cross-style retrieval, eye correspondence, subgroups and figures of held-out emoji.",
        formatter_class=command.Formatter,
    )
    parser.add_argument("--suite", choices=["emoji"], required=True, help="what to measure in place of a TASK")
    parser.add_argument("--data", required=True, help="picture folder made by tools/make_pictures.py")
    parser.add_argument("--out", default="results", help="folder for results.json, results.md and results.png")
    parser.add_argument(
        "--models", "--model", nargs="+", metavar="NAME", default=[PIXELS, "dift_tiny", "cleandift_tiny"],
        help="timm model names; 'pixels' is the picture itself, 'random:NAME' has random weights; a dift_* model is "
        "swept; a cleandift_* model brings its random twin",
    )  # fmt: skip
    parser.add_argument(
        "--timesteps", nargs="+", type=command.numbers(int), action=command.Flat, metavar="T",
        help="of the dift_* models (noise added), and of their UNets on clean pictures, 0..999; "
        "100 400 unless given, 1 50 100 200 300 400 with --full",
    )  # fmt: skip
    parser.add_argument(
        "--ensemble",
        nargs="+",
        type=command.numbers(int),
        action=command.Flat,
        metavar="N",
        help="noises averaged by dift_* models; 1 8 unless given",
    )
    parser.add_argument("--maps", "--map", nargs="+", metavar="MAP", default=["all"], help="maps by name, or all")
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
    parser.add_argument(
        "--student-weights", metavar="FILE", help="safetensors for the cleandift_* models, instead of the shipped"
    )
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="safetensors for the dift_* models, instead of the shipped"
    )
    parser.add_argument("--eyes", metavar="FILE", help="JSON of eye centres, instead of the package's own")
    parser.add_argument("--batch-size", type=int, help="pictures per pass; default 32, and 256 on a GPU")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... or auto")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of placements, noises, random weights and the bootstrap")
    return parser


def _check(args: argparse.Namespace) -> tuple[list[dict], torch.device]:
    """Finds what is wrong before any long work; returns the runs to make."""
    check_ranges(args, (
        ("timesteps", 0, 999), ("ensemble", 1, 1024), ("size", 64, 4096), ("placements", 1, 1000),
        ("limit_concepts", 2, None), ("batch_size", 1, None), ("threads", 1, None), ("seed", 0, None),
    ))  # fmt: skip
    check_noise(args.models, timesteps=args.timesteps, ensemble=args.ensemble)
    check_folder(args.out)
    report.check_report(args.out, "results")
    for name in ("student_weights", "teacher_weights"):
        if (path := getattr(args, name)) and not is_file(path):
            raise FileError(f"--{name.replace('_', '-')} {path}: no such file")
    with needs("eval"):
        import matplotlib  # noqa: F401
    if args.timesteps is None:
        args.timesteps = [1, 50, 100, 200, 300, 400] if args.full else [100, 400]
    args.ensemble = args.ensemble or [1, 8]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    plan = _plan(args)
    for run in {(run["model"], str(run["kwargs"].get("pretrained_cfg_overlay"))): run for run in plan}.values():
        load_extractor(run["model"], _chosen(args, run["model"]), run["pretrained"], size=args.size, **run["kwargs"])
    return plan, device


def _plan(args: argparse.Namespace) -> list[dict]:
    """Every run: label, kind, model, pretrained, kwargs of create_model, settings to show."""
    plan = []

    def add(label, kind, model, pretrained=True, settings=None, **kwargs):
        plan.append(
            dict(label=label, kind=kind, model=model, pretrained=pretrained, settings=settings or {}, kwargs=kwargs)
        )

    for name in dict.fromkeys(args.models):
        if name.startswith("random:"):
            add(f"{name.removeprefix('random:')}, random weights", "control", name.removeprefix("random:"), False)
        elif name.startswith("dift_"):
            weights = model_arguments(weights=args.teacher_weights)
            for count in args.ensemble:
                for step in args.timesteps:
                    settings = dict(timestep=step, ensemble=count)
                    label = f"{name}, t={step}, {count} noise{'s' if count > 1 else ''}"
                    add(label, "noisy", name, settings=settings, timestep=step, ensemble_size=count, **weights)
            for step in args.timesteps:
                weights = model_arguments(weights=args.teacher_weights) or _twin_weights(name)
                label = f"{name}'s UNet on the clean picture, best t"
                add(label, "teacher", f"clean{name}", settings=dict(timestep=step), timestep=step, **weights)
        elif name.startswith("cleandift_"):
            add(name, "clean", name, **model_arguments(weights=args.student_weights))
            add(f"{name}, random weights", "control", name, False)
        else:
            add("pixels, 32 x 32" if name == PIXELS else name, "baseline", name)
    return plan


def _twin_weights(name: str) -> dict:
    """Where the weights of a dift_* model come from, for its clean twin to load."""
    config = timm.get_pretrained_cfg(name).to_dict()
    found = {key: config[key] for key in ("file", "hf_hub_id", "hf_hub_filename") if config.get(key)}
    return dict(pretrained_cfg_overlay=found) if found else {}


def _chosen(args: argparse.Namespace, model: str) -> list[str] | None:
    if args.maps == ["all"] or model == PIXELS:
        return None
    return map_items(args.maps)


def _run(args: argparse.Namespace, plan: list[dict], suite: emoji.Suite, device: torch.device) -> report.Report:
    benchmark = emoji.Benchmark(suite, args.placements, args.seed, not args.shared_noise)
    batch_size = args.batch_size or (32 if device.type == "cpu" else 256)
    latents: dict[bytes, torch.Tensor] = {}
    rows = [report.Row("same position", "baseline", {"": benchmark.same_position()})]
    data = hashlib.sha256(suite.pictures.numpy()).hexdigest() + json.dumps([suite.concepts, suite.styles])
    data += json.dumps([{i: marks.tolist() for i, marks in suite.eyes.items()}, suite.subgroups])
    if suite.alphas is not None:
        data += hashlib.sha256(suite.alphas.numpy()).hexdigest()
    for run in tqdm(plan, desc="runs", unit="run"):
        path = Path(args.out, "runs", f"{_key(args, run, data)}.safetensors")
        # The weights behind a name such as hf-hub:... are not known before they are loaded: never taken from disk.
        if path.is_file() and ":" not in run["model"]:
            try:
                rows.append(report.Row.load(path))
                tqdm.write(f"{run['label']}: taken from {path}; delete it to measure again")
                continue
            except DamagedFileError as error:
                tqdm.write(f"{error}; kept as {set_aside(path).name}, measured again")
        clock = time.perf_counter()
        torch.manual_seed(args.seed)
        extractor: Extractor = load_extractor(
            run["model"], _chosen(args, run["model"]), run["pretrained"], device, args.size, **run["kwargs"]
        )
        extractor.remember_latents(latents)
        count = run["kwargs"].get("ensemble_size", 1)
        results = benchmark.run(extractor, max(1, batch_size // count))
        rows.append(report.Row(run["label"], run["kind"], results, run["settings"], time.perf_counter() - clock))
        rows[-1].save(path)
    info = dict(
        suite="emoji",
        command=shlex.join(["python", *sys.argv]),
        concepts=len(suite.names),
        styles=", ".join(sorted(set(suite.styles))),
        pictures=len(suite.pictures),
        pictures_with_eyes=len(suite.eyes),
        concepts_with_eyes=len(set(benchmark.pair_concepts)),
        eye_pairs=len(benchmark.pairs),
        placements=args.placements,
        size=args.size,
        noise="one for all pictures" if args.shared_noise else "another for each style",
        weights=_digests(plan),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        seconds=round(sum(row.seconds for row in rows), 1),  # also of rows that were measured earlier
    )
    return report.Report(rows, emoji.METRICS, info, args.seed)


def _key(args: argparse.Namespace, run: dict, data: str) -> str:
    """Names a run by all that its numbers depend on, so that an interrupted command goes on where it stopped."""
    options = [args.size, args.seed, args.placements, args.shared_noise, args.maps, list(emoji.METRICS)]
    told = json.dumps([data, options, _digests([run]), run], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:20]


def _digests(plan: list[dict]) -> dict[str, str]:
    """First digits of the SHA-256 of local weight files, so that a table can be told to belong to them."""
    digests = {}
    for run in plan:
        if not run["pretrained"] or run["model"] == PIXELS or ":" in run["model"]:
            continue
        file = run["kwargs"].get("pretrained_cfg_overlay", {}).get("file") or timm.get_pretrained_cfg(run["model"]).file
        if file and os.path.isfile(path := Path(file)) and path.name not in digests:
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return digests


if __name__ == "__main__":
    main()
