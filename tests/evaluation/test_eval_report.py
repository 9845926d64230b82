"""Reports of metrics of which less is better, with a few leading metrics, and of several swept models."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from cleandift_backbones.evaluation.bootstrap import Tally
from cleandift_backbones.evaluation.plots import write_report
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
    assert "| other (%) | 100.0 [100.0, 100.0] map us6 |" in report.long_table()
    text = report.markdown("# About")
    assert "## Everything measured" in text and "less is better: RMSE (m)." in text and "over pictures" in text


def spread(label, kind, shares, timestep=None):
    """Rows whose shares vary over 50 units, each by as much as the number after it says."""
    noise = np.sin(np.arange(50) * 2 * np.pi / 50)[:, None]
    tallies = {name: Tally(rate + width * noise, np.ones((50, 1))) for name, (rate, width) in shares.items()}
    return Row(label, kind, {"us6": tallies}, {} if timestep is None else dict(timestep=timestep))


def bold(table):
    return re.findall(r"\*\*([\d.]+)\*\*", table)


def test_bold_is_what_beats_every_other_model():
    metrics = dict(close="close", clear="clear")
    clean = spread("clean", "clean", dict(close=(0.51, 0.3), clear=(0.8, 0.1)))
    noisy = spread("noisy, t=1", "noisy", dict(close=(0.5, -0.3), clear=(0.5, 0.1)), 1)
    report = Report([clean, noisy], metrics, {})
    words = report.verdicts()
    assert "no clear winner" in words[0] and "clean wins" in words[1]
    assert bold(report.table()) == bold(report.long_table()) == ["80.0"]
    # Nothing to win over: one model, also one that was swept.
    assert not bold(Report([clean], metrics, {}).table()) and not bold(Report([clean], metrics, {}).long_table())
    swept = spread("noisy, t=9", "noisy", dict(clear=(0.9, 0.1)), 9)
    assert not bold(Report([noisy, swept], metrics, {}).table())
    # One of a sweep may win although another of its timesteps is as good.
    again = spread("noisy, t=8", "noisy", dict(clear=(0.9, 0.1)), 8)
    assert "clean loses" in Report([clean, swept, again], dict(clear="clear"), {}).verdicts()[0]
    assert bold(Report([clean, swept, again], dict(clear="clear"), {}).table()) == ["90.0"]
    # A third model that is as good as the best leaves no winner.
    vit = spread("vit", "baseline", dict(clear=(0.8, 0.1)))
    assert not bold(Report([clean, noisy, vit], metrics, {}).table())


def test_columns_and_cells_say_what_they_are():
    report = make(row("clean", "clean", 0.5), row("dift, t=1", "noisy", 0.9, timestep=1))
    table = report.table().splitlines()
    assert table[0] == "| features | RMSE (m) | delta (%) |" and table[2].endswith("| 50.0 [50.0, 50.0] map us6 |")
    assert "95 % intervals" in report.legend() and "the map of the best value" in report.legend()
    assert "per cent" in report.legend() and "Bold" not in make(row("clean", "clean", 0.5)).legend()
    units = report.to_json()["units"]
    assert units == {"RMSE (m)": "as named", "delta": "share, 0..1", "other": "share, 0..1"}


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
    paths = write_report(report, tmp_path, "# About", "depth")
    assert [path.name for path in paths] == ["depth.json", "depth.md", "depth.png"]
    (label, steps, values), (other, *_) = drawn[:2]
    assert (label, other) == ("a, 1 noise", "b, 1 noise") and steps == [1, 5] and values[0] > values[1] > 0.5
    assert json.loads(paths[0].read_text())["runs"][0]["timestep"] == 1 and Image.open(paths[2]).size[0] > 400


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: names of matplotlib's calls, with their labels."""
    from matplotlib.axes import Axes

    calls = []
    for name in ("plot", "fill_between", "axhline", "axhspan", "barh"):
        real = getattr(Axes, name)

        def call(self, *args, real=real, name=name, **kwargs):
            calls.append((name, kwargs.get("label"), kwargs.get("xerr")))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Axes, name, call)
    return calls


def test_one_timestep_is_drawn_as_bars_with_intervals(tmp_path, drawn):
    report = make(row("a, t=261, 8 noises", "noisy", 0.9, timestep=261, ensemble=8), row("clean", "clean", 0.5))
    write_report(report, tmp_path, "# About")
    assert [call[0] for call in drawn] == ["barh"] * 4 and all(call[2] for call in drawn)


def test_every_sweep_is_a_curve_with_a_band_and_every_line_has_one(tmp_path, drawn):
    swept = [
        row(f"{name}, t={step}, {count} noises", kind, 0.5 + 0.01 * step, timestep=step, ensemble=count)
        for name, kind in (("a", "noisy"), ("random:a", "control"))
        for count in (2, 8)
        for step in (1, 5)
    ]
    write_report(make(*swept, row("pixels", "baseline", 0.7), row("clean", "clean", 0.5)), tmp_path, "# About")
    panel = drawn[: len(drawn) // 2]
    assert [call[1] for call in panel if call[0] == "plot"] == [
        "a, 2 noises", "a, 8 noises", "random:a, 2 noises", "random:a, 8 noises"
    ]  # fmt: skip
    assert [call[1] for call in panel if call[0] == "axhline"] == ["pixels", "clean"]
    assert [call[0] for call in panel].count("fill_between") == 4
    assert [call[0] for call in panel].count("axhspan") == 2


def test_maps_of_every_model_are_told():
    several = [row("resnet", "baseline", 0.5), row("vit", "control", 0.3), row("dift, t=1", "noisy", 0.4, timestep=1)]
    several.append(row("dift, t=5", "noisy", 0.2, timestep=5))
    for one in several:
        one.results["layer2"] = row("", "", 0.9).results["us6"]
    several[1].results["blocks.2"] = several[1].results.pop("us6")
    table = make(*several).map_table("RMSE (m)").splitlines()
    assert table[0] == "| RMSE (m) | us6 | layer2 |" and table[2].startswith("| resnet | 0.50")
    assert table[3].startswith("| dift, best run | 0.20") and table[3].endswith(table[2][-9:])
    assert table[5] == "| RMSE (m) | layer2 | blocks.2 |" and table[7].startswith("| vit | 0.9")
    assert "## By map" in make(*several).markdown("") and "## By map" not in make(row("a", "clean", 1)).markdown("")
    made = make(row("a", "clean", 1)).markdown("")
    assert "- versions:\n  - python: " in made and "{" not in made
