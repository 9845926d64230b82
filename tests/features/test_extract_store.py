"""Extraction: the sources it reads, and the folder of features that it writes."""

import io
import json
import os
import pickle
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import webdataset as wds
from extract_runs import extract, make_pictures, noise, same
from picture_bytes import encoded
from PIL import Image
from torch.utils.data import DataLoader

from cleandift_backbones.data.sources import SourceError, list_sources
from cleandift_backbones.features import Features
from cleandift_backbones.features.formats import FORMATS, Computed, ShardError
from cleandift_backbones.features.store import Store, StoreError

TINY = ["--model", "cleandift_tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos")


# --- sources ---


def test_shards_with_equal_keys_and_damage(tmp_path, capsys):
    for shard in "ab":
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in range(3):
                sample = {"__key__": f"x/{number}", "jpg": encoded(noise(number, 70, 64), "JPEG"), "txt": "words"}
                writer.write(sample | ({"png": encoded(noise(9, 70, 64))} if number == 1 else {}))
    with pytest.raises(SourceError, match=r"two pictures have the key 'x/0' \(.*a.tar, .*b.tar\); give --shard-names"):
        list_sources(str(tmp_path))
    entries, _ = list_sources(str(tmp_path), shard_names=True)
    assert [entry.key for entry in entries] == [f"{shard}/x/{number}" for shard in "ab" for number in range(3)]
    assert encoded(entries[1].read()) == encoded(Image.open(io.BytesIO(encoded(noise(1, 70, 64), "JPEG"))))
    data = (tmp_path / "b.tar").read_bytes()
    place = data.index(b"x/2.jpg")
    (tmp_path / "b.tar").write_bytes(data[:place] + b"garbage" * 1000)
    (tmp_path / "c.tar").write_bytes(b"no tar" * 1000)
    extract(tmp_path / "*.tar", tmp_path / "out", "--shard-names")
    said = capsys.readouterr().err
    assert "b.tar is damaged" in said and "c.tar is damaged or no plain .tar" in said
    assert len(Features(tmp_path / "out")) == 5
    with pytest.raises(SystemExit):
        extract(tmp_path / "*.tar", tmp_path / "strict", "--shard-names", "--strict")


