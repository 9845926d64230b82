"""The photograph benchmark: keypoints of PF-WILLOW, Animal-Pose and CUB, `cleandift evaluate --suite photos`.

The task is `correspondence` (see `matching`), and its numbers are those of `cleandift evaluate correspondence` with the
same model, map and size. What this suite adds is the choice: the map and the input size of every row, and the timestep
of the swept models, are chosen by the mean PCK of the sets of `--choose-on`; the sets of `--measure` are measured with
that choice only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..evaluation import runs, tasks
from ..evaluation.features import STORED, FeatureStores
from ..evaluation.items import DataError
from ..evaluation.plans import Run, make_suite_plan
from ..evaluation.plots import write_report
from ..evaluation.report import Report, Row
from ..evaluation.tasks import pairs
from ..features.extractor import PIXELS, list_maps, resolve_device
from ..features.model_names import defaults_of
from ..features.options import pick_maps
from ..optimization.cpu_malloc import keep_freed_memory
from ..utils.errors import InputError, resource_errors
from ..utils.guard import guard, program
from ..utils.locks import hold
from ..utils.progress import tqdm
from . import evaluate, evaluate_suites
from .arguments import Formatter, also, option

ALPHA = 0.1
METRIC = f"bbox@{ALPHA:g} per point"
NAMES = {"animal_pose": "Animal-Pose", "cub": "CUB", "pf_willow": "PF-WILLOW"}
TIMESTEPS = [1, 50, 100, 200, 300, 400]
ABOUT = """Every row's map and input size ({sizes} px) are chosen by the mean PCK of {choice}; so are the timesteps of
rows that show one of several, and the timestep of the best noisy run with {most}. {measured} only measured with that
choice. {search}Differences are paired: both sides are resampled together. Each image has noises of its own."""
HEAD = f"""# Keypoints of photographs: what the features are worth

PCK {METRIC}: the share of all keypoints found within {ALPHA:g} of the longer side of the target's box. Features
upsampled bilinearly to the images' size, cosine similarity, the best pixel. "Same position" looks at no image: its
answer is the place that the point has in the source.

