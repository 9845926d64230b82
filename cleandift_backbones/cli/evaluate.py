"""`cleandift evaluate TASK --model NAME ... --data PATH`: the paper's tasks."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from ..data.images import check_folder
from ..data.listing import left_out_report
from ..evaluation import tasks
from ..evaluation.cache import DTYPES, FeatureCache
from ..evaluation.items import DataError, image_items
from ..evaluation.plans import TIMESTEPS, Run, make_plan
from ..evaluation.plots import write_report
from ..evaluation.probes import Recipe
from ..evaluation.report import Report, Row, check_report
from ..evaluation.tasks import depth, knn, pairs, segmentation
from ..evaluation.tasks.matching import ALPHAS
from ..evaluation.tasks.noise import noise_shares
from ..evaluation.tasks.noise_report import shares_table, write_shares
from ..features.extractor import Extractor, ModelError, resolve_device
from ..features.options import check_ranges, load_model
from ..optimization.cpu_malloc import keep_freed_memory
from ..utils.errors import needs, resource_errors
from ..utils.guard import command_line, guard, program
from ..utils.locks import hold
from ..utils.progress import tqdm
from .arguments import MODELS_HELP, Formatter, also, command_parser, option

TASKS = {
    "correspondence": "keypoints of SPair-71k, PF-PASCAL or a JSON file of pairs: PCK",
    "knn": "classes by the nearest training images: train/CLASS/*, val/CLASS/*, or ImageNet; leave-one-out of CLASS/*; "
    "shards with labels in place of CLASS folders",
    "retrieval": "images of the same class: CLASS/*, or the val of train/CLASS/*, val/CLASS/*, or of ImageNet; shards "
    "with labels in place of CLASS folders",
    "segmentation": "a linear probe on VOC's or ADE20K's layout, with classes of your own too: mIoU",
    "depth": "a linear probe on NYUv2's layout: RMSE, AbsRel, delta",
    "noise": "how much of a noisy feature's variance is the noise: any folder of images, or shards",
}
ABOUT = {
    "correspondence": """PCK: the share of keypoints found near the true point; bbox@0.1: within 0.1 of the longer side
of the target's box, img@0.1: of the target image. Per point pools all points, per image is the mean over pairs.
Features upsampled bilinearly to the images' size, cosine similarity.""",
    "knn": """Spatial mean of a map, cosine similarity, a vote of the k nearest training images. Leave-one-out: of the k
nearest other images of the same set; images without another of their class are left out.""",
    "retrieval": """Spatial mean of a map, cosine similarity. recall@k: the share of pictures that find one of their
class among their k nearest; each asks all others, pictures without another of their class are left out.""",
    "segmentation": """A 1x1 convolution on the map, trained on cached features; predictions upsampled by nearest
neighbour. mIoU over the classes that occur.""",
    "depth": """A 1x1 convolution on the map to 256 bins over 0.1..10 m, trained by the scale-invariant log loss on
cached features; predictions upsampled bilinearly. Measures are means over pictures.""",
}


EXAMPLES = [
    ("correspondence --model cleandift_sd21 dift_sd21 --data SPair-71k", "keypoints: clean against noisy features"),
    ("knn --model cleandift_sd21 --map mid us3 us6 us9 --data imagenet --k 10", "classes, by several maps"),
    ("knn --help", "the options of a task"),
    ("--suite emoji --data data/emoji --out results", "the emoji benchmark"),
    ("--suite photos --data eval --out results/photos", "keypoints of photographs, settings chosen on other data sets"),
]
ABOUT_SUITES = """
A suite in place of a TASK compares many settings: --suite emoji (images of tools/tiny/make_pictures.py) or
--suite photos; --suite NAME --help lists the options.
"""


