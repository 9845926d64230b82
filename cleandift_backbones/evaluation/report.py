"""Results of a benchmark as JSON, as a Markdown table with a verdict in words, and as a plot (needs matplotlib)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..utils.atomic import DamagedFileError, open_tensors, replacing
from ..utils.errors import FileTakenError
from .bootstrap import Tally, difference, rate_interval, unit_weights

VERSIONS = ("cleandift_backbones", "torch", "timm", "diffusers", "numpy", "scipy", "pillow")


@dataclass(eq=False)
class Row:
    """One run: a model with settings, measured.

    Attributes:
        label: rows of one label share a line of the table, which shows the best of them.
        kind: "clean", "noisy", "teacher" (the untouched teacher on clean pictures), "control" or "baseline".
        settings: what tells this run from others: timestep, ensemble, ...
        results: {map name: {metric: Tally}}.
        seconds: time taken.
    """

    label: str
    kind: str
    results: dict[str, dict[str, Tally]]
    settings: dict = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def series(self) -> str:
        """What is one curve, or one line by map: the label without the settings."""
        return re.split(r", (?:best )?t\b", self.label)[0]

    def save(self, path: Path) -> None:
        """Writes the row as one safetensors file, aside and then renamed."""
        arrays = {
            f"{name}/{metric}/{part}": np.ascontiguousarray(getattr(tally, part), dtype=np.float64)
            for name, tallies in self.results.items()
            for metric, tally in tallies.items()
            for part in ("hits", "trials")
        }
        # safetensors sorts its keys: the order of the maps is told beside them
        told = dict(
            label=self.label, kind=self.kind, settings=self.settings, seconds=self.seconds, maps=list(self.results)
        )
        with replacing(path) as aside:
            save_file(arrays, aside, {"row": json.dumps(told)})

    @classmethod
    def load(cls, path: Path) -> Row:
        """Reads a row that `save` wrote.

        Raises:
            DamagedFileError: it is damaged. FileError: it cannot be read at the moment.
        """
        with open_tensors(path, "np") as file:
            try:
                told = json.loads((file.metadata() or {})["row"])
                results: dict[str, dict[str, Tally]] = {name: {} for name in told.pop("maps")}
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    name, metric, part = key.rsplit("/", 2)
                    if part == "hits":
                        tally = Tally(file.get_tensor(key), file.get_tensor(f"{name}/{metric}/trials"))
                        results[name][metric] = tally
                return cls(results=results, **told)
            except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
                raise DamagedFileError(f"{path} is damaged: not a row of a report ({error!r})") from None


@dataclass
class Best:
    """The best run and map of some rows on one metric."""

    row: Row
    map: str
    tally: Tally


def best_of(rows: Sequence[Row], metric: str, lower: bool = False, chosen_on: Sequence[str] = ()) -> Best | None:
    """The run and map of the highest (or lowest) rate; None if nothing was measured.

    Args:
        chosen_on: metrics whose mean rate decides in place of the metric's own rate.
    """
    found = [
        (row, name, tallies)
        for row in rows
        for name, tallies in row.results.items()
        if metric in tallies and tallies.keys() >= set(chosen_on)
    ]
    deciding = list(chosen_on) or [metric]

    def rate(candidate: tuple) -> float:
        return sum(candidate[2][name].rate for name in deciding) / len(deciding)

    best = (min if lower else max)(found, key=rate, default=None)
    return best and Best(best[0], best[1], best[2][metric])


@dataclass
class Report:
    """All rows of a table, with what is needed to repeat it.

    Attributes:
        metrics: {key: name}; tables add the unit. info: command, data, sizes, ... (JSON values).
        main: metrics of the first table, the verdicts and the plot; () for all.
        lower: metrics in a unit of their own of which less is better; all others are shares, of which more is.
        unit: what the bootstrap draws.
        chosen_on: metrics whose mean chooses map and settings for all metrics; (): each metric chooses its own.
        opponents: settings of the noisy runs that `comparisons` takes; {}: all noisy runs.
    """

    rows: list[Row]
    metrics: dict[str, str]
    info: dict
    seed: int = 0
    main: tuple[str, ...] = ()
    lower: frozenset[str] = frozenset()
    unit: str = "concepts"
    chosen_on: tuple[str, ...] = ()
    opponents: dict = field(default_factory=dict)

    def __post_init__(self):
        self.shown = {key: text for key, text in self.metrics.items() if not self.main or key in self.main}
        self._weights: dict[int, np.ndarray] = {}

    def weights(self, tally: Tally) -> np.ndarray:
        """Weights of the bootstrap, equal for all tallies of one number of units, so that they can be paired."""
        units = len(tally.hits)
        if units not in self._weights:
            self._weights[units] = unit_weights(units, seed=self.seed)
        return self._weights[units]

    def interval(self, tally: Tally) -> tuple[float, float]:
        """See `rate_interval`."""
        return rate_interval(tally, self.weights(tally))

    def best(self, rows: Sequence[Row], metric: str) -> Best | None:
        """See `best_of`."""
        return best_of(rows, metric, metric in self.lower, self.chosen_on)

    def scale(self, metric: str) -> float:
        """What a rate is multiplied by to be shown."""
        return 1 if metric in self.lower else 100

    def heading(self, metric: str) -> str:
        """The heading of a metric's column: its name and unit, which metrics that are no shares have in their name."""
        return self.metrics[metric] + ("" if metric in self.lower else " (%)")

    def winner(self, metric: str) -> str | None:
        """The label whose best run beats the best runs of all other models, each by more than the 95 % interval.

        None if only one model was measured, or no difference is that clear.
        """
        best = self.best(self.rows, metric)
        if best is None:
            return None
        others = [self.best(self._of_series(name), metric) for name in {row.series for row in self.rows}]
        others = [other for other in others if other and other.row.series != best.row.series]
        bounds = [difference(best.tally, other.tally, self.weights(best.tally))[1:] for other in others]
        clear = bool(bounds) and all(high < 0 if metric in self.lower else low > 0 for low, high in bounds)
        return best.row.label if clear else None

    def _digits(self, metric: str) -> str:
        return ".3f" if metric in self.lower else ".1f"

    def _cell(self, metric: str, best: Best | None, bold: bool, settings: bool = False) -> str:
        """The best run's rate and interval, its map, and its settings if asked for; "" where nothing was measured."""
        if best is None:
            return ""
        scale, digits = self.scale(metric), self._digits(metric)
        low, high = (format(scale * bound, digits) for bound in self.interval(best.tally))
        number = format(scale * best.tally.rate, digits)
        notes = "" if self.chosen_on else _notes(best, settings)
        return " ".join([f"**{number}**" if bold else number, f"[{low}, {high}]", notes]).strip()

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    def to_json(self) -> dict:
        """Everything: every map of every run with its interval, and the comparisons."""
        runs = []
        for row in self.rows:
            maps = {
                name: {m: dict(rate=t.rate, interval=self.interval(t)) for m, t in tallies.items()}
                for name, tallies in row.results.items()
            }
            chosen = [self.best([row], metric) for metric in self.chosen_on]
            facts = dict(chosen=chosen[0].map) if any(chosen) else {}
            runs.append(
                dict(label=row.label, kind=row.kind, **row.settings, seconds=round(row.seconds, 2), **facts, maps=maps)
            )
        units = {key: "as named" if key in self.lower else "share, 0..1" for key in self.metrics}
        found = dict(units=units, runs=runs, comparisons=self.comparisons())
        return dict(self.info, versions=versions(), seed=self.seed, **found)

    def comparisons(self) -> list[dict]:
        """Best clean against best noisy run (each over all its maps and settings), per metric, paired over units."""
        result = []
        opponents = [row for row in self.of_kind("noisy") if self.opponents.items() <= row.settings.items()]
        for metric in self.shown:
            clean, noisy = self.best(self.of_kind("clean"), metric), self.best(opponents, metric)
            if clean and noisy:
                delta, low, high = difference(clean.tally, noisy.tally, self.weights(clean.tally))
                result.append(
                    dict(
                        metric=metric, clean=_where(clean), noisy=_where(noisy), difference=delta, interval=(low, high)
                    )
                )
        return result

    def verdicts(self) -> list[str]:
        """The comparisons in words, a sentence per metric."""
        sentences = []
        for item in self.comparisons():
            metric = item["metric"]
            scale, digits = self.scale(metric), self._digits(metric)
            points, unit = ("", "") if metric in self.lower else (" points", " %")
            delta, low, high = (scale * value for value in (item["difference"], *item["interval"]))
            if low <= 0 <= high:
                words = f"no clear winner: clean minus noisy is {delta:+{digits}}{points}"
            else:
                wins = (high < 0) if metric in self.lower else (low > 0)
                words = f"clean {'wins' if wins else 'loses'} by {abs(delta):{digits}}{points}"
            sides = "; ".join(
                f"{side} {scale * item[side]['rate']:{digits}}{unit} ({item[side]['text']})"
                for side in ("clean", "noisy")
            )
            heading = self.metrics[metric]
            sentences.append(
                f"**{heading}**: {words} [{low:+{digits}}, {high:+{digits}}]. {sides[0].upper()}{sides[1:]}."
            )
        return sentences

    def table(self) -> str:
        """A Markdown table: a line per label, a column per metric, and one of what was chosen; see `legend`."""
        labels = list(dict.fromkeys(row.label for row in self.rows))
        winners = {metric: self.winner(metric) for metric in self.shown}
        heads = ["features", *(["chosen"] if self.chosen_on else []), *map(self.heading, self.shown)]
        lines = [_line(heads), _line(["---"] * len(heads))]
        for label in labels:
            rows = [row for row in self.rows if row.label == label]
            bests = {metric: self.best(rows, metric) for metric in self.shown}
            cells = [self._cell(m, best, winners[m] == label, len(rows) > 1) for m, best in bests.items()]
            chosen = [_notes(best, len(rows) > 1) for best in bests.values() if best and self.chosen_on]
            lines.append(_line([label, *chosen[:1], *cells]))
        return "\n".join(lines)

    def long_table(self) -> str:
        """A Markdown table of all metrics: a line per metric, a column per label."""
        labels = list(dict.fromkeys(row.label for row in self.rows))
        lines = [_line(["", *labels]), _line(["---"] * (1 + len(labels)))]
        for metric in self.metrics:
            bests = [self.best([row for row in self.rows if row.label == label], metric) for label in labels]
            winner = self.winner(metric)
            cells = [self._cell(metric, best, winner == label) for label, best in zip(labels, bests, strict=True)]
            lines.append(_line([self.heading(metric), *cells]))
        return "\n".join(lines)

    def map_table(self, metric: str) -> str:
        """Markdown tables of one metric by map, for the models that have several; those of equal maps share a table."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for series in dict.fromkeys(row.series for row in self.rows):
            names = tuple(dict.fromkeys(name for row in self._of_series(series) for name in row.results))
            if len(names) > 1:
                groups.setdefault(names, []).append(series)
        tables = []
        for names, models in groups.items():
            lines = [_line([self.heading(metric), *names]), _line(["---", *["---:"] * len(names)])]
            for series in models:
                rows, cells = self._of_series(series), []
                for name in names:
                    held = [replace(row, results={name: row.results[name]}) for row in rows if name in row.results]
                    best = self.best(held, metric)
                    cells.append(format(self.scale(metric) * best.tally.rate, self._digits(metric)) if best else "")
                lines.append(_line([f"{series}{', best run' if len(rows) > 1 else ''}", *cells]))
            tables.append("\n".join(lines))
        return "\n\n".join(tables)

    def _of_series(self, series: str) -> list[Row]:
        return [row for row in self.rows if row.series == series]

    def markdown(self, about: str) -> str:
        """Heading, verdict, table, tables by map, and how it was made."""
        verdicts = "\n".join(f"- {sentence}" for sentence in self.verdicts())
        by_map = "\n\n".join(self.map_table(m) for m in self.chosen_on or self.shown)
        facts = facts_list(self.info | dict(seed=self.seed, versions=versions()))
        parts = [
            about,
            f"## Clean against the best noisy run\n\n{verdicts}" if verdicts else "",
            f"## Table\n\n{self.legend()}\n\n{self.table()}",
            f"## Everything measured\n\n{self.long_table()}" if len(self.shown) < len(self.metrics) else "",
            f"## By map\n\n{by_map}" if by_map.strip() else "",
            f"## How it was made\n\n{facts}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def legend(self) -> str:
        """What the cells of the tables hold, in words."""
        chosen = f"chosen by the mean of {' and '.join(self.metrics[m] for m in self.chosen_on)} for all columns"
        words = [
            f"Values with 95 % intervals (bootstrap over {self.unit}), and the map "
            f"{chosen if self.chosen_on else 'of the best value'}."
        ]
        if len({row.series for row in self.rows}) > 1:
            words.append("Bold: better than every other model, and no interval of the differences contains 0.")
        if lower := [text for key, text in self.shown.items() if key in self.lower]:
            words.append(f"Not per cent, and less is better: {', '.join(lower)}.")
        return " ".join(words)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check_report(folder: str | os.PathLike, name: str) -> None:
    """Raises FileTakenError where the files of a report would take the place of files of others."""
    paths = [Path(folder, f"{name}.{ending}") for ending in ("json", "md", "png")]
    there = [path for path in paths if path.exists()]
    try:
        found = json.loads(paths[0].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if there and not (isinstance(found, dict) and "versions" in found and ("runs" in found or "shares" in found)):
        raise FileTakenError(f"{there[0]} was not written by an evaluation: give another --out, or move it away")


def _settings(row: Row) -> str:
    names = {"timestep": "t", "ensemble": "noises"}
    return ", ".join(f"{names.get(key, key)}={value}" for key, value in row.settings.items())


def _notes(best: Best, settings: bool) -> str:
    """The map of a run, and its settings if asked for."""
    notes = [f"map {best.map}"] if best.map else []
    return ", ".join(notes + ([_settings(best.row)] if notes and settings else []))


def _where(best: Best) -> dict:
    text = ", ".join(part for part in (best.row.label, best.map) if part)
    return dict(rate=best.tally.rate, label=best.row.label, map=best.map, **best.row.settings, text=text)


def facts_list(info: dict) -> str:
    """Facts as a Markdown list; facts that are dicts as lists in it, and dicts in these as one line."""
    lines = []
    for key, value in info.items():
        lines.append(f"- {key}:" if isinstance(value, dict) else f"- {key}: {value}")
        if isinstance(value, dict):
            lines += [f"  - {name}: {_words(words)}" for name, words in value.items()]
    return "\n".join(lines)


def _words(value: object) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
