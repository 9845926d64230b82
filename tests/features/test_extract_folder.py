"""Extraction and the folders of others: which files it touches, parallel runs, and its messages."""

import os
import pickle
import signal
import time

import pytest
import torch
from disk_faults import contents, no_more_files
from extract_runs import RANDOM, command, extract, make_pictures, noise

from cleandift_backbones.features import Features
from cleandift_backbones.features.formats import FORMATS
from cleandift_backbones.features.store import Store

TINY = ["--model", "cleandift_tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos", 6)


def refused(capsys, data, out, *arguments, **kwargs):
    with pytest.raises(SystemExit) as stop:
        extract(data, out, *arguments, **kwargs)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    return said


# --- files of others, damage, and what cannot be read at the moment ---


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_others_are_not_touched(folder, tmp_path, capsys, format):
    out, suffix = tmp_path / "out", FORMATS[format].suffix
    options = ["--format", format, "--size", "64"]
    extract(folder, out, *options, "--limit", "3")
    theirs = {
        f"my_head{suffix}": b"not ours",
        f"features-mine{suffix}": b"not ours",
        "failures-of-mine.jsonl": b"not ours",
        f".my_head{suffix}.12.part": b"not ours",
        "notes.txt": b"not ours",
    }
    for name, data in theirs.items():
        (out / name).write_bytes(data)
        os.utime(out / name, (time.time() - 4000,) * 2)
    assert extract(folder, out, *options).pictures == 3
    said = capsys.readouterr().err
    assert theirs.items() <= contents(out).items()
    assert f"holds other files, which are not read: features-mine{suffix}, my_head{suffix}" in said
    features = Features(out)
    assert len(features) == 6 and len(list(features)) == 6 and not features.failures


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_shards_are_kept_aside(folder, tmp_path, capsys, format):
    out = tmp_path / "out"
    options = ["--format", format, "--size", "64", "--shard-items", "3", "--batch-size", "3"]
    extract(folder, out, *options)
    shard = min(out.glob("features-*"))
    for number in (1, 2):
        cut = shard.read_bytes()[:500]
        shard.write_bytes(cut)
        assert extract(folder, out, *options).pictures == 3
        name = f"{shard.name}.damaged{'-2' if number == 2 else ''}"
        assert "is damaged" in (said := capsys.readouterr().err) and f"kept as {name}" in said
        assert (out / name).read_bytes() == cut and len(Features(out)) == 6
        os.rename(max(out.glob("features-*[0-9]" + FORMATS[format].suffix), key=os.path.getmtime), shard)


@pytest.mark.parametrize("format", FORMATS)
def test_an_io_error_stops_and_removes_nothing(folder, tmp_path, format):
    """The system opens no more files while the finished shards are looked at."""
    out = tmp_path / "out"
    extract(folder, out, "--format", format, "--size", "64")
    before = contents(out)
    store = Store(out, Features(out).meta["settings"], {})
    with no_more_files(), pytest.raises(OSError, match="Too many open files") as error:
        store.done()
    from cleandift_backbones.utils.errors import FileError

    assert isinstance(error.value, FileError) and contents(out) == before


def test_an_io_error_at_a_shard_stops_the_command(folder, tmp_path, monkeypatch, capsys):
    """Its sentence names the shard, and all features stay: opening fails as safetensors' errors tell it."""
    import safetensors

    out = tmp_path / "out"
    extract(folder, out, "--size", "64")
    before = contents(out)
    for error in (OSError("No such device (os error 19)"), FileNotFoundError(f"No such file or directory: {out}")):

        def failing(*_args, error=error, **_kwargs):
            raise error

        monkeypatch.setattr(safetensors, "safe_open", failing)
        said = refused(capsys, folder, out, "--size", "64")
        assert "cannot be read" in said and str(min(out.glob("features-*"))) in said and contents(out) == before
        monkeypatch.undo()


# --- folders that are refused, and two runs ---


@pytest.mark.parametrize("where", ["", "one"])
def test_a_refused_folder_is_left_as_it_was(folder, tmp_path, capsys, where, monkeypatch):
    """The images' own folder as --out: refused before the model is loaded; nothing is made in it."""
    data = make_pictures(tmp_path / "photos", 4)
    before = contents(data)
    monkeypatch.setattr("cleandift_backbones.features.extraction.load", lambda *_: pytest.fail("loaded a model"))
    assert "holds other files" in refused(capsys, data, data / where)
    assert contents(data) == before and not list(data.rglob(".*"))


