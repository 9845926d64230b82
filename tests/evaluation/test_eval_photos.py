"""The photograph benchmark: its rows, its choice of map, size and timestep, its differences, and going on."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_emoji import load_tool

from cleandift_backbones.cli import evaluate_photos
from cleandift_backbones.data.sources import file_source
from cleandift_backbones.evaluation import runs as command
from cleandift_backbones.evaluation.bootstrap import Tally, difference, unit_weights
from cleandift_backbones.evaluation.features import FeatureStores
from cleandift_backbones.evaluation.report import Report, Row
from cleandift_backbones.features.extractor import load_extractor

pytest.importorskip("matplotlib")
SETS = ("animal_pose", "cub", "pf_willow")
MODELS = ["pixels", "random:cleandift_tiny", "dift_tiny", "cleandift_tiny"]


def write_set(folder, seed, images=3, **changes):
    """Smooth random images, all pairs of them, with the same points in both."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for i in range(images):
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8))
        small.resize((70, 60), Image.Resampling.BICUBIC).save(folder / f"images/{i}.png")
    points = rng.uniform(5, 55, (3, 2)).round(1).tolist()
    ends = [(a, b) for a in range(images) for b in range(images) if a != b]
    common = dict(source_points=points, target_points=points, category="cat", target_box=[2, 2, 62, 58])
    pairs = [dict(source=f"images/{a}.png", target=f"images/{b}.png", **common) | changes for a, b in ends]
    (folder / "pairs.json").write_text(json.dumps(pairs))


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(SETS):
        write_set(tmp_path / "eval" / name, seed)
    return tmp_path / "eval"


def evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tools/evaluate.py", *map(str, arguments)])
    load_tool("evaluate").main()


def run_photos(monkeypatch, data, out, *arguments, models=MODELS, sizes=(64,)):
    given = ["--data", data, "--out", out, "--models", *models, "--sizes", *sizes, "--maps", "us3", "us6"]
    evaluate(monkeypatch, "--suite", "photos", *given, "--device", "cpu", *arguments)
    return json.loads((out / "results.json").read_text())


def mean_of_choice(measured):
    return (measured["animal_pose"]["rate"] + measured["cub"]["rate"]) / 2


@pytest.fixture
def counted(monkeypatch):
    """The parts that are measured: (label, data set, size)."""
    measure, parts = command.measure, []

    def counting(args, planned, task, *rest, **kwargs):
        if len(parts) == counting.most:
            raise KeyboardInterrupt
        parts.append((planned.label, task.data.items[0].read().size, args.size))
        return measure(args, planned, task, *rest, **kwargs)

    counting.most, counting.parts = None, parts
    monkeypatch.setattr(command, "measure", counting)
    return counting


