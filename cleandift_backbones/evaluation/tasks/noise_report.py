"""The noise share as JSON, as a Markdown table and as a plot over the timestep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.atomic import replacing, write_text
from ..report import facts_list, versions

ABOUT = """# The noise in noisy features

Of the variance of a noisy feature over pictures and noises: the part that the picture decides whatever the noise, the
part that the noise decides whatever the picture, and the part that only both together decide, with 95 % intervals over
the choice of pictures (jackknife). Two-way decomposition, see `cleandift_backbones.evaluation.tasks.noise`."""
PARTS = {"image": "#c2410c", "both": "#a1a1aa", "noise": "#1d4ed8"}
NAMES = {"image": "picture alone", "both": "both together", "noise": "noise alone"}


@dataclass
class Shares:
    """Parts of a noisy feature's variance, each 0..1, together 1: image, noise, and what both do only together.

    `intervals` holds the 95 % interval of each over the choice of images, by the part's name; none of two images.
    """

    image: float
    noise: float
    both: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


Entry = tuple[str, str, int, Shares]  # model, map, timestep


def write_shares(folder: str | Path, entries: Sequence[Entry], info: dict) -> list[Path]:
    """Writes noise.json, noise.md and noise.png and returns their paths."""
    folder = Path(folder)
    paths = [folder / f"noise.{ending}" for ending in ("json", "md", "png")]
    shares = [dict(model=m, map=name, timestep=t, **vars(share)) for m, name, t, share in entries]
    write_text(paths[0], json.dumps(dict(info, versions=versions(), shares=shares), indent=1) + "\n")
    facts = facts_list(info | dict(versions=versions()))
    write_text(paths[1], "\n".join([ABOUT, "", shares_table(entries), "", "## How it was made", "", facts]) + "\n")
    _plot(paths[2], entries)
    return paths


def shares_table(entries: Sequence[Entry]) -> str:
    """A Markdown table: a line per model, map and timestep, per cent of the variance with 95 % intervals."""
    lines = [f"| model | map | timestep t | {' | '.join(f'{name} (%)' for name in NAMES.values())} |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for model, name, step, s in entries:
        lines.append(f"| {model} | {name} | {step} | " + " | ".join(_cell(s, part) for part in NAMES) + " |")
    return "\n".join(lines)


def _cell(share: Shares, part: str) -> str:
    low_high = share.intervals.get(part)
    told = f" [{', '.join(f'{100 * bound:.1f}' for bound in low_high)}]" if low_high else ""
    return f"{100 * getattr(share, part):.1f}{told}"


def _borders(share: Shares) -> list[tuple[float, float, float]]:
    """(height, down, up) in per cent of the intervals at the two borders between parts, from below."""
    if not share.intervals:
        return []
    low, high = share.intervals["image"]
    least, most = share.intervals["noise"]
    below, above = share.image, 1 - share.noise
    found = [(below, below - low, high - below), (above, most - share.noise, share.noise - least)]
    return [tuple(100 * max(0, value) for value in one) for one in found]


def _plot(path: Path, entries: Sequence[Entry]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str], list[tuple[int, Shares]]] = {}
    for model, name, step, share in entries:
        panels.setdefault((model, name), []).append((step, share))
    maps = len({name for _, name in panels})
    columns = maps if 1 < maps <= 3 else min(3, len(panels))  # a row per model where that fits
    rows = -(-len(panels) // columns)
    size = (max(5.6, 3.6 * columns), 0.4 + 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis, ((model, name), found) in zip(axes.flat, panels.items()):
        found.sort(key=lambda pair: pair[0])
        steps = [step for step, _ in found]
        heights = [[100 * getattr(share, part) for _, share in found] for part in PARTS]
        if len(steps) > 1:
            axis.stackplot(steps, heights, colors=PARTS.values(), labels=NAMES.values(), alpha=0.85)
            axis.set_xlim(steps[0], steps[-1])
        else:
            bottom = 0.0
            for (part, colour), (height,) in zip(PARTS.items(), heights):
                axis.bar(str(steps[0]), height, bottom=bottom, color=colour, label=NAMES[part])
                bottom += height
        for place, (_, share) in zip(steps if len(steps) > 1 else [0], found):
            for height, *error in _borders(share):
                bars = [[value] for value in error]
                axis.errorbar([place], [height], bars, fmt="none", ecolor="#18181b", capsize=2, lw=1, clip_on=False)
        axis.set_ylim(0, 100)
        axis.set_title(f"{model}, {name}", loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("timestep t of the noise")
    for axis in axes[:, 0]:
        axis.set_ylabel("per cent of the variance")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1), h_pad=1.5)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=160, format="png")
    plt.close(figure)
