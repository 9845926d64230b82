"""Labelled images in WebDataset shards: which label an image has, what one set and two sets of them are measured by."""

import json
import math
import os
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from test_eval_command import evaluate, results
from test_sources import pack, png

from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.evaluation import labelled, tasks
from cleandift_backbones.evaluation.items import DataError
from cleandift_backbones.utils.errors import CleanDIFTError, InputError

COLOURS = dict(blue=(20, 20, 230), red=(230, 20, 20))


def sample(number, label, **more):
    """The files of an image whose colour tells its class."""
    pixels = png_of(tuple(value + 2 * number for value in COLOURS.get(label, (90, 90, 90))))
    return {f"{number:06d}.png": pixels, f"{number:06d}.json": json.dumps(dict(label=label, **more)).encode()}


def png_of(colour):
    from picture_bytes import encoded

    return encoded(Image.new("RGB", (70, 70), colour))


def shard(path, labels, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, label in enumerate(labels, first):
        files |= sample(number, label, text="a photo", source="web")
    return pack(path, files)


def names(found):
    return [found.classes[number] for number in found.labels]


def test_labels_of_shards(tmp_path):
    path = shard(tmp_path / "photos" / "heldout.tar", ["red", "blue", "red"])
    found = labelled.read_shards(path)
    assert found.classes == ["blue", "red"] and names(found) == ["red", "blue", "red"]
    assert [item.key for item in found.items] == [f"heldout.tar:{n:06d}" for n in range(3)]
    assert found.items[1].read().getpixel((0, 0)) == (22, 22, 232)
    shard(tmp_path / "photos" / "more.tar", ["red"] * 2)
    (tmp_path / "photos" / "LICENCE.txt").write_text("x")
    for place in (tmp_path / "photos", tmp_path / "photos" / "*.tar", tmp_path / "photos" / "{heldout,more}.tar"):
        both = labelled.read_shards(place)
        assert names(both) == ["red", "blue", "red", "red", "red"]
        assert [(item.key, item.stamp) for item in both.items[:3]] == [(item.key, item.stamp) for item in found.items]
        assert both.items[3].key == "more.tar:000000"
    assert names(labelled.read_shards(tmp_path / "photos", per_class=1)) == ["red", "blue"]
    assert labelled.read_shards(path, root=tmp_path).items[0].key == "photos/heldout.tar:000000"
    stamps = {item.stamp for item in found.items}
    os.utime(path, (1, 1))
    assert len(stamps) == 3 and not stamps & {item.stamp for item in labelled.read_shards(path).items}


def test_where_a_label_stands(tmp_path):
    """WebDataset's .cls, before "label" of the .json; whole numbers are texts; captions beside them do not matter."""
    files = {"a.png": png(), "a.cls": b"7\n", "a.json": b'{"label": "x"}', "b.png": png(1), "b.json": b'{"label": 7}'}
    files |= {"c.png": png(2), "c.txt": b"a caption", "c.json": b'\xef\xbb\xbf{"label": " two words "}'}
    files |= {"d.left.png": png(3), "d.right.png": png(4), "d.cls": b"7"}
    found = labelled.read_shards(pack(tmp_path / "a.tar", files))
    assert names(found) == ["7", "7", "two words", "7", "7"]


def test_what_a_shard_must_hold(tmp_path, caplog):
    good, count = sample(0, "red"), iter(range(100))

    def refused(files, words, name=None):
        path = pack(tmp_path / (name or f"{next(count)}.tar"), files)
        with pytest.raises(InputError, match=words) as error:
            labelled.read_shards(path)
        assert str(path) in str(error.value)

    refused(
        good | {"1.png": png(), "2.png": png(), "2.json": b'{"label": ""}'},
        "2 of 3 images have no label, first .*:1.png;",
    )
    refused(good | {"1.png": png(), "1.json": b'{"label": [1]}'}, r"1\.json: a label must be text or a whole number")
    refused(good | {"1.png": png(), "1.json": b'{"label": true}'}, "a label must be text or a whole number")
    refused(good | {"1.png": png(), "1.json": b'{"label": 1'}, r"1\.json: .*JSON")
    refused(good | {"1.png": png(), "1.json": b'["label"]'}, "1 of 2 images have no label")
    refused(good | {"1.png": png(), "1.cls": b"\xff"}, r"1\.cls.*UTF-8")
    refused({"a.txt": b"x"}, "no images")
    both = tmp_path / "both.tar"
    (tmp_path / "image.png").write_bytes(png())
    both.write_bytes(pack(tmp_path / "one.tar", good).read_bytes() * 2)
    with pytest.raises(DataError, match="two images have the key '000000'"):
        labelled.read_shards(both)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(both.read_bytes()[:1200])
    with pytest.raises(DataError, match=r"cut\.tar is damaged"):
        labelled.read_shards(cut)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "image.png", "0.png")
    with pytest.raises(InputError, match=r"a\.tar\.gz is compressed"):
        labelled.read_shards(tmp_path / "a.tar.gz")
    with pytest.raises(InputError, match=r"no shard .*nothing\.tar"):
        labelled.read_gallery(tmp_path / "nothing.tar")
    with pytest.raises(DataError, match=r"nothing is no folder; expected .*\.tar shards"):
        labelled.read_gallery(tmp_path / "nothing")
    assert not caplog.text
    labelled.read_shards(pack(tmp_path / "warned.tar", good | {"000000.seg.png": png(), "x.heic": b""}))
    assert "left out: 2 files (.heic 1, further images of a sample 1)" in caplog.text