def test_rows_and_their_choice(data, tmp_path, monkeypatch, capsys):
    found = run_photos(monkeypatch, data, tmp_path / "out", "--timesteps", "1,300", "--ensemble", "2,1")
    runs = {(run["label"], run.get("timestep")): run for run in found["runs"]}
    noisy = [(f"dift_tiny, t={t}, {n}", t) for n in ("1 noise", "2 noises") for t in (1, 300)]
    teacher = "dift_tiny's UNet on the clean picture, best t"
    others = [("pixels, 32 x 32", None), ("cleandift_tiny, random weights", None)]
    place = runs.pop(("same position", None))
    assert all(value["rate"] == 1 for value in place["maps"][""].values())  # both images have the same points
    assert list(runs) == [*others, *noisy, (teacher, 1), (teacher, 300), ("cleandift_tiny", None)]
    combinations = {f"{name} at 64 px" for name in ("us3", "us6")}
    for (label, step), run in runs.items():
        searched = {name: maps for name, maps in run["maps"].items() if {"animal_pose", "cub"} <= set(maps)}
        assert set(searched) == set(run["maps"])
        if "2 noises" in label:  # at the map and size that the run with one noise has chosen
            assert list(run["maps"]) == [runs[f"dift_tiny, t={step}, 1 noise", step]["chosen"]]
        elif not label.startswith("pixels"):
            assert set(run["maps"]) == combinations
        best = max(run["maps"], key=lambda name: mean_of_choice(run["maps"][name]))
        assert run["chosen"] == best
        assert [name for name, maps in run["maps"].items() if "pf_willow" in maps] == [best]
    assert [item["metric"] for item in found["comparisons"]] == list(SETS)
    best = max((runs[key] for key in noisy[2:]), key=lambda run: mean_of_choice(run["maps"][run["chosen"]]))
    clean = runs["cleandift_tiny", None]
    for item in found["comparisons"]:
        assert item["noisy"]["label"] == best["label"] and item["noisy"]["map"] == best["chosen"]
        rates = [run["maps"][run["chosen"]][item["metric"]]["rate"] for run in (clean, best)]
        assert item["difference"] == pytest.approx(rates[0] - rates[1])
        assert item["interval"][0] <= item["difference"] <= item["interval"][1]
    assert found["chosen_on"] == "animal_pose, cub" and found["measured"] == "pf_willow" and found["seed"] == 0
    assert set(found["weights"]) == {"dift_tiny.safetensors", "cleandift_tiny.safetensors"}
    assert found["versions"]["torch"] and "--suite photos" in found["command"] and found["data"]["cub"]["pairs"] == 6
    printed = capsys.readouterr().out
    assert "| features | chosen | Animal-Pose (%) | CUB (%) | PF-WILLOW (%) |" in printed
    assert "chosen by the mean of Animal-Pose and CUB for all columns" in printed and "**PF-WILLOW**: " in printed
    text = " ".join((tmp_path / "out/results.md").read_text().split())
    assert "PF-WILLOW is only measured with that choice" in text and "at each timestep with 1 noise" in text
    assert Image.open(tmp_path / "out/results.png").size[0] > 1000
    assert not list((tmp_path / "out/features").iterdir())  # removed when they are measured


def test_sizes_are_chosen_too_and_the_task_gives_the_same_numbers(data, tmp_path, monkeypatch):
    _, clean = run_photos(monkeypatch, data, tmp_path / "out", models=["cleandift_tiny"], sizes=[64, 96])["runs"]
    assert set(clean["maps"]) == {f"{name} at {size} px" for name in ("us3", "us6") for size in (64, 96)}
    assert clean["chosen"] == max(clean["maps"], key=lambda name: mean_of_choice(clean["maps"][name]))
    name, _, size = clean["chosen"].partition(" at ")
    given = ["--map", name, "--size", size.split()[0], "--out", tmp_path / "task", "--device", "cpu"]
    evaluate(monkeypatch, "correspondence", "--model", "cleandift_tiny", "--data", data / "pf_willow", *given)
    task = json.loads((tmp_path / "task/correspondence.json").read_text())["runs"][0]["maps"][name]
    assert task["bbox@0.1 per point"] == clean["maps"][clean["chosen"]]["pf_willow"]


def test_the_measured_set_does_not_choose():
    def tallies(*rates):
        tally = [Tally(np.full((10, 1), rate), np.ones((10, 1))) for rate in rates]
        return dict(zip(SETS, tally, strict=True))

    maps = {"us3 at 64 px": tallies(0.4, 0.2, 0.9), "us6 at 64 px": tallies(0.3, 0.4, 0.1)}
    noisy = [
        Row("dift, t=1, 8 noises", "noisy", maps, dict(timestep=1, ensemble=8)),
        Row("dift, t=9, 8 noises", "noisy", {"us3 at 64 px": tallies(0.4, 0.4, 0.2)}, dict(timestep=9, ensemble=8)),
        Row("dift, t=9, 1 noise", "noisy", {"us3 at 64 px": tallies(0.9, 0.9, 0.9)}, dict(timestep=9, ensemble=1)),
    ]
    clean = Row("clean", "clean", maps)
    names = {name: name for name in SETS}
    report = Report([*noisy, clean], names, {}, chosen_on=SETS[:2], opponents=dict(ensemble=8))
    best = report.best([clean], "pf_willow")
    assert best.map == "us6 at 64 px" and best.tally.rate == pytest.approx(0.1)
    item = report.comparisons()[2]
    assert item["clean"]["map"] == "us6 at 64 px" and item["noisy"]["label"] == "dift, t=9, 8 noises"
    assert item["difference"] == pytest.approx(-0.1)
    assert "| clean | map us6 at 64 px | 30.0 [30.0, 30.0] | 40.0 [40.0, 40.0] | 10.0 [10.0, 10.0] |" in report.table()


