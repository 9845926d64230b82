"""The extraction as a Python call, and one list of images for it, for training and for evaluation."""

import dataclasses
import json
import pickle

import pytest
import torch
from extract_runs import extract as by_command
from extract_runs import make_pictures, same

from cleandift_backbones.data.sources import list_sources, list_training_sources
from cleandift_backbones.errors import CleanDIFTError, InputError, MissingFileError
from cleandift_backbones.evaluation.labelled import read_queries
from cleandift_backbones.features import ExtractConfig, Features, extract

SETTINGS = dict(model="random:test_cleandift", maps="us6", size=64, workers=0, device="cpu", progress=False)


def test_the_call_does_what_the_command_does(tmp_path):
    data, messages = make_pictures(tmp_path / "photos", 4), []
    report = extract(data, tmp_path / "call", ExtractConfig(**SETTINGS), log=messages.append)
    by_command(data, tmp_path / "command", "--size", 64, "--map", "us6")
    same(tmp_path / "call", tmp_path / "command")
    settings = [Features(tmp_path / name).meta["settings"] for name in ("call", "command")]
    assert settings[0] == settings[1] and report.pictures == 4 and "4 images" in report.lines[1] and not messages
    again = by_command(data, tmp_path / "call", "--size", 64, "--map", "us6")  # each goes on where the other stopped
    assert again.pictures == 0 and "nothing to do" in again.lines[0]


def test_the_config_is_frozen_and_travels():
    config = ExtractConfig(**SETTINGS, model_args=dict(prompt="a cat"))
    assert pickle.loads(pickle.dumps(config)) == config and config.maps == ("us6",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 96
    assert dataclasses.replace(config, size=96).size == 96


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(batch_size=0), "--batch-size 0 is out of range"),
        (dict(pool="max"), "pool='max' is unknown; choose one of none, mean"),
        (dict(resize="squeeze"), "choose one of squash, pad, crop"),
        (dict(part=(2, 2)), "expected .i, n. with i in 0..n-1"),
        (dict(keep_size=True), "leave out --size"),
        (dict(timestep=3), "adds no noise"),
        (dict(weights="nothing.safetensors"), "nothing.safetensors: no such file"),
    ],
)
def test_wrong_settings_are_refused_at_once(wrong, words):
    with pytest.raises(CleanDIFTError, match=words):
        ExtractConfig(**SETTINGS | wrong)
    assert issubclass(MissingFileError, CleanDIFTError)


def test_engines_are_named(tmp_path):
    with pytest.raises(InputError, match="engine 'mpi' is unknown; choose one of local"):
        extract(tmp_path, tmp_path / "out", ExtractConfig(**SETTINGS), engine="mpi")
    assert not (tmp_path / "out").exists()


def test_one_list_serves_extraction_training_and_evaluation(tmp_path):
    """The same images, captions and labels, of a folder or of a list."""
    folder = make_pictures(tmp_path / "photos", 6)
    for path in sorted(folder.rglob("*.png")):
        path.with_suffix(".txt").write_text(f"a photo, {path.stem}")
    sources, notes = list_sources(folder, captions=True)
    assert not notes and sources == list_training_sources(folder)
    assert [one.caption for one in list_sources(folder).images] == [""] * 6
    lines = [dict(path=one.path, key=one.key, caption=one.caption, label=one.key[:3]) for one in sources]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed, _ = list_sources(tmp_path / "list.jsonl", captions=True)
    assert listed == list_training_sources(tmp_path / "list.jsonl")
    assert [dataclasses.replace(one, label="") for one in listed] == sources
    train, labelled = read_queries(tmp_path / "list.jsonl")
    folders = read_queries(folder)[1]
    assert train is None and labelled.classes == folders.classes == ["one", "two"]
    assert torch.equal(labelled.labels, folders.labels)
    assert [item.stamp for item in labelled.items] == [item.stamp for item in folders.items]
