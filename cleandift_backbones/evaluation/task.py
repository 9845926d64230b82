"""What a task of evaluation is, and the list of all tasks. docs/add_a_task.md shows how to add one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..data.sources import ImageSource
from ..utils.errors import InputError
from .bootstrap import Tally

if TYPE_CHECKING:
    from .features import MapFeatures
    from .runs import RunContext

Size = tuple[int, int]  # height, width
#: every task by its name, in the order of the command's help; those of this package register in `evaluation.tasks`
TASKS: dict[str, type[Task]] = {}


def register_task(cls: type[Task]) -> type[Task]:
    """Adds a task under its `name`: a decorator of its class.

    Raises:
        InputError: another task has that name.
    """
    if TASKS.setdefault(cls.name, cls) is not cls:
        other = TASKS[cls.name]
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # not the same, loaded again
            raise InputError(f"a task is called {cls.name!r} already ({other.__module__}); give yours another name")
        TASKS[cls.name] = cls
    return cls


def task_of(name: str) -> type[Task]:
    """The task of a name. Raises InputError for one that is not registered."""
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise InputError(f"task {name!r} is unknown; choose one of {known}, or import the module that adds it")
    return TASKS[name]


def option(
    default: object,
    help: str,
    kind: type | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
):
    """A field of a task's `Options`: an option of the command line, --my-field of `my_field`.

    Args:
        default: its value unless given; a tuple for an option of several values, False for a switch.
        help: one line for people.
        kind: of the values, where the default does not tell it.
        low: lowest value allowed.
        high: highest value allowed.
        choices: the values allowed.
        metavar: stands for the value in the help.
    """
    if kind is None and default is not None:
        kind = type(default[0] if isinstance(default, tuple) else default)
    about = dict(help=help, kind=kind or str, low=low, high=high, choices=choices, metavar=metavar)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """Options of a task; each a field made by `option`.

    Raises:
        InputError: a value out of its range, or not among the choices; names the option.
    """

    def __post_init__(self):
        for one in fields(self):
            value, about = getattr(self, one.name), one.metadata
            if isinstance(one.default, tuple) and not isinstance(value, tuple):
                value = tuple(value) if isinstance(value, list) else (value,)
                object.__setattr__(self, one.name, value)
            flag = f"--{one.name.replace('_', '-')}"
            if value == ():
                raise InputError(f"{flag} is empty; give at least one number")
            low, high = about.get("low"), about.get("high")
            for number in value if isinstance(value, tuple) else (value,):
                if number is None or low is None:
                    continue
                if not low <= number <= (number if high is None else high):
                    allowed = f"{low} or more" if high is None else f"{low}..{high}"
                    raise InputError(f"{flag} {number} is out of range; give {allowed}")
            if about.get("choices") and value not in about["choices"]:
                raise InputError(f"{flag} {value!r} is unknown; choose one of {', '.join(about['choices'])}")


class Task:
    """A measurement on feature maps: images that features are wanted of, and what is measured on one map.

    A subclass under `register_task` is a task of `evaluate` and of the command line.

    Class attributes:
        name: of the task, a word.
        about: one line of help: the layout of the data, and what is measured.
        text: what the numbers are, for reports.
        Options: a dataclass of `option` fields.
        timestep: of noisy models, unless asked for.
        ensemble: noises that noisy models average, unless asked for.
        last_map: the model's last map is the default; otherwise us6, or the map of the stride nearest to 16.
        pool: spatial means are enough.
        unit: what the bootstrap draws.
        lower: metrics of which less is better, see `report.Report`.
        counted: what `limit` counts.
        limit: how many of these unless asked for; None for all.
        memory_option: the option to lower where memory runs out.
        stored: features come through a store; False for a task that computes its own in `run`.
        noisy_only: takes models that add noise, and no others.

    Attributes:
        items: the images; features come in this order.
        facts: about the data, for the report.
        mode: how images become the model's input: "squash" or "pad".
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    text: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    timestep: ClassVar[int] = 261  # the paper's, of correspondence
    ensemble: ClassVar[int] = 1
    last_map: ClassVar[bool] = False
    pool: ClassVar[bool] = False
    unit: ClassVar[str] = "pictures"
    lower: ClassVar[frozenset[str]] = frozenset()
    counted: ClassVar[str] = "pictures of each split"
    limit: ClassVar[int | None] = None
    memory_option: ClassVar[str] = "--size or --limit"
    stored: ClassVar[bool] = True
    noisy_only: ClassVar[bool] = False
    mode = "squash"

    def __init__(self, items: Sequence[ImageSource]):
        self.items, self.facts = list(items), {}

    @classmethod
    def read(cls, data: str | Path, options: Options, limit: int | None = None, seed: int = 0) -> Task:
        """The task on a data set: reads its lists, and finds what is missing.

        Args:
            data: where the data set is.
            options: of `cls.Options`.
            limit: take so many of what `counted` names, drawn by `seed`.
            seed: of this draw, and of all that the task draws.
        """
        raise NotImplementedError

    def measure(self, features: MapFeatures, size: Size, progress: bool = True) -> dict[str, Tally]:
        """Everything measured on one map.

        Args:
            features: of `items`, features[i] is C x h x w, or C with `pool`.
            size: (height, width) of the model's input in pixels.
            progress: shows a bar.

        Returns:
            {name of a metric: hits and trials}, see `bootstrap.Tally`.
        """
        raise NotImplementedError

    def main(self, metrics: Sequence[str]) -> tuple[str, ...]:
        """The metrics that matter most."""
        return tuple(metrics)

    def heading(self, metric: str) -> str:
        """A key of `measure` as tables show it."""
        return metric

    def run(self, context: RunContext):
        """All models measured, as a report; None from a process that only computed features."""
        return context.report(self)

    def write(self, report, folder: Path) -> list[Path]:
        """Writes what `run` returned into a folder, as NAME.json, NAME.md and NAME.png; returns their paths."""
        from .plots import write_report

        return write_report(report, folder, f"# {self.name.capitalize()}\n\n{self.text}", self.name)

    def lines(self, report) -> list[str]:
        """What `run` returned for people."""
        return [self.text, report.legend(), "", report.table(), *report.verdicts()]


def defaults(cls: type[Options]) -> dict[str, object]:
    """Of all options."""
    return {one.name: one.default for one in fields(cls) if one.default is not MISSING}


def limited(items: Sequence, limit: int | None, seed: int) -> list[int]:
    """Places of at most `limit` items, drawn by the seed, in their order."""
    if limit is None or limit >= len(items):
        return list(range(len(items)))
    return sorted(random.Random(seed).sample(range(len(items)), limit))