"""
SEARCH = """Noisy models choose map and size at each timestep with {first}; with {others} they are measured at that
map and size only. """


@dataclass
class Part:
    """What is measured at once and kept on disk: some maps of a run on one set with one input size."""

    run: Run
    name: str  # of the set
    size: int
    maps: list[str]


class PhotoBenchmark:
    """The sets of pairs, and all that is common to the rows of a table.

    Args:
        args: from `parser`, checked.
        plan: the runs, with the maps to choose from.
        device: where models run.

    Raises:
        DataError: a set that does not exist, or without boxes.
        ModelError: a model that cannot be loaded.
    """

    def __init__(self, args: argparse.Namespace, plan: list[Run], device: torch.device):
        self.args, self.plan, self.device = args, plan, device
        self.latents: dict[bytes, torch.Tensor] = {}
        self.tasks, self.digests = {}, {}
        for text in dict.fromkeys([*args.choose_on, *args.measure]):
            path = Path(args.data, text)
            if path.name in self.tasks:
                raise InputError(f"two data sets are named {path.name}; rename the folder of one of them")
            data = pairs.read_pairs(path, skip_outside=args.skip_outside)
            if lacking := sum(pair.box is None for pair in data.pairs):
                raise DataError(f"{path}: {lacking} of {len(data.pairs)} pairs have no target_box; add them")
            data = tasks.limit_pairs(data, args.limit, args.seed)
            self.tasks[path.name] = tasks.Correspondence(data, [ALPHA])
            told = [(p.source, p.target, p.source_points.tolist(), p.target_points.tolist(), p.box) for p in data.pairs]
            items = [(item.key, item.stamp, item.caption) for item in data.items]
            self.digests[path.name] = hashlib.sha256(json.dumps([told, items]).encode()).hexdigest()
        self.choice = [Path(text).name for text in args.choose_on]
        self.measured = [name for name in self.tasks if name not in self.choice]
        self.weights = runs.check_models(argparse.Namespace(**vars(args), size=max(args.sizes)), plan, always=True)
        self.stores = FeatureStores(Path(args.out, "features"), args.batch_size, dtype=args.dtype, seed=args.seed)

    def row(self, run: Run, searched: Row | None = None) -> Row:
        """A run on all sets: searched on the sets of the choice, then measured on the others.

        Args:
            run: one of the plan.
            searched: a row whose choice of map and size this run takes over; None: it chooses its own.
        """
        row, found = Row(run.label, run.kind, {}, run.settings), []
        if searched is None:
            combinations = [(size, run.maps) for size in self.args.sizes]
        else:
            size, name = self.chosen(searched)
            combinations = [(size, [name])]
        for size, maps in combinations:
            found += [self._add(row, Part(run, name, size, maps)) for name in self.choice]
        if self.measured:
            size, name = self.chosen(row)
            found += [self._add(row, Part(run, other, size, [name])) for other in self.measured]
        if any(found):
            tqdm.write(
                f"{run.label}, {self._settings(run)}: {sum(found)} of {len(found)} parts are taken from "
                f"{self.args.out}/runs; delete them to measure again"
            )
        return row

    def chosen(self, row: Row) -> tuple[int, str]:
        """Input size and map of the best mean PCK over the sets of the choice."""
        label = Report([row], {name: name for name in self.choice}, {}, chosen_on=tuple(self.choice))
        name, _, size = label.best([row], self.choice[0]).map.partition(" at ")
        return int(size.removesuffix(" px")), name

    def _add(self, row: Row, part: Part) -> bool:
        """Measures a part, or takes it from disk, and adds it to the row; whether it was on disk."""
        args = self.args
        facts = (self.weights[part.run.name], part.name, self.digests[part.name], part.size, part.maps, METRIC)
        path = evaluate_suites.row_path(args.out, part.run, *facts, args.seed, args.dtype, args.prompt)
        kept, found = evaluate_suites.kept_row(path, partial(self._measure, part))
        for name, tallies in kept.results.items():
            row.results.setdefault(f"{name} at {part.size} px", {}).update(tallies)
        row.seconds += kept.seconds
        return found

    def _measure(self, part: Part) -> Row:
        args = argparse.Namespace(**vars(self.args) | dict(size=part.size, optimize=True))
        task = self.tasks[part.name]
        # Random weights depend on which layers are built: one network for all parts.
        built = replace(part.run, maps=part.maps) if part.run.pretrained else part.run
        row, _ = runs.measure(args, built, task, self.stores, self.device, self.latents, keep=False)
        row.results = {name: {part.name: row.results[name][METRIC]} for name in part.maps}
        return row

    @staticmethod
    def _settings(run: Run) -> str:
        return ", ".join(f"{key} {value}" for key, value in run.settings.items()) or "no settings"


def run(args: argparse.Namespace, benchmark: PhotoBenchmark) -> Report:
    """All rows of the table, as a report."""
    position = {name: task.same_position()[METRIC] for name, task in benchmark.tasks.items()}
    rows, searched = [Row("same position", "baseline", {"": position})], {}
    for planned in tqdm(benchmark.plan, desc="runs", unit="run"):
        swept = (planned.name, planned.settings.get("timestep"))
        rows.append(benchmark.row(planned, searched.get(swept)))
        if planned.kind == "noisy":
            searched.setdefault(swept, rows[-1])
    facts = {name: task.facts | dict(images=len(task.items)) for name, task in benchmark.tasks.items()}
    info = dict(
        suite="photos",
        **evaluate_suites.facts_of(benchmark.plan, rows, benchmark.device),
        chosen_on=", ".join(benchmark.choice),
        measured=", ".join(benchmark.measured),
        sizes=args.sizes,
        features=args.dtype,
        prompt=args.prompt,
        data=facts,
    )
    names = {name: NAMES.get(name, name) for name in benchmark.tasks}
    most = dict(ensemble=max(args.ensemble))
    return Report(rows, names, info, args.seed, unit="target images", chosen_on=tuple(benchmark.choice), opponents=most)


def about(args: argparse.Namespace, benchmark: PhotoBenchmark) -> str:
    """The head of the report: what was measured, and how map, size and timestep were chosen."""
    choice, measured = ([NAMES.get(name, name) for name in names] for names in (benchmark.choice, benchmark.measured))
    words = [f"{count} noise{'s' if count > 1 else ''}" for count in args.ensemble]
    text = ABOUT.format(
        sizes=", ".join(map(str, args.sizes)),
        choice=" and ".join(choice),
        most=words[-1],
        measured=f"{' and '.join(measured) or 'Nothing else'} {'are' if len(measured) > 1 else 'is'}",
        search=SEARCH.format(first=words[0], others=" and ".join(words[1:])) if len(words) > 1 else "",
    )
    return HEAD + textwrap.fill(text, 120)


def parser() -> argparse.ArgumentParser:
    """The options of `--suite photos`."""
    result = argparse.ArgumentParser(
        prog=program(),
        usage="%(prog)s --suite photos --data PATH [...]",
        description="Keypoints of photographs: PCK of pixels, random weights, the noisy features of dift_* models over "
        "timesteps and ensembles, their UNets on clean pictures, and cleandift_* models. Maps and sizes are chosen on "
        "some of the data sets, the others are measured with that choice.",
        formatter_class=Formatter,
    )
    result.add_argument("--suite", choices=["photos"], required=True, help="this suite")
    option(result, "--data", "a folder with the folders of the data sets", required=True)
    result.add_argument(
        "--choose-on", nargs="+", metavar="SET", default=["animal_pose", "cub"],
        help="data sets by which map, size and timestep are chosen: folders in DATA, or paths",
    )  # fmt: skip
    result.add_argument(
        "--measure", nargs="*", metavar="SET", default=["pf_willow"], help="data sets measured with that choice"
    )
    option(result, "--out", "a folder for results.json, results.md and results.png", default="results/photos")
    evaluate_suites.add_options(
        result, [PIXELS, "random:cleandift_tiny", "dift_tiny", "cleandift_tiny"], "",
        f"{' '.join(map(str, TIMESTEPS))} unless given", [],
    )  # fmt: skip
    result.add_argument(
        "--sizes", "--size", nargs="+", type=evaluate.numbers(int), action=evaluate.Flat, metavar="PIXELS",
        default=[128, 192, 256], help="sides of the models' input to choose from",
    )  # fmt: skip
    result.add_argument("--limit", type=int, metavar="N", help="only N pairs of each data set")
    result.add_argument("--prompt", default="auto", help="as in the task correspondence")
    stored = dict(choices=list(STORED), default="float16", help="of cached features")
    also(result, result.add_argument("--store-dtype", dest="dtype", **stored), "--dtype")
    result.add_argument("--skip-outside", action="store_true", help="leave out keypoints outside their images")
    result.add_argument("--batch-size", type=int, default=8, help="images per pass; lower it if memory runs out")
    result.add_argument("--seed", type=int, default=0, help="of noises, random weights and the bootstrap")
    return result


@guard("finished rows are kept in OUT/runs; the same command continues")
def main(arguments: list[str] | None = None) -> None:
    """Runs the suite. See `utils.guard.guard` for exit codes."""
    args = parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    keep_freed_memory()
    evaluate_suites.check_options(args, (("sizes", 64, 4096), ("limit", 2, None)))
    args.timesteps = args.timesteps or TIMESTEPS
    args.ensemble, args.sizes = sorted(set(args.ensemble)), list(dict.fromkeys(args.sizes))
    with resource_errors("lower --sizes or --limit"):
        device = resolve_device(args.device)
        plan = [replace(planned, maps=maps_of(args, planned.model)) for planned in make_suite_plan(args)]
        with hold(args.out, "photos"):
            benchmark = PhotoBenchmark(args, plan, device)
            result = run(args, benchmark)
            paths = write_report(result, args.out, about(args, benchmark))
    print(result.legend(), "", result.table(), *result.verdicts(), sep="\n")
    print("wrote", *paths)


def maps_of(args: argparse.Namespace, model: str) -> list[str]:
    """The maps to choose from: those of `--maps`, or the architecture's; all of a model of another package.

    Raises:
        ModelError: a map that the model does not have.
    """
    infos = list_maps(model)
    names, defaults = [info["name"] for info in infos], defaults_of(model)
    if args.maps == ["all"] or defaults is None:
        return names
    return pick_maps(model, infos, args.maps or list(defaults.searched), names[-1])