def test_splits_of_shards(tmp_path, monkeypatch):
    root = tmp_path / "photos"
    shard(root / "train" / "0.tar", ["red", "blue", "green"])
    shard(root / "train" / "1.tar", ["red", "blue"], 3)
    shard(root / "val" / "0.tar", ["blue", "red"])
    train, val = labelled.read_queries(root)
    assert names(train) == ["red", "blue", "green", "red", "blue"] and names(val) == ["blue", "red"]
    assert train.classes == val.classes == ["blue", "green", "red"] and val.labels.tolist() == [0, 2]
    assert [item.key for item in val.items] == ["val/0.tar:000000", "val/0.tar:000001"]
    assert names(labelled.read_queries(root, per_class=1)[0]) == ["red", "blue", "green"]
    assert names(labelled.read_gallery(root)) == ["blue", "red"]
    flat = shard(tmp_path / "flat" / "heldout.tar", ["red", "red"])
    train, val = labelled.read_queries(flat, train=root / "train" / "?.tar")
    assert (
        len(train.items) == 5 and val.labels.tolist() == [2, 2] and len({i.key for i in train.items + val.items}) == 7
    )
    shard(flat, ["red", "pink"])
    with pytest.raises(DataError, match=r"heldout\.tar: 1 of 2 classes are not in train, first pink"):
        labelled.read_queries(flat, train=root / "train")
    shard(flat, ["red"])
    monkeypatch.chdir(tmp_path)
    for train in (flat.parent, "flat", flat):  # the folder of training shards holds those that are classified too
        with pytest.raises(DataError, match=r"1 of 1 images are training images too, first heldout\.tar:000000"):
            labelled.read_queries(flat, train=train)
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match="has no val"):
        labelled.read_queries(root)