def test_the_same_command_twice_at_once(folder, tmp_path, capsys):
    out, calls = tmp_path / "out", tmp_path / "calls"
    first = command(folder, out, "--batch-size", "1", "--size", "64", slow=60, calls=calls)
    try:
        while not calls.exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        said = refused(capsys, folder, out, "--size", "64")
        assert f"{out} is in use by process {first.pid} on " in said
        # Another share of the same images, as on another machine.
        assert extract(folder, out, "--size", "64", "--part", "1/2").pictures == 3
        assert "other processes have them" in capsys.readouterr().out
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert extract(folder, out, "--size", "64").pictures == 3
    assert len(Features(out)) == 6 and not list(out.glob(".*"))


# --- messages and options ---


def test_other_maps_are_reported_as_other_maps(folder, tmp_path, capsys):
    extract(folder, tmp_path / "out", "--map", "mid", model=TINY)
    said = refused(capsys, folder, tmp_path / "out", "--map", "us6", model=TINY)
    assert "maps ['mid'], now ['us6']" in said and "weights" not in said
    said = refused(capsys, folder, tmp_path / "out", "--map", "mid", "--dtype", "bfloat16", model=TINY)
    assert "compute_dtype 'float32', now 'bfloat16'" in said and "weights" not in said


@pytest.mark.parametrize("model", ["cleandift_tiny", "random:test_resnet", "random:cleandift_tiny"])
@pytest.mark.parametrize("option", ["--timestep", "--ensemble"])
def test_noise_for_models_that_add_none(folder, tmp_path, capsys, model, option):
    said = refused(capsys, folder, tmp_path / "out", option, "100", model=["--model", model])
    assert f"{option}: {model} adds no noise; leave it out, or take a dift_* model" in said
    assert not (tmp_path / "out").exists()


def test_maps_with_commas(folder, tmp_path):
    for number, words in enumerate((["us6,mid"], ["us6", "mid"], ["us6,", "mid"], ["1,-1,us6"])):
        extract(folder, tmp_path / str(number), "--map", *words, "--limit", "1", model=[*RANDOM])
        expected = ["us9", "mid", "us6"] if number == 3 else ["us6", "mid"]
        assert Features(tmp_path / str(number)).maps == expected


def test_the_last_lines(folder, tmp_path, capsys):
    extract(folder, tmp_path / "out", "--map", "us6")
    said = capsys.readouterr()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("features-*"))
    assert f"holds the features of 6 images ({size / 1000:.1f} kB)" in said.out
    extract(folder, tmp_path / "out", "--map", "us6")
    said = capsys.readouterr()
    assert said.out.startswith("nothing to do: ") and len(said.out.splitlines()) == 1
    assert "img" not in said.err


def test_names_that_features_do_not_have(folder, tmp_path):
    extract(folder, tmp_path / "out", "--map", "us6", "mid", "--size", "64")
    features = Features(tmp_path / "out")
    one = features["one/01.png"]
    with pytest.raises(KeyError, match="'us9' is not stored for one/01.png, which has key, .*, us6, mid"):
        one["us9"]
    with pytest.raises(KeyError, match="map 'us9' is not in .*, which holds us6, mid"):
        features.stack("us9")
    assert one.get("us9") is None and "us9" not in one
    copy = pickle.loads(pickle.dumps(one))
    assert torch.equal(copy["us6"], one["us6"]) and copy["key"] == "one/01.png"
    shape = "x".join(map(str, one["us6"].shape))
    text = repr(features)
    for word in (str(tmp_path / "out"), "6 images", f"us6 {shape}", "mid ", "float16", "random:test_cleandift"):
        assert word in text


def test_repr_of_features_of_many_sizes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, width in enumerate((64, 80)):
        noise(number, width, 64).save(data / f"{number}.png")
    extract(data, tmp_path / "out", "--keep-size")
    assert ", ...; float16" in repr(Features(tmp_path / "out"))
