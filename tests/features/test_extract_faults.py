"""Extraction where memory runs out, pictures cannot be read, or features are no numbers."""

import json
import os
import signal
import struct
import zlib
from collections import Counter

import pytest
import torch
from extract_runs import extract, make_pictures, noise, same

from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.features import Features, extractor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos")


def test_out_of_memory_halves_the_batch(folder, tmp_path, monkeypatch, capsys):
    call, sizes = extractor.Extractor.__call__, []

    def limited(self, pictures):
        sizes.append(len(pictures))
        if len(pictures) > 2:
            raise extractor.OutOfMemory("full")
        return call(self, pictures)

    extract(folder, tmp_path / "plain", "--size", "64")
    monkeypatch.setattr(extractor.Extractor, "__call__", limited)
    extract(folder, tmp_path / "out", "--size", "64")
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2] and "going on with halves" in capsys.readouterr().err
    same(tmp_path / "plain", tmp_path / "out")

    def never(self, pictures):
        raise extractor.OutOfMemory("full; lower the size (--size)")

    monkeypatch.setattr(extractor.Extractor, "__call__", never)
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "none", "--size", "64")
    assert "lower the size (--size), --max-side with --keep-size" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["input", "pooling"])
def test_out_of_memory_around_the_model_halves_the_batch_too(folder, tmp_path, monkeypatch, capsys, place):
    """Pictures are moved and normalised before the model, pooled and converted behind it."""
    extract(folder, tmp_path / "plain", "--size", "64", "--pool", "mean")
    name, function = ("to", torch.Tensor.to) if place == "input" else ("mean", torch.Tensor.mean)

    def limited(self, *args, **kwargs):
        if self.ndim == 4 and len(self) > 2 and self.shape[1:] == ((3, 64, 64) if place == "input" else self.shape[1:]):
            raise torch.OutOfMemoryError("full")
        return function(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, name, limited)
    extract(folder, tmp_path / "out", "--size", "64", "--pool", "mean")
    monkeypatch.undo()
    assert "going on with halves" in capsys.readouterr().err
    same(tmp_path / "plain", tmp_path / "out")


def bomb():
    """A PNG of 20,000 x 20,000 pixels in less than a hundred bytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_broken_pictures_are_listed_and_tried_again(folder, tmp_path, capsys, monkeypatch):
    data = make_pictures(tmp_path / "data", 6)
    (data / "one/01.png").write_bytes(b"no picture")
    (data / "two/04.png").write_bytes((data / "two/04.png").read_bytes()[:300])
    (data / "two/bomb.png").write_bytes(bomb())
    for workers in (0, 2):
        report = extract(data, tmp_path / "out", workers=workers)
        assert report.failed == 3 and "3 images cannot be read" in capsys.readouterr().out
        lines = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
        assert [line["key"] for line in lines] == ["one/01.png", "two/04.png", "two/bomb.png"]
        assert "not an image" in lines[0]["error"] and "too large to be safe" in lines[2]["error"]
    assert Features(tmp_path / "out").failures == lines and len(Features(tmp_path / "out")) == 4
    noise(3, 64, 64).save(data / "one/01.png")
    assert extract(data, tmp_path / "out").pictures == 1
    assert [line["key"] for line in Features(tmp_path / "out").failures] == ["two/04.png", "two/bomb.png"]
    with pytest.raises(SystemExit) as stop:
        extract(data, tmp_path / "strict", "--strict", "--batch-size", "1")
    assert stop.value.code == 2 and "04.png: truncated or damaged" in capsys.readouterr().err
    (tmp_path / "all").mkdir()
    (tmp_path / "all/a.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        extract(tmp_path / "all", tmp_path / "empty")
    assert "none of 1 images can be read, the first: " in capsys.readouterr().err


def test_a_worker_that_is_killed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ImageSource, "read", lambda self: os.kill(os.getpid(), signal.SIGKILL))  # as a full memory does
    with pytest.raises(SystemExit) as stop:
        extract(folder, tmp_path / "out", workers=1)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "a process that reads images was killed" in said and "--workers" in said


def test_features_that_are_not_finite(folder, tmp_path, capsys, monkeypatch):
    call = extractor.Extractor.__call__
    monkeypatch.setattr(
        extractor.Extractor, "__call__", lambda self, x: {n: y * 1e30 for n, y in call(self, x).items()}
    )
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "out")
    said = capsys.readouterr().err
    assert "us6 of one/01.png is not finite; too large for float16? Give --store-dtype float32" in said
    extract(folder, tmp_path / "full", "--store-dtype", "float32")


def test_what_was_computed_before_an_error_is_kept(folder, tmp_path, monkeypatch):
    call, calls = extractor.Extractor.__call__, Counter()

    def later_ones_break(self, x):
        calls["all"] += 1
        return {n: y * (float("nan") if calls["all"] > 1 else 1) for n, y in call(self, x).items()}

    monkeypatch.setattr(extractor.Extractor, "__call__", later_ones_break)
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "out", "--batch-size", "2")
    assert len(Features(tmp_path / "out")) == 2
