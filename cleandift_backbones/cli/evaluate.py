"""`cleandift evaluate TASK --model NAME ... --data PATH`: the paper's tasks."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module

from ..evaluation.api import EvaluateConfig, evaluate
from ..evaluation.features import STORED
from ..evaluation.task import TASKS, Task, defaults
from ..optimization.cpu_malloc import keep_freed_memory
from ..utils.errors import InputError, resource_errors
from ..utils.guard import guard, program
from .arguments import MODELS_HELP, Formatter, also, command_parser, option

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
    for name, task in TASKS.items():
        one = commands.add_parser(name, help=task.about, description=f"{name}: {task.about}", formatter_class=Formatter)
        _common(one, task)
        _special(one, task)
    return result


def _common(one: argparse.ArgumentParser, task: type[Task]) -> None:
    option(one, "--model", MODELS_HELP, nargs="+", required=True)
    option(one, "--data", "a data set", required=True)
    option(
        one, "--map", default=[],
        about="for all models; MODEL=MAP for one of them. Default: "
        + ("the last" if task.last_map else "the model's default map, or else the map of the stride nearest to 16"),
    )  # fmt: skip
    option(one, "--out", default="results", about=f"a folder for {task.name}.json, {task.name}.md and {task.name}.png")
    if task.stored:
        one.add_argument("--cache", metavar="DIR", help="folder of cached features; default OUT/features")
        also(one, one.add_argument(
            "--store-dtype", dest="dtype", choices=list(STORED), default="float16", help="of cached features",
        ), "--dtype")  # fmt: skip
        one.add_argument(
            "--ensemble", **_list(int), metavar="N", help=f"noises averaged by dift_* models; default {task.ensemble}"
        )
    one.add_argument("--size", type=int, help="side of the model's input; default the model's own")
    one.add_argument("--batch-size", type=int, default=8, help="images per pass; lower it if memory runs out")
    one.add_argument(
        "--prompt", default="auto",
        help="text for the models that have a text encoder; auto: the task's own; none: the model's own, mostly empty",
    )  # fmt: skip
    timestep = "the model's (261 for Stable Diffusion)" if task.timestep is None else task.timestep
    option(
        one, "--timesteps", **_list(int),
        about=f"for dift_* models, default {timestep}; several are drawn as a curve",
    )  # fmt: skip
    option(one, "--weights", nargs="+", default=[], metavar="MODEL=FILE")
    one.add_argument("--limit", type=int, metavar="N", default=task.limit, help=f"only N {task.counted}")
    one.add_argument(
        "--no-optimize", dest="optimize", action="store_false",
        help="leave out what makes this package's models faster with the same maps to rounding; docs/performance.md",
    )  # fmt: skip
    option(one, "--device")
    one.add_argument("--threads", type=int, help="CPU threads")
    one.add_argument("--seed", type=int, default=0, help="of noises, random weights, probes and the bootstrap")


def _list(kind: type) -> dict:
    return dict(nargs="+", type=numbers(kind), action=Flat)


def _special(one: argparse.ArgumentParser, task: type[Task]) -> None:
    """The task's own options, from their fields."""
    for field in fields(task.Options):
        about, flag = field.metadata, f"--{field.name.replace('_', '-')}"
        if field.default is False:
            one.add_argument(flag, action="store_true", help=about["help"])
        elif isinstance(field.default, tuple):
            several = dict(**_list(about["kind"]), default=list(field.default), metavar=about["metavar"])
            one.add_argument(flag, **several, help=about["help"])
        else:
            one.add_argument(
                flag, type=about["kind"], choices=about["choices"], default=field.default, metavar=about["metavar"],
                help=about["help"],
            )  # fmt: skip


def config_of(args: argparse.Namespace) -> tuple[EvaluateConfig, dict[str, object]]:
    """The options as the settings that tasks have in common, and as those of the task."""
    given = vars(args) | dict(maps=args.map)
    config = {field.name: given[field.name] for field in fields(EvaluateConfig) if field.name in given}
    for name in ("timesteps", "ensemble"):
        if given.get(name) == []:
            raise InputError(f"--{name} is empty; give at least one number")
    return EvaluateConfig(**config), {name: given[name] for name in defaults(TASKS[args.task].Options)}


@guard("cached features and finished rows are kept, the same command continues")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a task or a suite. See `utils.guard.guard` for exit codes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if suite := _suite(given):
        return import_module(f".evaluate_{suite}", __package__).main(given)
    args = parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    if args.optimize:
        keep_freed_memory()  # of the whole process, which is this command's
    config, options = config_of(args)
    with resource_errors(f"lower {TASKS[args.task].memory_option}"):
        result = evaluate(args.model, args.task, args.data, args.out, config, **options)
    if result is not None:
        print(*result.lines, sep="\n")
        print("wrote", *result.paths)


if __name__ == "__main__":
    main()