def test_differences_are_paired_within_each_set():
    """Sets of other numbers of images have a bootstrap of their own."""
    rng = np.random.default_rng(0)

    def row(label, kind, shift, **settings):
        tallies = {}
        for name, count, common in zip(SETS, (30, 20, 40), shared, strict=True):
            hits = np.clip(common + shift + 0.01 * rng.normal(size=count), 0, 1)[:, None]
            tallies[name] = Tally(hits, np.ones((count, 1)))
        return Row(label, kind, {"m": tallies}, settings)

    shared = [rng.uniform(0.2, 0.8, count) for count in (30, 20, 40)]
    clean, noisy = row("clean", "clean", 0.05), row("dift, t=1", "noisy", 0, timestep=1, ensemble=8)
    report = Report([clean, noisy], {name: name for name in SETS}, {}, seed=3, chosen_on=SETS[:2])
    for item, count in zip(report.comparisons(), (30, 20, 40), strict=True):
        a, b = clean.results["m"][item["metric"]], noisy.results["m"][item["metric"]]
        expected = difference(a, b, unit_weights(count, seed=3))
        assert (item["difference"], *item["interval"]) == pytest.approx(expected)
        low, high = item["interval"]
        assert 0.04 < low < item["difference"] < high < 0.06  # the images' own spread, 0.17, cancels
    assert "clean wins by 5." in report.verdicts()[2]


def test_goes_on_where_it_stopped(data, tmp_path, monkeypatch, counted, capsys):
    given = (monkeypatch, data, tmp_path / "out", "--timesteps", "1", "--ensemble", "1")
    models = dict(models=["dift_tiny", "cleandift_tiny"])
    counted.most = 4
    with pytest.raises(SystemExit):
        run_photos(*given, **models)
    assert len(counted.parts) == 4 and not (tmp_path / "out/results.json").exists()
    counted.most, before = None, counted.parts.copy()
    first = run_photos(*given, **models)
    assert len(counted.parts) == 9 and counted.parts[:4] == before
    log = capsys.readouterr()
    assert "dift_tiny, t=1, 1 noise, timestep 1, ensemble 1: 3 of 3 parts are taken from" in log.out + log.err
    assert run_photos(*given, **models)["runs"] == first["runs"] and len(counted.parts) == 9
    finished = sorted((tmp_path / "out/runs").iterdir())
    # Only what a change concerns is measured again.
    write_set(tmp_path / "other", 9)
    again = run_photos(*given, "--measure", "pf_willow", tmp_path / "other", **models)
    assert len(counted.parts) == 9 + 3 and "other" in again["runs"][1]["maps"][again["runs"][1]["chosen"]]
    for path in finished[:2]:
        path.write_bytes(path.read_bytes()[:50])
    assert [run["maps"] for run in run_photos(*given, **models)["runs"]] == [run["maps"] for run in first["runs"]]
    assert len(list((tmp_path / "out/runs").glob("*.damaged"))) == 2