class Flat(argparse.Action):
    """Takes "1,50,100", "1 50 100" and mixtures: for `nargs="+"` and a `type` from `numbers`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [value for part in values for value in part])


def numbers(kind: type):
    """A parser of "1,50,100"."""

    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _suite(given: Sequence[str]) -> str | None:
    """The suite that is asked for; each has a file with a parser of its own."""
    if given and given[0] in TASKS:
        return None
    found = argparse.ArgumentParser(prog=program(), add_help=False, allow_abbrev=False)
    found.add_argument("--suite", choices=("emoji", "photos"), help="emoji: held-out emoji; photos: keypoints")
    return found.parse_known_args(given)[0].suite


class _TaskParser(argparse.ArgumentParser):
    """Asks for the TASK where options come first: argparse would take the value of one for it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        given = sys.argv[1:] if args is None else args
        if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
            self.error(
                f"no TASK was given: the first argument must be one of {', '.join(TASKS)}; the emoji benchmark is "
                "--suite emoji, the photograph benchmark --suite photos"
            )
        return super().parse_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """All tasks as sub-commands."""
    result = command_parser("evaluate", EXAMPLES, ABOUT_SUITES, kind=_TaskParser)
    kind = argparse.ArgumentParser
    commands = result.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=kind)
    for task, about in TASKS.items():
        one = commands.add_parser(task, help=about, description=f"{task}: {about}", formatter_class=Formatter)
        _common(one, task)
        _special(one, task)
    return result


def _common(one: argparse.ArgumentParser, task: str) -> None:
    option(one, "--model", MODELS_HELP, nargs="+", required=True)
    option(one, "--data", "a data set", required=True)
    option(
        one, "--map", default=[],
        about="for all models; MODEL=MAP for one of them. Default: "
        + ("the last" if task in ("knn", "retrieval") else "us6, or else the map of the stride nearest to 16"),
    )  # fmt: skip
    option(one, "--out", default="results", about=f"a folder for {task}.json, {task}.md and {task}.png")
    if task != "noise":
        one.add_argument("--cache", metavar="DIR", help="folder of cached features; default OUT/features")
        also(one, one.add_argument(
            "--store-dtype", dest="dtype", choices=list(DTYPES), default="float16", help="of cached features",
        ), "--dtype")  # fmt: skip
        one.add_argument(
            "--ensemble", **_list(int), metavar="N", help="noises averaged by dift_* models; default "
            + ("8" if task == "correspondence" else "1"),
        )  # fmt: skip
    one.add_argument("--size", type=int, help="side of the model's input; default the model's own")
    one.add_argument("--batch-size", type=int, default=8, help="pictures per pass; lower it if memory runs out")
    one.add_argument(
        "--prompt", default="auto",
        help="text for the models that have a text encoder; auto: the task's own; none: the model's own, mostly empty",
    )  # fmt: skip
    default = "the model's (261 for Stable Diffusion)"
    option(
        one, "--timesteps", **_list(int),
        about=f"for dift_* models, default {TIMESTEPS.get(task, default)}; several are drawn as a curve",
    )  # fmt: skip
    option(one, "--weights", nargs="+", default=[], metavar="MODEL=FILE")
    one.add_argument(
        "--limit", type=int, metavar="N", default=32 if task == "noise" else None,
        help="only N " + dict(correspondence="pairs", noise="pictures").get(task, "pictures of each split"),
    )  # fmt: skip
    one.add_argument(
        "--no-optimize", dest="optimize", action="store_false",
        help="leave out what makes this package's models faster with the same maps to rounding; docs/performance.md",
    )  # fmt: skip
    option(one, "--device")
    one.add_argument("--threads", type=int, help="CPU threads")
    one.add_argument("--seed", type=int, default=0, help="of noises, random weights, probes and the bootstrap")


def _list(kind: type) -> dict:
    return dict(nargs="+", type=numbers(kind), action=Flat)


