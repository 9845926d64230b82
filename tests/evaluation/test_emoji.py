"""The emoji benchmark, its report and its command line."""

import importlib.util
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import plain_match

from cleandift_backbones.evaluation import cross_style, emoji, report
from cleandift_backbones.evaluation.bootstrap import Tally
from cleandift_backbones.evaluation.plots import write_report
from cleandift_backbones.features.extractor import extract, load_extractor

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the emoji suite --------------------------------------------------------------------------------------------------

EYES = [[0.3, 0.4], [0.75, 0.45]]  # not symmetric, so that a mirrored picture is told apart
RED, BLUE = (220, 20, 20), (20, 20, 220)


@pytest.fixture
def folder(tmp_path):
    """Five concepts in three styles; left eyes red, right eyes blue, on a body of the concept's own colour."""
    root, lines, marks = tmp_path / "data" / "heldout", [], {}
    for style, shift in (("noto", 0.0), ("flat", 0.06), ("bold", -0.06)):
        (root / style).mkdir(parents=True)
        for number in range(5):
            pixels = np.zeros((96, 96, 4), np.uint8)
            pixels[12:84, 6:90] = (40 * number + 40, 230 - 30 * number, 60, 255)
            eyes = [[x + shift, y] for x, y in EYES]
            for (x, y), colour in zip(eyes, (RED, BLUE), strict=True):
                pixels[round(y * 96) - 5 : round(y * 96) + 5, round(x * 96) - 5 : round(x * 96) + 5, :3] = colour
            Image.fromarray(pixels).save(root / style / f"C{number}.png")
            lines.append(
                dict(file_name=f"{style}/C{number}.png", text="", style=style, concept=f"C{number}", subgroup="")
            )
            if number < 3:
                marks.setdefault(f"C{number}", {})[style] = eyes
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (tmp_path / "eyes.json").write_text(json.dumps({"about": "", "eyes": marks}))
    return tmp_path


def read(folder, **kwargs):
    return emoji.load_suite(folder / "data", 96, folder / "eyes.json", **kwargs)


def test_suite_is_read(folder):
    suite = read(folder)
    assert suite.pictures.shape == (15, 3, 96, 96) and len(suite.eyes) == 9 and len(suite.names) == 5
    assert len(suite.eye_pairs()) == 3 * 6
    corner = (suite.pictures[:, :, 0, 0] * 255).round()
    assert (corner == torch.tensor(emoji.BACKGROUND)).all()
    some = read(folder, limit=2)
    assert len(some.names) == 2 and some.eye_pairs()


def test_suite_says_what_is_wrong(folder):
    with pytest.raises(emoji.SuiteError, match=r"metadata\.jsonl is missing; make the folder with .*make_pictures"):
        emoji.load_suite(folder / "nowhere", 96, folder / "eyes.json")
    (folder / "data/heldout/noto/C1.png").unlink()
    (folder / "data/heldout/noto/C2.png").unlink()
    with pytest.raises(emoji.SuiteError, match=r"2 of 15 pictures are missing, first noto/C1\.png"):
        read(folder)
    (folder / "eyes.json").write_text('{"eyes": {"C0": {"noto": [[0.5, 1.5], [0.1, 0.2]]}}}')
    with pytest.raises(emoji.SuiteError, match="C0 in noto .*within 0..1"):
        read(folder)
    (folder / "data/heldout/metadata.jsonl").write_text("{broken\n")
    (folder / "eyes.json").write_text('{"eyes": {}}')
    with pytest.raises(emoji.SuiteError, match="line 1: no JSON"):
        read(folder)


def test_placed_points_follow_the_pictures(folder):
    """After shrinking, moving and mirroring, the first point lies on the eye at the left, the second on the other."""
    suite = read(folder)
    indices = list(suite.eyes) * 4
    placed = emoji.place(suite, indices, random.Random(0), mirror=True)
    mirrored = 0
    for picture, points, length in zip(placed.pictures, placed.points, placed.lengths, strict=True):
        assert 0.6 * 96 - 1 <= length <= 0.9 * 96 + 1 and points[0, 0] < points[1, 0]
        colours = [picture[:, round(y), round(x)] * 255 for x, y in points.tolist()]
        is_red = [bool(colour[0] > 150 and colour[2] < 90) for colour in colours]
        is_blue = [bool(colour[2] > 150 and colour[0] < 90) for colour in colours]
        assert (is_red, is_blue) in (([True, False], [False, True]), ([False, True], [True, False]))
        mirrored += is_red[1]
    assert 0.25 * len(indices) < mirrored < 0.75 * len(indices)
    plain = emoji.place(suite, indices, random.Random(0), mirror=False)
    assert all(
        p[0, round(q[0, 1].item()), round(q[0, 0].item())] > 0.5
        for p, q in zip(plain.pictures, plain.points, strict=True)
    )


