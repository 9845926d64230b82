"""tools/benchmark.py inference: every way gives the same map, and the report says what it measured."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import benchmark
from benchmarks import ways


@pytest.mark.slow
def test_report(tmp_path, capsys):
    names = ["whole", "dift", "timm", "optimized", "direct", "light"]
    command = "inference --model test_cleandift --size 64 128 --batch-size 1 2 --repeat 2 --threads 1 --clock cpu"
    benchmark.main([*command.split(), "--ways", *names, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "inference.json").read_text())
    assert len(found["rows"]) == 3 * len(names) and (tmp_path / "inference.png").stat().st_size > 5000
    assert (tmp_path / "inference.md").read_text() in capsys.readouterr().out
    case = {row["way"]: row for row in found["rows"] if (row["size"], row["batch"]) == (128, 1)}
    for way in ("whole", "timm", "optimized", "direct"):
        assert case[way]["apart"] < 1e-4 and case[way]["cosine"] > 0.99999 and len(case[way]["seconds"]) == 2
    assert "apart" not in case["dift"] and "apart" not in case["light"]  # other maps: of noise, of a random encoder
    assert {(row["size"], row["batch"]) for row in found["rows"]} == {(64, 1), (128, 1), (64, 2)}
    work = {way: row["gflop"] for way, row in case.items()}
    assert work["direct"] <= work["timm"] < work["whole"] < work["dift"]
    assert case["direct"]["weights"] < case["timm"]["weights"] < case["whole"]["weights"]


def test_the_noisy_way_is_dift():
    """The plain DIFT gives what this package's DIFT gives."""
    import timm

    weights = ways.Weights("dift_tiny", "us6", torch.device("cpu"))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        found, expected = ways.dift(weights)(x), weights.model(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert timm.create_model("dift_tiny", features_only=True, out_indices=(4,)).model.ensemble_size == 8


def test_a_noisy_first_way_is_no_reference(capsys, tmp_path):
    """The first way that computes the plain map is what others are compared with, whatever came before it."""
    command = "inference --model test_cleandift --size 64 --repeat 1 --return-memory --ways dift timm optimized --out"
    benchmark.main([*command.split(), str(tmp_path)])
    rows = {row["way"]: row for row in json.loads((tmp_path / "inference.json").read_text())["rows"]}
    assert "apart" not in rows["dift"] and rows["timm"]["apart"] == 0 and 0 < rows["optimized"]["apart"] < 1e-4
    assert "freed memory is returned" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_ways(monkeypatch, tmp_path):
    """Traced as ever, but run by torch's own operations: compiling them for the processor takes many minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    command = "inference --model test_cleandift --size 64 --repeat 1 --ways whole whole-compile compile optimized --out"
    benchmark.main([*command.split(), str(tmp_path)])
    rows = {row["way"]: row for row in json.loads((tmp_path / "inference.json").read_text())["rows"]}
    assert not torch._dynamo.utils.counters["graph_break"]
    assert rows["whole-compile"]["gflop"] == rows["whole"]["gflop"] > rows["compile"]["gflop"] > 0
    assert rows["compile"]["gflop"] == rows["optimized"]["gflop"]
    assert rows["whole-compile"]["apart"] < 1e-5 and rows["compile"]["apart"] < 1e-4


def test_ways_share_weights():
    weights = ways.Weights("test_cleandift", "us6", torch.device("cpu"))
    mine = {p.data_ptr() for p in ways.ours(weights).weights[0].parameters()}
    theirs = {p.data_ptr() for module in (weights.unet, weights.vae) for p in module.parameters()}
    assert mine <= theirs


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--map us11", "--map us11: there are mid, us1"),
        ("--clock cpu", "give --threads 1 with it"),
        ("--size 0", "must be at least 1"),
        ("--size 32", "--size 32: the models take pictures of 64 pixels or more"),
        ("--threads 0", "--threads must be at least 1"),
        ("--ways fastest", "invalid choice: 'fastest'"),
        ("--model resnet18", "'resnet18' is no model of this package, such as"),
        ("--model dift_tiny", "--model dift_tiny: give cleandift_tiny"),
        ("--model cleandift_tiny_pyramid", "--model cleandift_tiny_pyramid: give cleandift_tiny"),
        ("--file nowhere.safetensors", "--file nowhere.safetensors: no such file"),
        (f"--out {__file__}", "is a file, not a folder"),
    ],
)
def test_wrong_arguments(wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(ways, "optimize", None)  # told before anything is built
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["inference", "--model", "test_cleandift", *wrong.split()])
    assert stop.value.code not in (0, None) and message in capsys.readouterr().err + str(stop.value.code)


def test_what_is_given_twice_is_measured_once(tmp_path):
    command = "inference --model test_cleandift --size 64 64 --batch-size 1 1 --repeat 1 --ways timm timm --out"
    benchmark.main([*command.split(), str(tmp_path)])
    assert len(json.loads((tmp_path / "inference.json").read_text())["rows"]) == 1


def test_training_takes_one_size():
    with pytest.raises(SystemExit):
        benchmark.main(["training", "--size", "64", "128"])


def test_matching(tmp_path, capsys):
    benchmark.main(["matching", "--pairs", "40", "--repeat", "2", "--threads", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "matching.json").read_text())
    assert (found["pairs"], found["pictures"], len(found["seconds"])) == (40, 54, 2)
    assert 3 <= found["points"] <= 12 and "pairs/s" in capsys.readouterr().out
