"""A report as files, with a plot (by matplotlib): curves over the timestep where there are several, bars otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..utils.atomic import replacing, write_text
from .report import Report, Row

COLOURS = {  # a kind's models, one after another
    "clean": ("#c2410c", "#eab308", "#be185d"),
    "noisy": ("#1d4ed8", "#0891b2", "#7c3aed"),
    "teacher": ("#0f766e", "#65a30d"),
    "baseline": ("#6b7280", "#a8a29e"),
    "control": ("#a1a1aa", "#94a3b8"),
}
LINES = ("-", "--", ":", "-.")


def write_report(report: Report, folder: str | os.PathLike, about: str, name: str = "results") -> list[Path]:
    """Writes NAME.json, NAME.md and NAME.png into a folder and returns their paths."""
    folder = Path(folder)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_text(paths[0], json.dumps(report.to_json(), indent=1) + "\n")
    write_text(paths[1], report.markdown(about))
    plot(report, paths[2])
    return paths


def plot(report: Report, path: Path) -> None:
    """A panel per main metric, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = _curves(report)
    swept = any(len({row.settings.get("timestep") for row in rows}) > 1 for rows in curves.values())
    names = list(dict.fromkeys(row.label for row in report.rows))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        columns = 3 if len(report.shown) == 3 else min(2, len(report.shown))
        rows = -(-len(report.shown) // columns)
        # bars stand in rows of their own height beside their names, which need room
        width = 4.6 if swept else 3.4 + 0.065 * max(map(len, names))
        height = 3.1 if swept else 0.9 + 0.28 * len(names)
        size = (max(6.0, width * columns), height * rows)
        legend, entries = 0.0, {}
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axis, (metric, heading) in zip(axes.flat, report.shown.items()):
            if swept:
                _draw_curves(axis, report, metric, curves)
                entries |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
            else:
                _draw_bars(axis, report, metric, names)
            axis.set_title(heading, loc="left", fontweight="bold")
        for axis in axes.flat[len(report.shown) :]:
            axis.remove()
        if swept:
            across = max(1, min(3, int(size[0] // (0.6 + 0.075 * max(map(len, entries))))))
            legend = 0.15 + 0.19 * -(-len(entries) // across)
            figure.set_size_inches(size[0], size[1] + legend)
            figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=across, frameon=False)
        figure.tight_layout(rect=(0, legend / (size[1] + legend), 1, 1), h_pad=2, w_pad=2)
        with replacing(path) as aside:
            figure.savefig(aside, dpi=160, format="png")
        plt.close(figure)


def _curves(report: Report) -> dict[tuple[str, int | None], list[Row]]:
    """Rows of one model and ensemble, by rising timestep; those without a timestep alone."""
    curves: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: row.settings.get("timestep", 0)):
        curves.setdefault((row.series, row.settings.get("ensemble")), []).append(row)
    order = [(row.series, row.settings.get("ensemble")) for row in report.rows]
    return {key: curves[key] for key in dict.fromkeys(order)}


def _colours(report: Report) -> dict[str, str]:
    """A model's colour is its kind's, in shades."""
    colours, used = {}, dict.fromkeys(COLOURS, 0)
    for row in report.rows:
        if row.series not in colours:
            shades = COLOURS[row.kind]
            colours[row.series] = shades[used[row.kind] % len(shades)]
            used[row.kind] += 1
    return colours


def _draw_curves(axis, report: Report, metric: str, curves: dict) -> None:
    scale, colours = report.scale(metric), _colours(report)
    ensembles = list(dict.fromkeys(count for _, count in curves if count is not None))
    # Of all rows, so that a line looks the same in every panel, also where others are missing.
    flat = [series for (series, _), rows in curves.items() if "timestep" not in rows[0].settings]
    for (series, count), rows in curves.items():
        bests = [best for row in rows if (best := report.best([row], metric))]
        if not bests:
            continue
        values = [scale * best.tally.rate for best in bests]
        bounds = [[scale * bound for bound in report.interval(best.tally)] for best in bests]
        lows, highs = zip(*bounds)
        kind, colour = rows[0].kind, colours[series]
        if "timestep" in rows[0].settings:
            steps = [best.row.settings["timestep"] for best in bests]
            noises = "" if count is None else f", {count} noise{'s' if count > 1 else ''}"
            line = "-" if count is None else LINES[ensembles.index(count) % 4]
            axis.plot(steps, values, ls=line, color=colour, marker="o", ms=3.5, lw=1.5, label=series + noises)
            axis.fill_between(steps, lows, highs, color=colour, alpha=0.09, lw=0)
        else:
            best = report.best(rows, metric)
            value, (low, high) = scale * best.tally.rate, report.interval(best.tally)
            clean = kind == "clean"
            line = "-" if clean else LINES[(flat.index(series) + 1) % 4]
            axis.axhline(value, color=colour, ls=line, lw=2.2 if clean else 1.1, label=series)
            axis.axhspan(scale * low, scale * high, color=colour, alpha=0.1 if clean else 0.06, lw=0)
    axis.set_ylabel("less is better" if metric in report.lower else "per cent")
    axis.set_xlabel("timestep t of the noise")
    axis.grid(axis="y", alpha=0.2)


def _draw_bars(axis, report: Report, metric: str, names: list[str]) -> None:
    scale, colours = report.scale(metric), _colours(report)
    for place, label in enumerate(names):
        rows = [row for row in report.rows if row.label == label]
        if best := report.best(rows, metric):
            value, (low, high) = scale * best.tally.rate, report.interval(best.tally)
            error = [[max(0, value - scale * low)], [max(0, scale * high - value)]]
            axis.barh(place, value, xerr=error, color=colours[rows[0].series], ecolor="#3f3f46", capsize=2, height=0.7)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("less is better" if metric in report.lower else "per cent")
    axis.grid(axis="x", alpha=0.2)
