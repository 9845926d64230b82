"""The noise share as JSON, as a Markdown table and as a plot over the timestep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing, write_text
from .noise import Shares
from .report import versions

ABOUT = """# The noise in noisy features

Of the variance of a noisy feature over pictures and noises: the part that the picture decides whatever the noise, the
part that the noise decides whatever the picture, and the part that only both together decide. Two-way decomposition,
see `cleandift_backbones.evaluation.noise`."""
PARTS = {"image": "#c2410c", "both": "#a1a1aa", "noise": "#1d4ed8"}
NAMES = {"image": "picture alone", "both": "both together", "noise": "noise alone"}
Entry = tuple[str, str, int, Shares]  # model, map, timestep


def write_shares(folder: str | Path, entries: Sequence[Entry], info: dict) -> list[Path]:
    """Writes noise.json, noise.md and noise.png and returns their paths."""
    folder = Path(folder)
    paths = [folder / f"noise.{ending}" for ending in ("json", "md", "png")]
    shares = [dict(model=m, map=name, timestep=t, **vars(share)) for m, name, t, share in entries]
    write_text(paths[0], json.dumps(dict(info, versions=versions(), shares=shares), indent=1) + "\n")
    lines = ["| model | map | t | picture alone | noise alone | both together |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for model, name, step, s in entries:
        lines.append(f"| {model} | {name} | {step} | {s.image:.1%} | {s.noise:.1%} | {s.both:.1%} |")
    facts = [f"- {key}: {value}" for key, value in (info | dict(versions=versions())).items()]
    write_text(paths[1], "\n".join([ABOUT, "", *lines, "", "## How it was made", "", *facts]) + "\n")
    _plot(paths[2], entries)
    return paths


def _plot(path: Path, entries: Sequence[Entry]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str], list[tuple[int, Shares]]] = {}
    for model, name, step, share in entries:
        panels.setdefault((model, name), []).append((step, share))
    figure, axes = plt.subplots(1, len(panels), figsize=(max(5.6, 3.6 * len(panels)), 3.4), squeeze=False, sharey=True)
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
        axis.set_ylim(0, 100)
        axis.set_title(f"{model}, {name}", loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("timestep t of the noise")
    axes.flat[0].set_ylabel("per cent of the variance")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    with replacing(path) as aside:
        figure.savefig(aside, dpi=160, format="png")
    plt.close(figure)
