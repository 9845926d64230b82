"""Results of a benchmark as JSON, as a Markdown table with a verdict in words, and as a plot (needs matplotlib)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..files import replacing, write_text
from .bootstrap import Tally, concept_weights, difference, rate_interval

VERSIONS = ("cleandift_backbones", "torch", "timm", "diffusers", "numpy", "scipy", "pillow")
COLOURS = {"clean": "#c2410c", "noisy": "#1d4ed8", "teacher": "#0f766e", "baseline": "#6b7280", "control": "#a1a1aa"}


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
        """Reads a row that `save` wrote."""
        with safe_open(path, "np") as file:
            told = json.loads(file.metadata()["row"])
            results: dict[str, dict[str, Tally]] = {name: {} for name in told.pop("maps")}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, metric, part = key.rsplit("/", 2)
                if part == "hits":
                    tally = Tally(file.get_tensor(key), file.get_tensor(f"{name}/{metric}/trials"))
                    results[name][metric] = tally
        return cls(results=results, **told)


@dataclass
class Best:
    """The best run and map of some rows on one metric."""

    row: Row
    map: str
    tally: Tally


def best_of(rows: Sequence[Row], metric: str, lower: bool = False) -> Best | None:
    """The run and map of the highest (or lowest) rate; None if nothing was measured."""
    found = [
        Best(row, name, tallies[metric]) for row in rows for name, tallies in row.results.items() if metric in tallies
    ]
    return (min if lower else max)(found, key=lambda best: best.tally.rate, default=None)


@dataclass
class Report:
    """All rows of a table, with what is needed to repeat it.

    Attributes:
        metrics: {key: heading}. info: command, data, sizes, ... (JSON values).
        main: metrics of the first table, the verdicts and the plot; () for all.
        lower: metrics in a unit of their own of which less is better; all others are shares, of which more is.
        unit: what the bootstrap draws.
    """

    rows: list[Row]
    metrics: dict[str, str]
    info: dict
    seed: int = 0
    main: tuple[str, ...] = ()
    lower: frozenset[str] = frozenset()
    unit: str = "concepts"

    def __post_init__(self):
        self.shown = {key: text for key, text in self.metrics.items() if not self.main or key in self.main}
        first = next(tally for row in self.rows for tallies in row.results.values() for tally in tallies.values())
        self.weights = concept_weights(len(first.hits), seed=self.seed)

    def best(self, rows: Sequence[Row], metric: str) -> Best | None:
        """See `best_of`."""
        return best_of(rows, metric, metric in self.lower)

    def _scale(self, metric: str) -> float:
        return 1 if metric in self.lower else 100

    def _digits(self, metric: str) -> str:
        return ".3f" if metric in self.lower else ".1f"

    def _interval(self, metric: str, tally: Tally, note: str = "", bold: bool = False) -> str:
        scale, digits = self._scale(metric), self._digits(metric)
        low, high = (format(scale * bound, digits) for bound in rate_interval(tally, self.weights))
        number = format(scale * tally.rate, digits)
        return f"{f'**{number}**' if bold else number} [{low}, {high}]" + (f" {note}" if note else "")

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    def to_json(self) -> dict:
        """Everything: every map of every run with its interval, and the comparisons."""
        runs = []
        for row in self.rows:
            maps = {
                name: {m: dict(rate=t.rate, interval=rate_interval(t, self.weights)) for m, t in tallies.items()}
                for name, tallies in row.results.items()
            }
            runs.append(dict(label=row.label, kind=row.kind, **row.settings, seconds=round(row.seconds, 2), maps=maps))
        return dict(self.info, versions=versions(), seed=self.seed, runs=runs, comparisons=self.comparisons())

    def comparisons(self) -> list[dict]:
        """Best clean against best noisy run (each over all its maps and settings), per metric, paired over concepts."""
        result = []
        for metric in self.shown:
            clean, noisy = self.best(self.of_kind("clean"), metric), self.best(self.of_kind("noisy"), metric)
            if clean and noisy:
                delta, low, high = difference(clean.tally, noisy.tally, self.weights)
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
            scale, digits = self._scale(metric), self._digits(metric)
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
        """A Markdown table: a line per label, a column per metric; the best of each column in bold."""
        labels = list(dict.fromkeys(row.label for row in self.rows))
        top = {m: best.tally.rate for m in self.shown if (best := self.best(self.rows, m))}
        lines = ["| features | " + " | ".join(self.shown.values()) + " |", "| --- |" + " --- |" * len(self.shown)]
        for label in labels:
            rows = [row for row in self.rows if row.label == label]
            cells = []
            for metric in self.shown:
                best = self.best(rows, metric)
                if best is None:
                    cells.append("")
                    continue
                note = best.map + (f", {_settings(best.row)}" if len(rows) > 1 else "") if best.map else ""
                cells.append(self._interval(metric, best.tally, note, best.tally.rate == top[metric]))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def long_table(self) -> str:
        """A Markdown table of all metrics: a line per metric, a column per label."""
        labels = list(dict.fromkeys(row.label for row in self.rows))
        lines = ["| | " + " | ".join(labels) + " |", "| --- |" + " --- |" * len(labels)]
        for metric, heading in self.metrics.items():
            bests = [self.best([row for row in self.rows if row.label == label], metric) for label in labels]
            cells = [self._interval(metric, best.tally) if best else "" for best in bests]
            lines.append(f"| {heading} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def map_table(self, metric: str) -> str:
        """A Markdown table of one metric by map: the clean model, and each map's best noisy and teacher runs."""
        kinds = {"clean": "clean", "noisy": "noisy, best run", "teacher": "teacher on clean pictures, best t"}
        kinds = {kind: title for kind, title in kinds.items() if self.of_kind(kind)}
        names = list(dict.fromkeys(name for kind in kinds for row in self.of_kind(kind) for name in row.results))
        lines = [f"| {self.metrics[metric]} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        pick, scale, digits = min if metric in self.lower else max, self._scale(metric), self._digits(metric)
        for kind, title in kinds.items():
            rates = [
                pick(
                    (r.results[n][metric].rate for r in self.of_kind(kind) if metric in r.results.get(n, {})),
                    default=np.nan,
                )
                for n in names
            ]
            lines.append(f"| {title} | " + " | ".join(format(scale * rate, digits) for rate in rates) + " |")
        return "\n".join(lines)

    def markdown(self, about: str) -> str:
        """Heading, verdict, table, tables by map, and how it was made."""
        verdicts = "\n".join(f"- {sentence}" for sentence in self.verdicts())
        several = any(len(row.results) > 1 for row in self.rows if row.kind in ("clean", "noisy"))
        by_map = "\n\n".join(self.map_table(m) for m in self.shown) if several else ""
        made = ", ".join(f"{name} {number}" for name, number in versions().items())
        facts = "\n".join(f"- {key}: {value}" for key, value in self.info.items())
        parts = [
            about,
            f"## Clean against the best noisy run\n\n{verdicts}" if verdicts else "",
            f"## Table\n\n{self._caption()}\n\n{self.table()}",
            f"## Everything measured\n\n{self.long_table()}" if len(self.shown) < len(self.metrics) else "",
            f"## By map\n\n{by_map}" if by_map else "",
            f"## How it was made\n\n{facts}\n- seed: {self.seed}\n- versions: {made}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _caption(self) -> str:
        what = f"Per cent, with 95 % intervals (bootstrap over {self.unit}), best map."
        lower = [text for key, text in self.shown.items() if key in self.lower]
        return what + (f" Not per cent, and less is better: {', '.join(lower)}." if lower else "")

    def plot(self, path: Path) -> None:
        """The noisy curve over the timestep against the clean line, a panel per metric, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
        with plt.rc_context(style):
            columns = min(2, len(self.shown))
            rows = -(-len(self.shown) // columns)
            figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False)
            for axis, (metric, heading) in zip(axes.flat, self.shown.items()):
                self._panel(axis, metric)
                axis.set_title(heading, loc="left", fontweight="bold")
            for axis in axes.flat[len(self.shown) :]:
                axis.remove()
            entries: dict = {}
            for axis in axes.flat:
                handles, labels = axis.get_legend_handles_labels()
                entries |= dict(zip(labels, handles))
            figure.legend(
                entries.values(), entries.keys(), loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0)
            )
            figure.tight_layout(rect=(0, 0.05 + 0.06 * (-(-len(entries) // 3)) / rows, 1, 1), h_pad=2, w_pad=2)
            with replacing(path) as aside:
                figure.savefig(aside, dpi=160, format="png")
            plt.close(figure)

    def _bars(self, axis, metric: str) -> None:
        labels = list(dict.fromkeys(row.label for row in self.rows))
        scale = self._scale(metric)
        for place, label in enumerate(labels):
            rows = [row for row in self.rows if row.label == label]
            if best := self.best(rows, metric):
                value, (low, high) = best.tally.rate, rate_interval(best.tally, self.weights)
                error = [[scale * max(0, value - low)], [scale * max(0, high - value)]]
                axis.barh(place, scale * value, xerr=error, color=COLOURS[rows[0].kind], ecolor="#52525b", capsize=2)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("less is better" if metric in self.lower else "per cent")
        axis.grid(axis="x", alpha=0.2)

    def _panel(self, axis, metric: str) -> None:
        swept = [row for row in self.rows if row.kind in ("noisy", "teacher") and "timestep" in row.settings]
        if not swept:
            return self._bars(axis, metric)
        scale = self._scale(metric)
        curves = {(row.kind, row.settings.get("ensemble"), row.label.split(",")[0]): [] for row in swept}
        for row in swept:
            curves[row.kind, row.settings.get("ensemble"), row.label.split(",")[0]].append(row)
        several = len({model for kind, _, model in curves if kind == "noisy"}) > 1
        styles = ["-", "--", ":", "-."]
        for number, ((kind, ensemble, model), runs) in enumerate(curves.items()):
            runs.sort(key=lambda row: row.settings["timestep"])
            bests = [best for row in runs if (best := self.best([row], metric))]
            if not bests:
                continue
            steps = [best.row.settings["timestep"] for best in bests]
            bounds = np.array([rate_interval(best.tally, self.weights) for best in bests]).T * scale
            label = (
                f"{model if several else 'noisy'}, {ensemble} noise{'s' if ensemble > 1 else ''}"
                if kind == "noisy"
                else "teacher, clean picture"
            )
            line_style = styles[number % 4] if kind == "noisy" else "-"
            values = [scale * best.tally.rate for best in bests]
            axis.plot(steps, values, line_style, color=COLOURS[kind], marker="o", ms=3.5, lw=1.5, label=label)
            if kind == "noisy" and number == 0:
                axis.fill_between(steps, *bounds, color=COLOURS[kind], alpha=0.1, lw=0)
        flat = [row for row in self.rows if row not in swept]
        labels = dict.fromkeys(row.label for row in flat)
        for number, label in enumerate(labels):
            rows = [row for row in flat if row.label == label]
            best = self.best(rows, metric)
            if best is None:
                continue
            kind, value = rows[0].kind, scale * best.tally.rate
            clean = kind == "clean"
            line = "-" if clean else styles[(number + 1) % 4]
            axis.axhline(value, color=COLOURS[kind], ls=line, lw=2.2 if clean else 1.1, label=label)
            if clean:
                low, high = rate_interval(best.tally, self.weights)
                axis.axhspan(scale * low, scale * high, color=COLOURS[kind], alpha=0.1, lw=0)
        axis.set_ylabel("less is better" if metric in self.lower else "per cent")
        axis.set_xlabel("timestep t of the noise")
        axis.grid(axis="y", alpha=0.2)

    def write(self, folder: str | os.PathLike, about: str, name: str = "results") -> list[Path]:
        """Writes NAME.json, NAME.md and NAME.png into a folder and returns their paths."""
        folder = Path(folder)
        paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_text(paths[0], text)
        write_text(paths[1], self.markdown(about))
        self.plot(paths[2])
        return paths


def _settings(row: Row) -> str:
    names = {"timestep": "t", "ensemble": "noises"}
    return ", ".join(f"{names.get(key, key)}={value}" for key, value in row.settings.items())


def _where(best: Best) -> dict:
    text = ", ".join(part for part in (best.row.label, best.map) if part)
    return dict(rate=best.tally.rate, label=best.row.label, map=best.map, **best.row.settings, text=text)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