def test_sources_that_cannot_be_used(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.txt").write_text("a.png\na.png\n")
    (tmp_path / "wrong.jsonl").write_text('{"key": 3}\n')
    (tmp_path / "torn.jsonl").write_text('{"path": "a.png"\n')
    (tmp_path / "table.csv").write_text("picture\na.png\n")
    (tmp_path / "table.tsv").write_text("path\na.png\n")
    (tmp_path / "number.jsonl").write_text('{"path": "a.png"}\n{"path": "b.png", "key": 1.5}\n')
    for data, message in (
        ("empty", "holds no pictures"),
        ("nowhere", "no such folder, shards or list"),
        ("no/{00..03}.tar", "no shard"),
        ("twice.txt", "two pictures have the key 'a.png'.*a key of its own"),
        ("wrong.jsonl", "line 1: expected a path"),
        ("torn.jsonl", "line 1: no JSON"),
        ("table.csv", "line 2: expected a path"),
        ("table.tsv", "a list is a text file with a path per line, or a table"),
        ("number.jsonl", "line 2: the key 1.5 is no text and no whole number"),
    ):
        with pytest.raises(SourceError, match=message):
            list_sources(str(tmp_path / data))
    with pytest.raises(SourceError, match="is a picture; give its folder"):
        list_sources(str(next(folder.rglob("*.png"))))


def test_keys_of_a_list(tmp_path):
    """As pandas writes them: null where there is none, whole numbers as such."""
    lines = [{"path": "a.png", "key": None}, {"path": "b.png", "key": ""}, {"file_name": "c.png"}]
    lines += [{"path": "d.png", "key": number} for number in (0, 7)]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    entries, _ = list_sources(str(tmp_path / "list.jsonl"))
    assert [entry.key for entry in entries] == ["a.png", "b.png", "c.png", "0", "7"]


@pytest.mark.parametrize("name", ["meta.json", "index.jsonl"])
def test_damaged_notes_are_named(tmp_path, folder, capsys, name):
    extract(folder, tmp_path / "out", "--limit", "1")
    for text in ("{bad\n", *(("{}", "[1]") if name == "meta.json" else ())):
        (tmp_path / "out" / name).write_text(text)
        with pytest.raises(SystemExit) as stop:
            extract(folder, tmp_path / "out", "--limit", "1")
        assert stop.value.code == 2 and f"{name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("line, ending", [("{}", "txt"), ('{{"path": "{}"}}', "jsonl")])
def test_a_list_as_windows_writes_it(tmp_path, line, ending):
    """With a byte order mark in front, and two characters at the end of a line."""
    text = "".join(line.format(name) + "\r\n" for name in ("a.png", "b.png"))
    (tmp_path / f"list.{ending}").write_bytes(text.encode("utf-8-sig"))
    entries, _ = list_sources(str(tmp_path / f"list.{ending}"))
    assert [(entry.key, Path(entry.path).parent) for entry in entries] == [("a.png", tmp_path), ("b.png", tmp_path)]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    make_pictures(data, 2)
    make_pictures(other, 4)
    (data / "linked").symlink_to(other)
    (data / "one/up").symlink_to(data)
    (other / "two/away").symlink_to(data / "two")
    (data / "two/back").symlink_to(other)
    (data / "self.png").symlink_to("self.png")
    entries, told = list_sources(str(data))
    keys = [entry.key for entry in entries]
    assert not told and {"one/01.png", "two/00.png", "linked/one/03.png", "linked/two/02.png"} < set(keys)
    assert len(keys) < 30 and "self.png" in keys  # which is then told to be no picture


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    make_pictures(tmp_path, 4)
    scan = os.scandir

    def refusing(path):  # root may read everything
        if str(path).endswith("two"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    entries, told = list_sources(str(tmp_path))
    assert [entry.key for entry in entries] == ["one/01.png", "one/03.png"]
    assert len(told) == 1 and "Permission denied" in told[0] and "left out" in told[0]


def test_strange_names(tmp_path, capsys):
    """Line ends of Unicode, other scripts, and bytes that are no text."""
    names = ["a\u2028b.png", "日本 語.png", "x\x85y.png", "quote\"'.png"]
    for name in names:
        noise(1, 64, 64).save(tmp_path / name)
    noise(1, 64, 64).save(os.fsencode(tmp_path) + b"/\xff.png", "PNG")
    for format in FORMATS:
        out = tmp_path / "out" / format
        extract(tmp_path, out, "--format", format)
        assert "1 names are no UTF-8 and are left out" in capsys.readouterr().err
        assert Features(out).keys == sorted(names) and extract(tmp_path, out, "--format", format).pictures == 0


# --- the folder of features ---


def test_other_settings_are_refused_and_named(folder, tmp_path, capsys):
    extract(folder, tmp_path / "out", "--limit", "3")
    assert extract(folder, tmp_path / "out", "--batch-size", "2", "--shard-items", "2").pictures == 9
    for arguments, named in (
        (["--size", "96"], "size [128, 128], now [96, 96]"),
        (["--seed", "1"], "weights "),
        (["--pool", "mean"], "pool 'none', now 'mean'"),
    ):
        with pytest.raises(SystemExit):
            extract(folder, tmp_path / "out", *arguments)
        said = capsys.readouterr().err
        assert named in said and "other settings" in said and "another --out" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("mine")
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "mine")
    assert "holds other files (letter.txt)" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_and_unindexed_shards(folder, tmp_path, capsys, format):
    out = tmp_path / "out"
    extract(folder, out, "--shard-items", "4", "--batch-size", "4", "--size", "64", "--format", format)
    extract(folder, tmp_path / "whole", "--size", "64", "--format", format)
    (out / "index.jsonl").unlink()  # the shards know their rows
    same(out, tmp_path / "whole")
    first, *_ = shards = sorted(out.glob("features-*"))
    assert len(shards) == 3
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(ShardError, match="is damaged"):
        Features(out)
    assert extract(folder, out, "--size", "64", "--format", format).pictures == 4
    assert "is damaged" in capsys.readouterr().err
    same(out, tmp_path / "whole")


def test_what_a_killed_process_left_goes_at_the_end(folder, tmp_path):
    out = tmp_path / "out"
    extract(folder, out, "--limit", "3")
    left = [
        out / ".features-00001-0123abcd-00000.safetensors.0123456789ab.part",
        out / "failures-00001-0123abcd.jsonl",
        out / ".cleandift-0123-0-of-2.lock",
    ]
    for path in left:
        path.write_text('{"key": "one/01.png", "path": "x", "error": "then"}\n')
    extract(folder, out)
    assert all(path.exists() for path in left[:2])  # somebody may be writing them
    for path in left[:2]:
        os.utime(path, (time.time() - 4000,) * 2)
    extract(folder, out)
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == [
        *["features"] * 2,
        "index.jsonl",
        "meta.json",
    ]


def computed(key):
    return Computed([key], [(1, 1)], (1, 1), {"a": torch.zeros(1, 2, 1, 1)})


def test_the_end_of_one_process_leaves_anothers_shard_alone(tmp_path, monkeypatch):
    """A picture that could not be read has been mended: one process writes it while the other finds nothing to do."""
    settings = dict(format="safetensors", maps=["a"])
    first = Store(tmp_path, settings, {})
    first.add(computed("x"))
    first.fail("y", "y.png", "broken")
    first.flush()
    first.merge()
    idle, busy = (Store(tmp_path, settings, {}, rank=rank) for rank in range(2))
    write = busy.kind.write

    def meanwhile(path, batches):
        rows = write(path, batches)
        done, failures = idle.merge()
        assert done | {failure["key"] for failure in failures} == {"x", "y"}
        idle.clean()
        return rows

    monkeypatch.setattr(busy, "kind", SimpleNamespace(write=meanwhile, suffix=".safetensors"))
    busy.add(computed("y"))
    busy.flush()
    assert Features(tmp_path).keys == ["x", "y"] and not Features(tmp_path).failures


def test_two_lists_into_one_folder_keep_their_failures(tmp_path):
    """Two runs at once, each the only process of its own."""
    settings = dict(format="safetensors", maps=["a"])
    one, other = Store(tmp_path, settings, {}), Store(tmp_path, settings, {})
    for run, key in ((one, "x"), (other, "y")):
        run.fail(key, f"{key}.png", "broken")
        run.flush()
    assert [failure["key"] for failure in one.merge()[1]] == ["x", "y"]
    assert [failure["key"] for failure in other.merge()[1]] == ["x", "y"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_reader_is_a_data_set(folder, tmp_path, format):
    extract(folder, tmp_path / "out", "--size", "64", "--shard-items", "5", "--format", format)
    features = Features(tmp_path / "out")
    assert "one/01.png" in features and "nine" not in features and features.meta["settings"]["size"] == [64, 64]
    assert features[-1]["key"] == features.keys[-1] and [one["key"] for one in features] == features.keys
    with pytest.raises(KeyError, match="no features of 'nine' in .*, e.g. 'one/01.png'"):
        features["nine"]
    with pytest.raises(IndexError):
        features[12]
    with pytest.raises(KeyError, match="map 'us9' is not in .*, which holds us6"):
        Features(tmp_path / "out", ["us9"])
    with pytest.raises(StoreError, match="holds no features .meta.json is missing"):
        Features(tmp_path)
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again[3]["us6"], features[3]["us6"])
    loaded = list(DataLoader(features, batch_size=4, num_workers=2))
    assert torch.equal(torch.cat([batch["us6"] for batch in loaded]), features.stack("us6"))


def test_parquet_is_read_by_others(folder, tmp_path):
    import pyarrow.dataset

    extract(folder, tmp_path / "out", "--keep-size", "--shard-items", "5", "--format", "parquet")
    table = pyarrow.dataset.dataset(sorted((tmp_path / "out").glob("*.parquet"))).to_table()
    features = Features(tmp_path / "out")
    assert sorted(table.column("key").to_pylist()) == features.keys
    for row in table.to_pylist():
        one = features[row["key"]]
        assert (row["width"], row["us6_shape"]) == (one["width"], list(one["us6"].shape))
        assert torch.equal(torch.tensor(row["us6"], dtype=torch.float16).reshape(row["us6_shape"]), one["us6"])


@pytest.mark.parametrize("format", FORMATS)
def test_many_row_groups(tmp_path, format, monkeypatch):
    monkeypatch.setattr("cleandift_backbones.features.formats.GROUP_BYTES", 100)
    maps = torch.randn(9, 2, 3, 5).half()
    half = [
        Computed([f"{i}" for i in range(s, s + n)], [(5, 3)] * n, (3, 5), {"m": maps[s : s + n]})
        for s, n in ((0, 4), (4, 5))
    ]
    path = tmp_path / "shard"
    rows = FORMATS[format].write(path, half)
    shard = FORMATS[format](path)
    assert shard.rows() == rows
    for number in (8, 0, 3, 4, 7):
        assert torch.equal(shard.get(rows[number], "m"), maps[number])


@pytest.fixture
def opened():
    """How often each file was opened for reading; events of the interpreter, so whichever library opens it."""
    found, on = Counter(), [True]

    def hook(event, arguments):
        if on[0] and event == "open" and isinstance(arguments[0], str) and not str(arguments[1] or "r").startswith("w"):
            found[arguments[0]] += 1

    sys.addaudithook(hook)  # stays until the process ends, hence the switch
    yield found
    on[0] = False


def test_files_are_read_once(tmp_path, opened):
    """A picture's file is opened once, a tar once to list it and once for each picture, a finished picture's never."""
    folder = make_pictures(tmp_path / "photos", 6)
    pictures = [str(path) for path in folder.rglob("*.png")]
    options = ["--map", "mid"]
    extract(folder, tmp_path / "out", *options)
    assert [opened[path] for path in pictures] == [1] * 6
    opened.clear()
    extract(folder, tmp_path / "out", *options)
    assert not any(opened[path] for path in pictures)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in pictures:
            tar.add(path, Path(path).name)
    opened.clear()
    extract(tmp_path / "all.tar", tmp_path / "shards", *options)
    assert opened[str(tmp_path / "all.tar")] == 1 + 6