def test_other_weights_are_other_rows(data, tmp_path, monkeypatch, counted):
    run_photos(monkeypatch, data, tmp_path / "out", models=["cleandift_tiny"])
    state = load_file(timm.get_pretrained_cfg("cleandift_tiny").file)
    save_file({key: value * 1.5 for key, value in state.items()}, tmp_path / "other.safetensors")
    run_photos(
        monkeypatch,
        data,
        tmp_path / "out",
        "--student-weights",
        tmp_path / "other.safetensors",
        models=["cleandift_tiny"],
    )
    assert len(counted.parts) == 6


def test_random_weights_are_one_network(data, tmp_path, monkeypatch):
    """Fewer layers are drawn for fewer maps, and so other weights: all parts take the network of all maps."""
    built, load = [], command.load_model

    def loading(*args, **kwargs):
        built.append(load(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(command, "load_model", loading)
    run_photos(monkeypatch, data, tmp_path / "out", models=["random:cleandift_tiny"])
    assert len(built) == 4 and len({extractor.weights_digest() for extractor in built}) == 1


def test_other_models_have_all_their_maps(data, tmp_path, monkeypatch):
    found = run_photos(monkeypatch, data, tmp_path / "out", "--limit", 3, models=["random:test_resnet"])
    assert [name.split(" at ")[0] for name in found["runs"][1]["maps"]][-2:] == ["layer3", "layer4"]
    assert found["data"]["pf_willow"]["pairs"] == 3 and found["comparisons"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measure", "pf_pascal"], "pf_pascal: no pairs (found nothing)"),
        (["--maps", "us66"], "map 'us66' is not one of us10"),
        (["--sizes", "32"], "--sizes 32 is out of range; give 64..4096"),
        (["--timesteps", "1000"], "--timesteps 1000 is out of range"),
        (["--models", "pixels", "--ensemble", "8"], "--ensemble: pixels adds no noise"),
        (["--models", "cleandift_tiny.nowhere"], "cleandift_tiny.nowhere"),
        (["--student-weights", "nothing.safetensors"], "--student-weights nothing.safetensors: no such file"),
        (["--measure", "boxless"], "boxless: 2 of 2 pairs have no target_box"),
        (["--measure", "cub/../again/cub"], "two data sets are named cub"),
        (["--seite", "1"], "unrecognized arguments: --seite"),
    ],
)
def test_bad_input(data, tmp_path, monkeypatch, capsys, arguments, words):
    write_set(data / "boxless", 5, images=2, target_box=None)
    write_set(data / "again" / "cub", 6, images=2)
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--suite", "photos", "--data", data, "--out", tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suite", ["fotos", "--data=x"])
def test_suites_are_named(monkeypatch, capsys, suite):
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--suite", suite, "--data", "x")
    assert stop.value.code == 2 and "--suite" in capsys.readouterr().err


def test_help_teaches(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "--suite=photos", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--choose-on" in text and "default: None" not in text and "--placements" not in text


def test_features_are_removed_and_nothing_else(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    items = [file_source(tmp_path / "a.png", tmp_path)]
    cache = FeatureStores(tmp_path / "cache", progress=False)
    extractor = load_extractor("pixels", size=64)
    found = cache.features(extractor, items)
    assert found["pixels"][0].shape == (3, 32, 32)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "mine.safetensors").write_bytes(b"x")
    cache.remove(found)
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
    (folder / "mine.safetensors").unlink()
    found = cache.features(extractor, items)
    torch.testing.assert_close(found["pixels"][0][:, 0, 0], torch.tensor([1.0, -1, -1]))
    cache.remove(found)
    assert not folder.exists()


def test_the_default_rows():
    args = evaluate_photos.parser().parse_args(["--suite", "photos", "--data", "x"])
    assert args.models == MODELS and args.sizes == [128, 192, 256] and args.maps == []
    assert evaluate_photos.maps_of(args, "dift_tiny") == ["us3", "us5", "us6", "us7", "us8"]
    assert args.choose_on == ["animal_pose", "cub"] and args.measure == ["pf_willow"]
    assert len(evaluate_photos.TIMESTEPS) >= 6
