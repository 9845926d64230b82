"""Every task from the command line, with a ResNet, a ViT and the package's own models, on small folders."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_emoji import load_tool
from test_eval_correspondence import spair  # noqa: F401 (a fixture)
from test_eval_depth import nyu  # noqa: F401
from test_eval_segmentation import pets, voc  # noqa: F401

from cleandift_backbones.cli import evaluate as command
from cleandift_backbones.evaluation.plans import make_plan
from cleandift_backbones.evaluation.tasks import segmentation

pytest.importorskip("matplotlib")
OTHERS = ["random:test_resnet", "random:test_vit"]


def evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tools/evaluate.py", *map(str, arguments)])
    load_tool("evaluate").main()


def results(folder, task):
    assert Image.open(folder / f"{task}.png").size[0] > 400
    text = (folder / f"{task}.md").read_text()
    assert "torch" in text and "95 % intervals" in text
    data = json.loads((folder / f"{task}.json").read_text())
    assert data["versions"]["timm"] and data["seed"] == 0 and f"tools/evaluate.py {task}" in data["command"]
    return data


@pytest.fixture
def classes(tmp_path):
    """Two classes that colour alone tells apart."""
    for split, count in (("train", 4), ("val", 3)):
        for name, colour in (("blue", (20, 20, 230)), ("red", (230, 20, 20))):
            (tmp_path / "classes" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((70, 70, 3), colour, np.uint8) + np.uint8(5 * i)
                Image.fromarray(pixels).save(tmp_path / "classes" / split / name / f"{i}.png")
    return tmp_path / "classes"


def test_correspondence(spair, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    common = ["--data", spair, "--size", 64, "--out", out, "--device", "cpu"]
    evaluate(monkeypatch, "correspondence", "--model", "pixels", *OTHERS, "cleandift_tiny", *common)
    data = results(out, "correspondence")
    assert [run["label"] for run in data["runs"]][-1] == "cleandift_tiny"
    metrics = data["runs"][0]["maps"]["pixels"]
    assert len(metrics) == 2 * 3 * 2 + 2 * 2 and "bbox@0.1 per point, cat" in metrics
    assert data["pairs"] == 3 and data["points"] == 6 and list(data["runs"][3]["maps"]) == ["us6"]
    assert "prompt 'A photo of a aeroplane.' and alike" in data["details"]["cleandift_tiny"]
    assert data["details"]["pixels"].startswith("no prompt")
    printed = capsys.readouterr().out
    assert "| test_vit, random weights |" in printed and "| PCK bbox@0.1 per point (%) |" in printed
    assert "PCK: the share of keypoints" in printed and "95 % intervals" in printed and "] map us6 |" in printed
    evaluate(monkeypatch, "correspondence", "--model", *OTHERS, *common, "--resize", "pad", "--soft-argmax", 5)
    assert results(out, "correspondence")["answer"].startswith("soft-argmax, window 5")


def test_a_sweep_of_noisy_models_against_the_clean_one(spair, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    evaluate(
        monkeypatch, "correspondence", "--model", "dift_tiny", "cleandift_tiny", "--map", "us3", "mid", "--data", spair,
        "--timesteps", "1,300", "--ensemble", "1,2", "--size", 64, "--out", out, "--prompt", "none",
    )  # fmt: skip
    data = results(out, "correspondence")
    swept = [(run.get("timestep"), run.get("ensemble")) for run in data["runs"]]
    assert swept == [(1, 1), (300, 1), (1, 2), (300, 2), (None, None)]
    assert set(data["runs"][0]["maps"]) == {"us3", "mid"} and len(data["comparisons"]) == 4
    assert "clean minus noisy" in capsys.readouterr().out or data["comparisons"][0]["difference"]


def test_knn_and_retrieval(classes, tmp_path, monkeypatch):
    out = tmp_path / "out"
    models = ["--model", "pixels", *OTHERS, "--size", 64, "--out", out]
    evaluate(monkeypatch, "knn", *models, "--data", classes, "--k", "1,3", "--weighted")
    data = results(out, "knn")
    assert data["runs"][0]["maps"]["pixels"]["kNN accuracy, k=3"]["rate"] == 1  # colour is all that pixels have
    assert data["train_pictures"] == 8 and data["val_pictures"] == 6
    evaluate(monkeypatch, "retrieval", *models, "--data", classes, "--k", "1,2")
    data = results(out, "retrieval")
    assert data["runs"][0]["maps"]["pixels"]["recall@1"]["rate"] == 1 and data["pictures"] == 6


def test_models_are_optimised_unless_told(classes, tmp_path, monkeypatch):
    """The cache keeps both kinds, and says so."""
    out, rates = tmp_path / "out", []
    given = [
        "--model",
        "cleandift_tiny",
        "--size",
        64,
        "--out",
        out,
        "--data",
        classes,
        "--k",
        1,
        "--prompt",
        "a shape",
    ]
    for more in ([], ["--no-optimize"]):
        evaluate(monkeypatch, "knn", *given, *more)
        rates.append(results(out, "knn")["runs"][0]["maps"]["mid"]["kNN accuracy, k=1"]["rate"])
    infos = [json.loads(path.read_text())["settings"] for path in (out / "features").glob("*/meta.json")]
    assert rates[0] == rates[1] and len({info["weights"] for info in infos}) == 1
    assert sorted(str(info.get("optimize")) for info in infos) == ["None", "exact"]


def test_segmentation(voc, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    arguments = ["--data", voc, "--size", 64, "--out", out, "--epochs", 2]
    evaluate(monkeypatch, "segmentation", "--model", *OTHERS, *arguments, "--map", "random:test_resnet=layer2")
    data = results(out, "segmentation")
    assert list(data["runs"][0]["maps"]) == ["layer2"] and list(data["runs"][1]["maps"]) == ["blocks.5"]
    assert 0 < data["runs"][0]["maps"]["layer2"]["pixel accuracy"]["rate"] <= 1 and data["empty_masks"] == 0


def test_segmentation_of_two_classes(pets, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As many classes as the data have: neither the probe nor the report knows others."""
    out = tmp_path / "out"
    arguments = ["--model", "pixels", "--data", pets, "--out", out, "--size", 64, "--epochs", 40, "--probe-batch", 2]
    evaluate(monkeypatch, "segmentation", *arguments, "--learning-rate", 0.1)
    data = results(out, "segmentation")
    assert data["classes"] == 2 and data["class_names"] == "background, pet (classes.txt)"
    found = data["runs"][0]["maps"]["pixels"]
    assert list(found) == ["mIoU", "pixel accuracy", "IoU, background", "IoU, pet"]
    mean = (found["IoU, background"]["rate"] + found["IoU, pet"]["rate"]) / 2
    assert found["mIoU"]["rate"] == pytest.approx(mean) and mean > 0.9
    assert "| features | mIoU of 2 classes (%) | pixel accuracy (%) |" in capsys.readouterr().out
    assert "| IoU, pet (%) |" in (out / "segmentation.md").read_text()
    (pets / "classes.txt").unlink()
    evaluate(monkeypatch, "segmentation", *arguments, "--classes", 3)
    data = results(out, "segmentation")
    assert data["classes"] == 3 and "class_names" not in data