def test_benchmark_equals_loops_over_pairs(folder):
    suite = read(folder)
    benchmark = emoji.EmojiBenchmark(suite, placements=2, seed=3)
    torch.manual_seed(0)
    extractor = load_extractor("test_resnet", "layer1", pretrained=False, size=96)
    results = benchmark.run(extractor, batch_size=4, progress=False)["layer1"]

    def features(pictures):
        return extract(extractor, pictures, progress=False)["layer1"]

    def count(source_maps, target_maps, source_points, target_points, lengths):
        hits = 0
        for a, b in suite.eye_pairs():
            a, b = benchmark.eyed.index(a), benchmark.eyed.index(b)
            found, _ = plain_match(source_maps[a], target_maps[b], source_points[a], (96, 96), (96, 96))
            for p, t in zip(found.tolist(), target_points[b].tolist(), strict=True):
                hits += math.dist(p, t) <= 0.1 * lengths[b]
        return hits

    centred = features(suite.pictures[benchmark.eyed])
    points = [[(x * 96 - 0.5, y * 96 - 0.5) for x, y in suite.eyes[i].tolist()] for i in benchmark.eyed]
    expected = count(centred, centred, torch.tensor(points), torch.tensor(points), [96] * 9)
    assert results["eyes_centred"].hits.sum() == expected and results["eyes_centred"].trials.sum() == 36
    expected = sum(
        count(features(s.pictures), features(t.pictures), s.points, t.points, t.lengths.tolist())
        for s, t in zip(benchmark.sources, benchmark.targets, strict=True)
    )
    assert results["eyes_placed"].hits.sum() == expected and results["eyes_placed"].trials.sum() == 72
    hits = cross_style.cross_style_hits(cross_style.embed(features(suite.pictures)), suite.concepts, suite.styles)
    assert results["retrieval_pooled"].rate == pytest.approx(cross_style.retrieval_accuracy(hits))


def test_same_position_knows_centred_eyes_but_not_placed_ones(folder):
    tallies = emoji.EmojiBenchmark(read(folder), placements=8).same_position()
    # styles are shifted by 0, +0.06 and -0.06: within 0.1 for all pairs but the two that differ by 0.12
    assert tallies["eyes_centred"].rate == pytest.approx(4 / 6)
    assert tallies["eyes_placed"].rate < 0.4


def test_styles_get_noises_of_their_own(folder):
    class Noisy:
        name, maps, seeds, seed = "noisy", ("m",), [], 0

        def reseed(self, seed):
            self.seed = seed
            return True

        def __call__(self, pictures):
            self.seeds += [self.seed] * len(pictures)
            return {"m": pictures}

    suite = read(folder)
    noisy = Noisy()
    emoji.EmojiBenchmark(suite, seed=2).run(noisy, progress=False)
    assert sorted(set(noisy.seeds)) == [2000, 2001, 2002, 2100, 2101]
    assert noisy.seeds.count(2100) == noisy.seeds.count(2101) == len(suite.eyes)
    noisy.seeds.clear()
    emoji.EmojiBenchmark(suite, seed=2, independent_noise=False).run(noisy, progress=False)
    assert len(set(noisy.seeds)) == 1


# --- reports and the command line -------------------------------------------------------------------------------------


def rows():
    def result(rate):
        hits = (np.arange(100)[:, None] < 100 * rate).astype(float)
        return {"us6": {"eyes": Tally(hits, np.ones_like(hits))}, "mid": {"eyes": Tally(hits * 0, np.ones_like(hits))}}

    return [
        report.Row("dift, t=1", "noisy", result(0.3), dict(timestep=1, ensemble=1)),
        report.Row("dift, t=50", "noisy", result(0.4), dict(timestep=50, ensemble=1)),
        report.Row("teacher", "teacher", result(0.2), dict(timestep=1)),
        report.Row("teacher", "teacher", result(0.25), dict(timestep=50)),
        report.Row("clean", "clean", result(0.6)),
    ]


