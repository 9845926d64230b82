"""The files of version 0.1.0 in tests/fixtures are read, and give the numbers recorded beside them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import make
from safetensors.torch import load_file

from cleandift_backbones.features import Features, extractor
from cleandift_backbones.models.latents import LatentEncoder

NUMBERS = json.loads((make.HERE / "recorded.json").read_text())
TENSORS = load_file(make.HERE / "recorded.safetensors")
FILES = ("folders", "hub", "training", "extraction", "evaluation", "train_vae", "native.safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixtures, in the working directory: what they hold names files relative to it."""
    for name in FILES:
        source = make.HERE / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    make.set_times(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def passes(monkeypatch):
    """Counts the images that go through models."""
    counted, call = [], extractor.Extractor.__call__
    monkeypatch.setattr(extractor.Extractor, "__call__", lambda self, x: counted.append(len(x)) or call(self, x))
    return counted


def compare(found, prefix):
    """All of the recorded maps of a fixture, and no others; other processors round otherwise."""
    expected = {name.removeprefix(prefix): one for name, one in TENSORS.items() if name.startswith(prefix)}
    assert sorted(found) == sorted(expected) and found
    for name, one in found.items():
        torch.testing.assert_close(one.float(), expected[name], rtol=1e-3, atol=1e-4, msg=f"{prefix}{name}")


def mean_difference(one, other):
    """Mean, not largest: Adam's steps have the size of the rate for the smallest gradients too."""
    return float((one.float() - other.float()).abs().mean())


# --- weights ---


def test_a_native_file(folder):
    compare(make.native_file(), "native/")


@pytest.mark.parametrize("name", make.FOLDERS)
def test_native_folders(folder, name):
    compare(make.maps_of_folder(name), f"{name}/")


def test_default_maps_of_a_truncated_folder(folder):
    assert list(make.maps_of("local-dir:folders/truncated")) == ["us6", "us3", "mid"]


def test_a_repository_on_the_hub(folder, hub):
    hub.place("me/classifier", {path.name: path.read_bytes() for path in Path("hub").iterdir()})
    for place in ("hf-hub:me/classifier", "local-dir:hub"):
        torch.testing.assert_close(make.logits(place), TENSORS["logits"], rtol=1e-3, atol=1e-4)
    assert 'timm.create_model("hf-hub:me/classifier"' in Path("hub/README.md").read_text()


# --- training ---


def test_a_training_goes_on_with_its_cached_latents(folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("used although all latents are cached")

    monkeypatch.setattr(LatentEncoder, "forward", refuse)
    with make.known_place(folder):
        assert make.finetune() == 0
    assert "run: from step 2 to step 4" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("training/run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert losses == pytest.approx(NUMBERS["losses"], abs=1e-3)
    trained = load_file("training/run/native/model.safetensors")
    assert trained.keys() == load_file("folders/heads/model.safetensors").keys()
    for name in ("timestep", "unet.conv_in.weight"):
        assert mean_difference(trained[name], TENSORS[f"trained/{name}"]) < 1e-4


def test_a_training_of_the_small_vae_goes_on(folder):
    assert make.call(make.tool("train_vae").main, "train_vae", make.TRAIN_VAE) == 0
    lines = [json.loads(line) for line in Path("train_vae/run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    weights = load_file("train_vae/run/vae/diffusion_pytorch_model.safetensors")
    assert (
        mean_difference(weights["encoder.conv_in.weight"], TENSORS["train_vae"]) < 3e-4
    )  # bfloat16 on some processors


# --- extraction ---


@pytest.mark.parametrize("name", make.STORES)
def test_a_store_is_read_and_finished(folder, passes, capsys, name):
    """One of two parts is finished: nothing is to do for it, and the other one completes the store."""

    def read():
        store = Features(f"extraction/{name}")
        assert store.maps == ["us6", "mid"] and not store.failures
        return {f"{one['key']}/{m}": one[m] for one in store for m in store.maps}

    half = read()
    assert [key for key in half if key.endswith("mid")] == ["a/0.png/mid", "b/1.png/mid"]
    make.extract(name, "--part", "0/2")
    assert not passes and "nothing to do" in capsys.readouterr().out
    make.extract(name, "--part", "1/2")
    whole = read()
    assert sum(passes) == 2 and all(torch.equal(half[key], whole[key]) for key in half)
    expected = {key: one for key, one in TENSORS.items() if key.startswith(f"{name}/")}
    assert sorted(expected) == sorted(f"{name}/{key}" for key in whole)
    eps = torch.finfo(whole["b/1.png/mid"].dtype).eps
    for key, one in whole.items():
        torch.testing.assert_close(one.float(), expected[f"{name}/{key}"], rtol=max(2 * eps, 1e-3), atol=1e-3)


# --- evaluation ---


@pytest.mark.parametrize("arguments", [make.EMOJI, make.PHOTOS], ids=["emoji", "photos"])
def test_finished_rows_are_taken(folder, capsys, arguments):
    suite = arguments[1]
    found = make.rows_of(make.evaluate(arguments))
    lines = "".join(capsys.readouterr()).splitlines()
    for row in ("cleandift_tiny", "pixels, 32 x 32"):
        assert any(row in line and "taken from" in line for line in lines)
    assert found == NUMBERS["rows"][suite]


def test_cached_features_of_an_evaluation_are_computed_again(folder, passes):
    """Version 0.1.0 kept them in another form: its files stay, and the numbers are the same."""
    before = {path: path.read_bytes() for path in Path("evaluation/cache").rglob("*") if path.is_file()}
    assert make.rows_of(make.evaluate(make.CORRESPONDENCE)) == NUMBERS["rows"]["correspondence"]
    assert sum(passes) == 2 and all(path.read_bytes() == data for path, data in before.items())
    make.evaluate(make.CORRESPONDENCE)
    assert sum(passes) == 2