def test_depth(nyu, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    arguments = ["--data", nyu, "--size", 64, "--out", out]
    evaluate(monkeypatch, "depth", "--model", *OTHERS, *arguments, "--epochs", 2)
    data = results(out, "depth")
    assert (
        data["runs"][0]["maps"]["layer3"]["RMSE (m)"]["rate"] > 0 and "less is better" in (out / "depth.md").read_text()
    )
    # A probe of zeros answers with the mean of the bins, 5.05 m, where the truth is 5 m.
    state = {"weight": torch.zeros(256, 112, 1, 1), "bias": torch.zeros(256)}
    save_file(state, tmp_path / "probe.safetensors")
    evaluate(monkeypatch, "depth", "--model", "cleandift_tiny", *arguments, "--probe", tmp_path / "probe.safetensors")
    found = results(out, "depth")["runs"][0]["maps"]["us6"]
    assert found["RMSE (m)"]["rate"] == pytest.approx(0.05, abs=1e-3) and found["delta < 1.25"]["rate"] == 1


def test_noise(classes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    evaluate(
        monkeypatch, "noise", "--model", "dift_tiny", "random:dift_tiny", "--map", "us3", "--data", classes,
        "--timesteps", "1,800",
        "--noises", 2, "--limit", 3, "--size", 64, "--out", out,
    )  # fmt: skip
    shares = json.loads((out / "noise.json").read_text())["shares"]
    assert [(s["model"], s["timestep"]) for s in shares] == [
        ("dift_tiny", 1), ("dift_tiny", 800), ("random:dift_tiny", 1), ("random:dift_tiny", 800)
    ]  # fmt: skip
    assert shares[0]["image"] > shares[1]["image"]
    for share in shares:
        low, high = share["intervals"]["image"]
        assert 0 <= low <= share["image"] <= high <= 1
    assert Image.open(out / "noise.png").size[0] > 300
    head = "| model | map | timestep t | picture alone (%) | both together (%) | noise alone (%) |"
    assert head in (out / "noise.md").read_text() and head in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knn", "--model", "resnet19"], "model 'resnet19' is unknown; did you mean"),
        (["knn", "--model", *OTHERS, "--map", "us6"], "random:test_resnet: map 'us6' is not one of act1"),
        (["knn", "--model", "pixels", "--k", "0"], "--k 0 is out of range"),
        (["knn", "--model", "pixels", "--k", "20"], "k = 20 neighbours of 8 pictures"),
        (["knn", "--model", "pixels", "--k", ""], "--k is empty"),
        (["knn", "--model", "dift_tiny", "--timesteps", "1,1000"], "--timesteps 1000 is out of range; give 0..999"),
        (["knn", "--model", "cleandift_tiny", "--timesteps", "1"], "--timesteps: cleandift_tiny adds no noise; leave"),
        (["knn", "--model", "pixels", "--weights", "pixels=nothing"], "expected MODEL=FILE with a file that is there"),
        (["knn", "--model", "pixels", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["knn", "--model", "pixels", "--prompt", "a cat", "--k", "1"], "pixels: none takes prompts"),
        (["segmentation", "--model", "pixels"], "neither layout (found train, val)"),
        (["segmentation", "--model", "pixels", "--classes", "1"], "--classes 1 is out of range; give 2..255"),
        (["depth", "--model", "pixels"], "no split 'train' of NYUv2 (found train, val)"),
        (["correspondence", "--model", "pixels"], "no pairs (found train, val); expected one of"),
        (["nkk", "--model", "pixels"], "argument TASK: invalid choice: 'nkk'"),
        (["noise", "--model", "pixels"], "pixels draws no noise; give dift_* models"),
        (["noise", "--model", "dift_tiny", "--ensemble", "2"], "unrecognized arguments: --ensemble 2"),
        (["knn", "--model", "pixels", "--map", "resnet51=us3"], "--map is given for resnet51, which is not among"),
        (
            ["knn", "--model", "pixels", "dift_sd21", "--k", "1"],
            "dift_sd21 cannot be loaded, because of unet: ",
        ),  # no weights: found before any work
        (["correspondence", "--model", "pixels", "--soft-argmax", "4"], "--soft-argmax 4 has no middle pixel"),
    ],
)
def test_bad_input(classes, tmp_path, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, *arguments, "--data", classes, "--out", tmp_path / "out")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()  # found before any work


def test_prompts_for_those_that_take_them(classes, tmp_path, monkeypatch):
    models = ["pixels", "cleandift_tiny"]
    evaluate(
        monkeypatch, "retrieval", "--models", *models, "--data", classes, "--k", 1, 2, "--prompt", "a cat",
        "--maps", "cleandift_tiny=mid", "--size", 64, "--out", tmp_path,
    )  # fmt: skip
    data = results(tmp_path, "retrieval")
    assert data["details"]["pixels"].startswith("no prompt (it takes none)")
    assert data["details"]["cleandift_tiny"].startswith("prompt 'a cat'")
    assert list(data["runs"][1]["maps"]) == ["mid"] and list(data["runs"][0]["maps"]["pixels"]) == [
        "recall@1",
        "recall@2",
    ]


@pytest.mark.parametrize("arguments", [[], ["--data", "photos"], ["--model", "pixels", "--data", "photos", "knn"]])
def test_a_forgotten_task_is_asked_for(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "no TASK was given" in error and "--suite emoji" in error
    assert all(task in error for task in command.TASKS)


@pytest.mark.parametrize("arguments", [["--help"], ["noise", "--help"], ["knn", "--help"], ["correspondence", "-h"]])
def test_help_teaches(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, *arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text and "default: []" not in text and "default: False" not in text
    assert "/emoji_eyes.json" not in text
    if arguments == ["--help"]:
        assert all(f" {task} " in text for task in ("correspondence", "knn", "retrieval", "--suite"))


def test_lists_take_commas_and_spaces():
    told = ["--model", "pixels", "--data", "x", "--timesteps", "1,50", "100", "--k", "1", "5,10"]
    args = command.parser().parse_args(["knn", *told])
    assert args.timesteps == [1, 50, 100] and args.k == [1, 5, 10]


def test_out_of_memory_in_a_probe_names_its_flag(voc, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(segmentation, "train_segmenter", full)
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "segmentation", "--model", "pixels", "--data", voc, "--out", tmp_path / "out")
    assert stop.value.code == 2 and "out of memory; lower --probe-batch" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named(classes, tmp_path, monkeypatch, capsys):
    (classes / "train/red/0.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", "--model", "pixels", "--data", classes, "--out", tmp_path / "out", "--k", 1)
    assert "1 of 14 pictures cannot be used, the first: " in capsys.readouterr().err


def test_noisy_models_in_folders_and_maps_with_commas(tmp_path):
    """A model's folder says whether it adds noise, not its name."""
    import timm

    from cleandift_backbones.publish.card import save_folder

    save_folder(timm.create_model("dift_tiny", features_only=True), tmp_path / "mine")
    name = f"local-dir:{tmp_path / 'mine'}"
    told = ["knn", "--model", name, "test_cleandift", "--data", "x", "--timesteps", "1,50", "--map", "us6,mid"]
    plan = make_plan(command.parser().parse_args(told))
    found = [(run.name, run.settings.get("timestep")) for run in plan]
    assert found == [(name, 1), (name, 50), ("test_cleandift", None)]
    assert all(run.maps == ["us6", "mid"] for run in plan)
