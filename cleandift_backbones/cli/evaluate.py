"""The command line of the tasks: `tools/evaluate.py TASK --model NAME ... --data PATH`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from cleandift_command import guard

from ..evaluation.api import EvaluateConfig, evaluate
from ..evaluation.features import STORED
from ..evaluation.task import TASKS, Task, defaults
from ..utils.errors import InputError, resource_errors


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults where there are any."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


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


class _TaskParser(argparse.ArgumentParser):
    """Asks for the TASK where options come first: argparse would take the value of one for it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        given = sys.argv[1:] if args is None else args
        if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
            self.error(
                f"no TASK was given: the first argument must be one of {', '.join(TASKS)}; the emoji benchmark is "
                "tools/evaluate.py --suite emoji, the photograph benchmark --suite photos"
            )
        return super().parse_args(args, namespace)


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """All tasks as sub-commands."""
    result = _TaskParser(prog=prog, description="Measure feature maps of any timm model.")
    kind = argparse.ArgumentParser
    commands = result.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=kind)
    for name, task in TASKS.items():
        one = commands.add_parser(name, help=task.about, description=f"{name}: {task.about}", formatter_class=Formatter)
        _common(one, task)
        _special(one, task)
    return result


def _common(one: argparse.ArgumentParser, task: type[Task]) -> None:
    one.add_argument(
        "--model", "--models", nargs="+", required=True, metavar="NAME",
        help="timm model names; 'pixels' is the picture itself, 'random:NAME' has random weights",
    )  # fmt: skip
    one.add_argument("--data", required=True, metavar="PATH", help="the data set")
    one.add_argument(
        "--map", "--maps", nargs="+", default=[], metavar="MAP",
        help="maps by name or index, for all models; MODEL=MAP for one of them. Default: "
        + ("the last" if task.last_map else "us6, or else the map of the stride nearest to 16"),
    )  # fmt: skip
    files = f"{task.name}.json, {task.name}.md and {task.name}.png"
    one.add_argument("--out", default="results", help=f"folder for {files}")
    if task.stored:
        one.add_argument("--cache", metavar="DIR", help="folder of cached features; default OUT/features")
        one.add_argument("--dtype", choices=list(STORED), default="float16", help="of cached features")
        one.add_argument(
            "--ensemble", **_list(int), metavar="N", help=f"noises averaged by dift_* models; default {task.ensemble}",
        )  # fmt: skip
    one.add_argument("--size", type=int, help="side of the model's input; default the model's own")
    one.add_argument("--batch-size", type=int, default=8, help="pictures per pass; lower it if memory runs out")
    one.add_argument(
        "--prompt", default="auto",
        help="text for the models that have a text encoder; auto: the task's own; none: the model's own, mostly empty",
    )  # fmt: skip
    one.add_argument(
        "--timesteps", **_list(int), metavar="T",
        help=f"of dift_* models, 0..999, default {task.timestep}; several are drawn as a curve",
    )  # fmt: skip
    one.add_argument(
        "--weights", nargs="+", default=[], metavar="MODEL=FILE", help="safetensors instead of a model's published ones"
    )
    one.add_argument(
        "--limit", type=int, metavar="N", default=task.limit,
        help=f"only N {task.counted}",
    )  # fmt: skip
    one.add_argument(
        "--no-optimize", dest="optimize", action="store_false",
        help="leave out what makes this package's models faster with the same maps to rounding; docs/performance.md",
    )  # fmt: skip
    one.add_argument("--device", default="auto", help="cpu, cuda, ... or auto")
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
    """Runs a task. See `cleandift_command.guard` for exit codes."""
    args = parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    config, options = config_of(args)
    with resource_errors(f"lower {TASKS[args.task].memory_option}"):
        result = evaluate(args.model, args.task, args.data, args.out, config, **options)
    if result is not None:
        print(*result.lines, sep="\n")
        print("wrote", *result.paths)