def _special(one: argparse.ArgumentParser, task: str) -> None:
    if task == "correspondence":
        one.add_argument("--split", default="test", help="of SPair-71k and PF-PASCAL")
        one.add_argument("--alpha", **_list(float), default=list(ALPHAS), metavar="A", help="thresholds of PCK")
        one.add_argument("--resize", choices=["squash", "pad"], default="squash", help="pictures to the model's input")
        one.add_argument(
            "--soft-argmax", type=int, default=0, metavar="PIXELS", help="its window's side, odd; 0: argmax"
        )
        one.add_argument("--temperature", type=float, default=0.04, help="of the soft-argmax")
        one.add_argument("--skip-outside", action="store_true", help="leave out keypoints outside their pictures")
    elif task in ("knn", "retrieval"):
        default, about = ([10, 1, 5, 20], "that vote") if task == "knn" else ([1, 5, 10], "that count as found")
        one.add_argument("--k", **_list(int), default=default, metavar="K", help=f"nearest pictures {about}")
        if task == "knn":
            one.add_argument("--weighted", action="store_true", help="votes count exp(similarity / 0.07)")
            one.add_argument("--per-class", type=int, metavar="N", help="training images of each class")
            one.add_argument(
                "--train", metavar="PATH", help="training images, CLASS folders or shards; default: the train of the "
                "data, or else leave-one-out",
            )  # fmt: skip
    elif task in ("segmentation", "depth"):
        one.add_argument("--epochs", type=int, default=10, help="of the probe")
        one.add_argument("--learning-rate", type=float, default=1e-3, help="of the probe")
        one.add_argument("--probe-batch", type=int, default=16, help="pictures per step of the probe")
        if task == "segmentation":
            one.add_argument(
                "--classes", type=int, metavar="N", help="number of classes, background included; default: as many as "
                "classes.txt in the data's folder has lines, or 21 of VOC, 150 of ADE20K",
            )  # fmt: skip
        else:
            one.add_argument("--probe", metavar="FILE", help="a probe's safetensors, used as it is: nothing is trained")
            one.add_argument("--no-eigen-crop", action="store_true", help="count the borders of 480x640 depths too")
    else:
        one.add_argument("--noises", type=int, default=8, help="noises per picture, at least 2")


@guard("cached features and finished rows are kept, the same command continues")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a task or a suite. See `utils.guard.guard` for exit codes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if suite := _suite(given):
        return import_module(f".evaluate_{suite}", __package__).main(given)
    commands = parser()
    args = commands.parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    if args.optimize:
        keep_freed_memory()  # of the whole process, which is this command's
    _check(args)
    lower = "--probe-batch" if args.task in ("segmentation", "depth") else "--size or --limit"
    with resource_errors(f"lower {lower}"):
        device = resolve_device(args.device)
        plan = make_plan(args)
        with hold(args.out, args.task):
            if args.task == "noise":
                check_models(args, plan)
                paths = _noise(args, plan, device)
            else:
                task = make_task(args)
                check_models(args, plan)
                result = run(args, plan, task, device)
                paths = write_report(result, args.out, f"# {args.task.capitalize()}\n\n{ABOUT[args.task]}", args.task)
                print(ABOUT[args.task], result.legend(), "", result.table(), *result.verdicts(), sep="\n")
    print("wrote", *paths)


def _check(args: argparse.Namespace) -> None:
    """Finds what is wrong with the numbers before any long work."""
    check_ranges(args, (
        ("timesteps", 0, 999), ("ensemble", 1, 1024), ("size", 16, 4096), ("batch_size", 1, None), ("limit", 2, None),
        ("threads", 1, None), ("seed", 0, None), ("alpha", 1e-6, 10), ("k", 1, None), ("epochs", 1, None),
        ("classes", 2, segmentation.MOST_CLASSES),
        ("probe_batch", 1, None), ("noises", 2, None), ("per_class", 1, None), ("soft_argmax", 0, None),
        ("temperature", 1e-9, None), ("learning_rate", 1e-9, None),
    ))  # fmt: skip
    check_folder(args.out)
    check_folder(getattr(args, "cache", None) or args.out)
    check_report(args.out, args.task)
    if (window := getattr(args, "soft_argmax", 0)) and (window < 3 or window % 2 == 0):
        raise ModelError(f"--soft-argmax {window} has no middle pixel with others around; give 3, 5, 7, ..., or 0")
    with needs("eval"):
        import matplotlib  # noqa: F401
    if args.threads:
        torch.set_num_threads(args.threads)