def test_report_says_who_wins(tmp_path):
    result = report.Report(rows(), {"eyes": "eye keypoints"}, dict(command="x", size=3))
    item = result.comparisons()[0]
    assert (
        item["difference"] == pytest.approx(0.2) and item["noisy"]["timestep"] == 50 and item["clean"]["map"] == "us6"
    )
    assert "clean wins by 20.0 points" in result.verdicts()[0]
    lines = result.table().splitlines()
    assert len(lines) == 2 + 4 and "**60.0**" in lines[-1] and "25.0" in lines[-2] and "t=50" in lines[-2]
    swapped = [*rows()[:-1], report.Row("clean", "clean", rows()[0].results)]
    assert "clean loses by 10.0 points" in report.Report(swapped, {"eyes": "e"}, {}).verdicts()[0]
    pytest.importorskip("matplotlib")
    paths = write_report(result, tmp_path / "new", "# About")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["results.json", "results.md", "results.png"]
    data = json.loads(paths[0].read_text())
    assert data["runs"][1]["maps"]["us6"]["eyes"]["rate"] == 0.4 and data["versions"]["torch"] and data["size"] == 3
    assert Image.open(paths[2]).size[0] > 500


def run_evaluate(monkeypatch, *arguments):
    tool = load_tool("evaluate")
    monkeypatch.setattr("sys.argv", ["tools/evaluate.py", "--suite", "emoji", *map(str, arguments)])
    tool.main()


def test_evaluate_makes_the_table(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out = folder / "out"
    models = ["pixels", "random:test_cleandift", "random:test_vit"]
    run_evaluate(
        monkeypatch, "--data", folder / "data", "--eyes", folder / "eyes.json", "--out", out, "--size", 64,
        "--models", *models, "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "| same position |" in printed and "| test_vit, random weights |" in printed
    data = json.loads((out / "results.json").read_text())
    assert [len(run["maps"]) for run in data["runs"]] == [1, 1, 11, 6]
    assert data["concepts"] == 5 and data["eye_pairs"] == 18 and data["command"].startswith("python tools/evaluate.py")
    # Other answers are other runs.
    lines = (folder / "data/heldout/metadata.jsonl").read_text()
    runs = len(list((out / "runs").iterdir()))
    (folder / "data/heldout/metadata.jsonl").write_text(lines.replace('"subgroup": ""', '"subgroup": "x"'))
    run_evaluate(
        monkeypatch, "--data", folder / "data", "--eyes", folder / "eyes.json", "--out", out, "--size", 64,
        "--models", "pixels", "--device", "cpu",
    )  # fmt: skip
    assert len(list((out / "runs").iterdir())) == runs + 1
    (folder / "data/heldout/metadata.jsonl").write_text(lines)
    # Started again, it takes every finished run from disk, with the same result.
    monkeypatch.setattr(emoji.EmojiBenchmark, "run", None)
    run_evaluate(
        monkeypatch, "--data", folder / "data", "--eyes", folder / "eyes.json", "--out", out, "--size", 64,
        "--models", *models, "--device", "cpu",
    )  # fmt: skip
    again = json.loads((out / "results.json").read_text())
    assert again["runs"] == data["runs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "resnet19"], "model 'resnet19' is unknown; did you mean"),
        (["--models", "random:test_vit", "--maps", "us6"], "map 'us6' is not one of blocks.0"),
        (["--timesteps", "1000"], "--timesteps 1000 is out of range; give 0..999"),
        (["--ensemble", "0"], "--ensemble 0 is out of range"),
        (["--models", "pixels", "test_resnet", "--ensemble", "8"], "--ensemble: pixels, test_resnet adds no noise"),
        (["--size", "32"], "--size 32 is out of range"),
        (["--student-weights", "nothing.safetensors"], "nothing.safetensors: no such file"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--models", "pixels", "--data", "nothing"], "metadata.jsonl is missing"),
        (["--models", "pixels", "--eyes", "nothing.json"], "nothing.json: not a JSON file of eye marks"),
    ],
)
def test_evaluate_refuses_before_work(folder, monkeypatch, capsys, arguments, words):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_evaluate(monkeypatch, "--data", folder / "data", "--out", folder / "out", *arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("evaluate.py: error: ") and words in error
    assert sorted(folder.rglob("*")) == before
