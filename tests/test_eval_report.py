"""Reports of metrics of which less is better, with a few leading metrics, and of several swept models."""

import json

import numpy as np
import pytest
from PIL import Image

from cleandift_backbones.evaluation.bootstrap import Tally
from cleandift_backbones.evaluation.report import Report, Row

pytest.importorskip("matplotlib")


def row(label, kind, rmse, share=0.5, **settings):
    ones = np.ones((50, 1))
    spread = 1 + 0.1 * np.sin(np.arange(50))[:, None]
    metrics = {"RMSE (m)": Tally(rmse * spread, ones), "delta": Tally(share * ones, ones), "other": Tally(ones, ones)}
    return Row(label, kind, {"us6": metrics}, settings)


def make(*rows):
    metrics = {key: key for key in ("RMSE (m)", "delta", "other")}
    lower = frozenset({"RMSE (m)"})
    return Report(list(rows), metrics, {}, main=("RMSE (m)", "delta"), lower=lower, unit="pictures")


def test_less_is_better_where_it_is():
    report = make(
        row("dift, t=1, 1 noise", "noisy", 0.9, 0.2, timestep=1, ensemble=1),
        row("dift, t=9, 1 noise", "noisy", 0.7, 0.4, timestep=9, ensemble=1),
        row("clean", "clean", 0.5, 0.3),
    )
    first, second = report.comparisons()
    assert first["noisy"]["timestep"] == 9 and first["difference"] == pytest.approx(-0.2, abs=0.01)
    words = report.verdicts()
    assert "**RMSE (m)**: clean wins by 0.2" in words[0] and "%" not in words[0] and "Clean 0.50" in words[0]
    assert "**delta**: clean loses by 10.0 points" in words[1] and second["noisy"]["rate"] == pytest.approx(0.4)
    lines = report.table().splitlines()
    assert "**0.50" in lines[-1] and "**40.0**" in lines[-2] and "other" not in lines[0]
    assert "| other | 100.0 [100.0, 100.0]" in report.long_table()
    text = report.markdown("# About")
    assert "## Everything measured" in text and "less is better: RMSE (m)." in text and "over pictures" in text


def test_worse_is_said_too():
    report = make(row("dift, t=1", "noisy", 0.4, timestep=1, ensemble=1), row("clean", "clean", 0.5))
    assert "**RMSE (m)**: clean loses by 0.1" in report.verdicts()[0]


def test_swept_models_get_curves_of_their_own(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *rest, **kw: drawn.append((kw["label"], x, y)) or plot(self, x, y, *rest, **kw)
    )
    report = make(
        row("a, t=1, 1 noise", "noisy", 0.9, timestep=1, ensemble=1),
        row("b, t=1, 1 noise", "noisy", 0.8, timestep=1, ensemble=1),
        row("a, t=5, 1 noise", "noisy", 0.6, timestep=5, ensemble=1),
        row("clean", "clean", 0.5),
    )
    paths = report.write(tmp_path, "# About", "depth")
    assert [path.name for path in paths] == ["depth.json", "depth.md", "depth.png"]
    (label, steps, values), (other, *_) = drawn[:2]
    assert (label, other) == ("a, 1 noise", "b, 1 noise") and steps == [1, 5] and values[0] > values[1] > 0.5
    assert json.loads(paths[0].read_text())["runs"][0]["timestep"] == 1 and Image.open(paths[2]).size[0] > 400