def make_task(args: argparse.Namespace) -> tasks.Task:
    """Reads the data set's lists, and finds what is missing."""
    limit = dict(limit=args.limit, seed=args.seed)
    if args.task == "correspondence":
        data = tasks.limit_pairs(pairs.read_pairs(args.data, args.split, args.skip_outside), **limit)
        alphas = sorted(args.alpha, key=lambda alpha: alpha != 0.1)  # 0.1, where it is asked for, leads
        return tasks.Correspondence(data, alphas, args.resize, args.soft_argmax, args.temperature)
    if args.task == "knn":
        sets = knn.read_queries(args.data, args.train, args.per_class)
        train, val = (found and tasks.limit_labelled(found, **limit) for found in sets)
        return tasks.Knn(train, val, args.k, args.weighted)
    if args.task == "retrieval":
        return tasks.Retrieval(tasks.limit_labelled(knn.read_gallery(args.data), **limit), args.k)
    recipe = Recipe(args.epochs, args.probe_batch, args.learning_rate, seed=args.seed)
    if args.task == "segmentation":
        train, val = (
            tasks.limit_scenes(segmentation.read_scenes(args.data, split, args.classes), **limit)
            for split in ("train", "val")
        )
        return tasks.Segmentation(train, val, recipe)
    train = None if args.probe else tasks.limit_scenes(depth.read_nyu(args.data, "train"), **limit)
    test = tasks.limit_scenes(depth.read_nyu(args.data, "test"), **limit)
    return tasks.Depth(train, test, recipe, args.probe, not args.no_eigen_crop)


def check_models(args: argparse.Namespace, plan: list[Run], always: bool = False) -> dict[str, str]:
    """Loads every model once, where one that cannot be had would be found after the work on another.

    Args:
        always: also where there is but one.

    Returns:
        Hashes of the models' weights by the runs' names; empty where none was loaded.

    Raises:
        ModelError: a model or its weights cannot be had; a prompt is given, but none of the models takes one.
    """
    different = {planned.name: planned for planned in plan}
    told = args.prompt not in ("auto", "none")
    if len(different) == 1 and not told and not always:
        return {}
    takes, weights = [], {}
    for name, planned in different.items():
        extractor = load(args, planned, torch.device("cpu"))
        weights[name] = extractor.weights_digest()
        if extractor.takes_prompts and told:
            extractor.set_prompts([args.prompt])
        takes.append(extractor.takes_prompts)
        del extractor  # two big models need not lie in memory at once
    if told and not any(takes):
        raise ModelError(f"{', '.join(different)}: none takes prompts, or knows a text encoder; give --prompt none")
    return weights


def load(args: argparse.Namespace, planned: Run, device: torch.device) -> Extractor:
    """The run's model, with the size of the model's own input unless another is asked for."""
    return load_model(planned.model, planned.maps, planned.pretrained, device, args.size, args.seed, **planned.kwargs)


def run(args: argparse.Namespace, plan: list[Run], task: tasks.Task, device: torch.device) -> Report:
    """All runs measured, as a report."""
    cache = FeatureCache(
        args.cache or Path(args.out, "features"), args.batch_size, getattr(task, "mode", "squash"), task.pool,
        args.dtype, args.seed,
    )  # fmt: skip
    rows, told = [], {}
    for planned in tqdm(plan, desc="runs", unit="run", disable=len(plan) == 1):
        row, told[planned.label] = measure(args, planned, task, cache, device)
        rows.append(row)
    metrics = list(dict.fromkeys(key for row in rows for tallies in row.results.values() for key in tallies))
    info = dict(task=args.task, command=command_line(), pictures=len(task.items), **task.facts)
    info |= dict(features=args.dtype, device=str(device), threads=torch.get_num_threads(), details=told)
    names, lower = {key: task.heading(key) for key in metrics}, task.lower & set(metrics)
    return Report(rows, names, info, args.seed, task.main(metrics), lower, task.unit)