def test_folders_of_classes_keep_their_meaning(tmp_path):
    """Archives that lie beside the folders unpacked from them are no shards."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(png(number))
        pack(tmp_path / f"{name}.tar", {"0.png": png()})
    train, val = labelled.read_queries(tmp_path)
    assert train is None and val.classes == ["ant", "bee"] and len(val.items) == 4
    with pytest.raises(DataError, match="4 of 4 images are training images too, first ant/0.png"):
        labelled.read_queries(tmp_path / "ant" / "..", train=tmp_path)


def test_leave_one_out_by_hand():
    # unit vectors at these angles; class of each; the third class has a single image
    angles, labels = [0, 10, 22, 100, 107, 200], torch.tensor([0, 1, 0, 1, 1, 2])
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])
    data = labelled.Labelled([ImageSource(str(a)) for a in angles], labels, ["a", "b", "c"])

    class Found(list):
        def stack(self, indices):
            return torch.stack([self[i] for i in indices])

    task = tasks.Knn(None, data, (1, 2))
    tallies = task.measure(Found(vectors), (64, 64))
    assert list(tallies) == ["leave-one-out kNN accuracy, k=1", "leave-one-out kNN accuracy, k=2"]
    one = tallies["leave-one-out kNN accuracy, k=1"]
    # nearest: 0: 10, 10: 0, 22: 10, 100: 107, 107: 100
    assert one.hits[:, 0].tolist() == [0, 0, 0, 1, 1, 0] and one.trials[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert task.facts["queries"] == 5 and task.facts["classes"] == 3
    few = labelled.limit_labelled(data, 2, seed=0)  # of 6 images: not all classes are left
    left = len(set(few.labels.tolist()))
    assert (
        left < 3
        and [tasks.Knn(None, few, (1,)).facts["classes"], tasks.Retrieval(few, (1,)).facts["classes"]] == [left] * 2
    )
    assert tasks.Knn(data, few, (1,)).facts["classes"] == 3
    with pytest.raises(DataError, match="k = 6 neighbours of 5"):
        tasks.Knn(None, data, (6,))


def test_tasks_on_shards(tmp_path, monkeypatch, capsys):
    path, out = shard(tmp_path / "heldout.tar", ["red", "blue"] * 4 + ["green"]), tmp_path / "out"
    common = ["--model", "pixels", "--size", 64, "--out", out]
    evaluate(monkeypatch, "knn", *common, "--data", path, "--k", "1,3")
    data = results(out, "knn")
    assert data["runs"][0]["maps"]["pixels"]["leave-one-out kNN accuracy, k=3"]["rate"] == 1
    assert (data["classes"], data["pictures"], data["queries"]) == (3, 9, 8) and "train_pictures" not in data
    assert "leave-one-out kNN accuracy, k=3 (%)" in capsys.readouterr().out
    evaluate(monkeypatch, "retrieval", *common, "--data", path, "--k", "1,2")
    data = results(out, "retrieval")
    assert data["runs"][0]["maps"]["pixels"]["recall@1"]["rate"] == 1 and data["queries"] == 8
    shard(tmp_path / "train-0.tar", ["red", "green", "blue"], 10)
    evaluate(monkeypatch, "knn", *common, "--data", path, "--train", tmp_path / "train-*.tar", "--k", 1)
    data = results(out, "knn")
    assert data["runs"][0]["maps"]["pixels"]["kNN accuracy, k=1"]["rate"] == 1
    assert (data["train_pictures"], data["val_pictures"]) == (3, 9)
    for arguments, words in (
        (["--per-class", 2], "--per-class is of training images, and"),
        (["--train", tmp_path / "x.tar"], "no shard"),
    ):
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "knn", *common, "--data", path, *arguments)
        assert words in capsys.readouterr().err


def test_noise_of_shards(tmp_path, monkeypatch):
    """A task that wants no labels takes shards without any."""
    pack(tmp_path / "a.tar", {f"{number}.png": png(number) for number in range(4)})
    arguments = ["--model", "random:dift_tiny", "--map", "us3", "--timesteps", 400, "--noises", 2, "--size", 64]
    evaluate(monkeypatch, "noise", *arguments, "--data", tmp_path / "a.tar", "--limit", 3, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "noise.json").read_text())["pictures"] == 3


def test_a_damaged_image_of_a_shard_is_named(tmp_path):
    path = pack(tmp_path / "a.tar", sample(0, "red") | {"1.png": png()[:60], "1.cls": b"red"})
    with pytest.raises(CleanDIFTError, match=r"a\.tar:1"):
        labelled.read_shards(path).items[1].read()
    item = labelled.read_shards(path).items[0]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CleanDIFTError, match=r"a\.tar:000000"):
        item.read()