def measure(
    args: argparse.Namespace,
    planned: Run,
    task: tasks.Task,
    cache: FeatureCache,
    device: torch.device,
    latents: dict[bytes, torch.Tensor] | None = None,
    keep: bool = True,
) -> tuple[Row, str]:
    """One run measured on one task.

    Args:
        args: with `size`, `prompt`, `optimize` and `seed`.
        latents: encoded images that runs share, see `Extractor.remember_latents`.
        keep: False removes the features from the cache after they were measured.

    Returns:
        The row; and its prompt, size and seconds in words.
    """
    clock = time.perf_counter()
    extractor = load(args, planned, device)
    items, told = _prompted(args, task, extractor)
    if args.optimize:
        extractor.optimize(fixed_prompt=not extractor.takes_prompts)  # the cache sets that of each picture
    if latents is not None:
        extractor.remember_latents(latents)
    drawn = {} if planned.pretrained else dict(random_weights=True)  # no "other weights" of the trained model's
    found = cache.features(extractor, items, planned.settings | drawn)
    seconds, size = time.perf_counter() - clock, extractor.size
    del extractor  # a big model need not lie in memory while its features are measured
    results = {name: task.measure(features, size) for name, features in found.items()}
    if not keep:
        cache.remove(found)
    total = time.perf_counter() - clock
    told += f", {size[1]}x{size[0]}, {total - seconds:.1f} s after {seconds:.1f} s for the features"
    return Row(planned.label, planned.kind, results, planned.settings, total), told


def _prompted(args: argparse.Namespace, task: tasks.Task, extractor: Extractor) -> tuple[list, str]:
    """The items with the prompts that this model gets, and words about them."""
    texts = [item.prompt for item in task.items]
    if args.prompt == "none" or (args.prompt == "auto" and not (extractor.takes_prompts and any(texts))):
        return [replace(item, prompt="") for item in task.items], "no prompt"
    if not extractor.takes_prompts:
        return [replace(item, prompt="") for item in task.items], "no prompt (it takes none)"
    if args.prompt != "auto":
        return [replace(item, prompt=args.prompt) for item in task.items], f"prompt {args.prompt!r}"
    return task.items, f"prompt {next(filter(None, texts))!r}{' and alike' if len(set(texts)) > 1 else ''}"


def _noise(args: argparse.Namespace, plan: list[Run], device: torch.device) -> list[Path]:
    items, left_out = image_items(args.data)
    if len(items) < 2:
        told = left_out_report(left_out)
        raise DataError(f"{args.data}: {len(items)} pictures; a share of variance needs at least two {told}".strip())
    if left_out:
        tqdm.write(f"{args.data}: {left_out_report(left_out)}", file=sys.stderr)
    pictures = [items[i].read() for i in tasks.limited(items, args.limit, args.seed)]
    shares = []
    for planned in tqdm(plan, desc="runs", unit="run"):
        extractor = load(args, planned, device)
        if args.prompt not in ("auto", "none"):
            extractor.set_prompts([args.prompt])
        if args.optimize:
            extractor.optimize()
        found = noise_shares(extractor, pictures, args.noises, args.batch_size, progress=True)
        shares += [(planned.name, name, planned.settings["timestep"], share) for name, share in found.items()]
    print(shares_table(shares))
    info = dict(task="noise", command=command_line(), pictures=len(pictures), noises=args.noises)
    return write_shares(args.out, shares, info | dict(seed=args.seed, device=str(device)))


if __name__ == "__main__":
    main()
