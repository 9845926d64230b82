"""Extraction in one process: the features are the model's own, whatever they came from and however they are stored."""

import json
import threading
from collections import Counter

import pytest
import torch
import webdataset as wds
from extract_runs import RANDOM, extract, make_pictures, noise, plain
from PIL import Image

from cleandift_backbones.cli.extract import config_of, parser
from cleandift_backbones.data import loading
from cleandift_backbones.data.loading import Read, Resize, ahead, batches
from cleandift_backbones.data.sources import ImageSource, list_sources
from cleandift_backbones.features import Features, store
from cleandift_backbones.features import extractor as extractor_module
from cleandift_backbones.features.engines.local import process_place
from cleandift_backbones.features.extraction import load
from cleandift_backbones.features.formats import FORMATS

TINY = ["--model", "cleandift_tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory):
    """The same pictures as a folder, a list of paths, JSON lines, and two shards: {kind: (data, key -> path)}."""
    root = tmp_path_factory.mktemp("sources")
    paths = sorted(folder.rglob("*.png"))
    names = [path.relative_to(folder).as_posix() for path in paths]
    (root / "list.txt").write_text("\n".join(map(str, paths)) + "\n\n")
    lines = [json.dumps({"path": str(path), "key": f"k{number}"}) for number, path in enumerate(paths)]
    (root / "list.jsonl").write_text("\n".join(lines))
    with wds.ShardWriter(str(root / "%04d.tar"), maxcount=7, verbose=False) as writer:
        for number, path in enumerate(paths):
            writer.write({"__key__": f"{number:06}", "png": path.read_bytes(), "json": {"caption": "noise"}})
    return {
        "folder": (folder, dict(zip(names, paths))),
        "list": (root / "list.txt", dict(zip(map(str, paths), paths))),
        "lines": (root / "list.jsonl", {f"k{number}": path for number, path in enumerate(paths)}),
        "shards": (f"{root}/{{0000..0001}}.tar", {f"{number:06}": path for number, path in enumerate(paths)}),
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["folder", "list", "lines", "shards"])
def test_features_are_the_models_own(sources, tmp_path, kind, format):
    data, paths = sources[kind]
    options = ["--map", "us6", "mid", "--keep-size", "--batch-size", "3", "--store-dtype", "float32"]
    report = extract(data, tmp_path / "out", *options, "--format", format, "--shard-items", "5", model=TINY)
    assert report.pictures == 12 and 0 < report.busy <= 1
    features = Features(tmp_path / "out")
    assert features.keys == sorted(paths) and len(features) == 12
    assert len(list((tmp_path / "out").glob(f"*.{format}"))) >= 2
    for key, path in paths.items():
        found, expected = features[key], plain(path)
        image = Image.open(path)
        assert (found["width"], found["height"]) == image.size and found["input"] == [image.height, image.width]
        for name in ("us6", "mid"):
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("format", FORMATS)
def test_resized_and_pooled(folder, tmp_path, mode, format):
    options = ["--map", "mid", "us9", "--size", "96", "--resize", mode, "--pool", "mean", "--store-dtype", "float32"]
    extract(folder, tmp_path / "out", *options, "--format", format, "--limit", "4", model=TINY, workers=2)
    features = Features(tmp_path / "out", maps=["mid"])
    assert features.stack().shape == (4, 112) and "us9" not in features[0]
    for one in features:
        expected = plain(folder / one["key"], ("mid", "us9"), 96, mode)["mid"].mean((1, 2))
        torch.testing.assert_close(one["mid"], expected, atol=2e-4, rtol=1e-3)


def test_pictures_of_all_kinds(tmp_path):
    """As images.py reads them: rotated by EXIF, transparent, 16-bit, CMYK, palette, animated."""
    data = tmp_path / "data"
    data.mkdir()
    base = noise(1, 96, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(data / "turned.jpg", exif=exif)
    base.convert("RGBA").save(data / "alpha.png")
    Image.fromarray(torch.randint(0, 65535, (64, 80), dtype=torch.int32).numpy().astype("uint16")).save(
        data / "deep.png"
    )
    base.convert("CMYK").save(data / "print.JPEG")
    base.convert("P").save(data / "palette.gif", save_all=True, append_images=[noise(2, 96, 64)])
    base.save(data / "._resource.png")  # a name that other systems leave behind
    extract(data, tmp_path / "out", "--keep-size", "--store-dtype", "float32", model=TINY)
    features = Features(tmp_path / "out")
    assert features.keys == ["alpha.png", "deep.png", "palette.gif", "print.JPEG", "turned.jpg"]
    assert features["turned.jpg"]["width"] == 64 and features["turned.jpg"]["us6"].shape == (112, 12, 8)
    for one in features:
        torch.testing.assert_close(one["us6"], plain(data / one["key"])["us6"], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(folder, tmp_path, dtype):
    options = ["--map", "us6", "--limit", "3"]
    extract(folder, tmp_path / "full", *options, "--store-dtype", "float32", model=TINY)
    extract(folder, tmp_path / "low", *options, "--dtype", "bfloat16", "--store-dtype", dtype, model=TINY)
    for full, low in zip(Features(tmp_path / "full"), Features(tmp_path / "low")):
        assert low["us6"].dtype == getattr(torch, dtype)
        similar = torch.cosine_similarity(full["us6"].flatten(), low["us6"].float().flatten(), dim=0)
        assert similar > 0.999


@pytest.mark.parametrize(
    "model, options, channels",
    [
        (["--model", "random:test_resnet"], ["--map", "layer2", "-1"], {"layer2": 48, "layer4": 96}),
        (["--model", "random:test_vit"], ["--size", "64"], None),
        (["--model", "pixels"], [], {"pixels": 3}),
        (
            ["--model", "dift_tiny"],
            ["--timestep", "100", "--ensemble", "2", "--model-arg", "noise_seed=3"],
            {"us6": 112},
        ),
    ],
)
def test_any_timm_model(folder, tmp_path, model, options, channels):
    extract(folder, tmp_path / "out", *options, "--limit", "2", model=model)
    features = Features(tmp_path / "out")
    assert len(features) == 2
    if channels:
        assert {name: features[0][name].shape[0] for name in features.maps} == channels


def test_prompts(folder, tmp_path):
    """One for all, or one per line of a list; other prompts are other features."""
    paths = sorted(folder.rglob("*.png"))[:3]
    texts = ["a cat", "", "a dog"]
    lines = [json.dumps({"path": str(p), "key": p.stem, "prompt": text}) for p, text in zip(paths, texts)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    options = ["--map", "mid", "--store-dtype", "float32"]
    extract(tmp_path / "list.jsonl", tmp_path / "own", *options, "--prompt", "a dog", model=TINY)
    extract(tmp_path / "list.jsonl", tmp_path / "none", *options, "--prompt", "none", model=TINY)
    extract(folder, tmp_path / "dog", *options, "--prompt", "a dog", "--limit", "3", model=TINY)
    own, none, dog = (Features(tmp_path / name).stack() for name in ("own", "none", "dog"))
    torch.testing.assert_close(own[1:], dog[1:], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(own[0], dog[0], atol=1e-2) and not torch.allclose(none[2], dog[2], atol=1e-2)


# --- sizes and batches ---


def test_sizes_that_are_kept():
    resize = Resize("keep", None, longest=100, multiple=16, least=64)
    assert resize.target(100, 70) == (64, 96) and resize.target(400, 300) == (80, 96)
    assert resize(noise(0, 200, 150)).shape == (3, 80, 96)
    with pytest.raises(ValueError, match="96x32 pixels, but both sides must be at least 64"):
        resize(noise(0, 100, 30))
    assert Resize("keep").target(70, 90) == (90, 70)


@pytest.mark.parametrize("longest, multiple", [(250, 64), (256, 100), (200, 64), (64, 64), (100, 1)])
def test_the_longest_side_is_a_bound(longest, multiple):
    resize = Resize("keep", None, longest, multiple)
    for width, height in ((800, 800), (800, 600), (600, 800), (90, 70), (3, 3000)):
        target = resize.target(width, height)
        assert max(target) <= longest and all(side % multiple == 0 and side > 0 for side in target)
    assert resize.target(8000, 8000) == (longest // multiple * multiple,) * 2


def of_size(number, side):
    return Read(ImageSource(str(number), ""), torch.zeros(3, 1, side), (side, 1))


def test_batches_by_size_with_a_bounded_wait():
    sides = [1, 2, 1, 3, 1, 4, 5, 1, 1, 1, 2, 9]
    found = [Read(ImageSource("broken", ""), None, error="why"), *(of_size(i, side) for i, side in enumerate(sides))]
    failed = []
    made = list(batches(found, 3, 4, failed.append))
    assert [read.error for read in failed] == ["why"]
    assert sorted(int(entry.key) for batch in made for entry in batch.entries) == list(range(len(sides)))
    for batch in made:
        assert len(batch.entries) <= 3 and batch.pictures.shape == (len(batch.entries), 3, 1, batch.sizes[0][0])
        assert [sides[int(entry.key)] for entry in batch.entries] == [batch.pictures.shape[-1]] * len(batch.entries)
    assert [entry.key for entry in made[0].entries] == ["0", "2", "4"]
    waits = list(batches((of_size(i, i + 1) for i in range(20)), 3, 4, failed.append))  # no two alike
    assert [batch.entries[0].key for batch in waits] == [str(i) for i in range(20)]


def test_batches_do_not_depend_on_workers(folder):
    entries, _ = list_sources(str(folder))

    def made(workers):
        found = loading.reads(entries, Resize("keep"), workers)
        return [(batch.entries, batch.pictures.sum().item()) for batch in batches(found, 3, 4, print)]

    assert made(0) == made(2)


def test_memory_is_bounded(folder, tmp_path, monkeypatch):
    """Pictures that were read and are not stored yet: no more than the docstring of `run` says."""
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    lines = [json.dumps({"path": paths[number % 12], "key": f"{number:04}"}) for number in range(160)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    counts, peak, lock = Counter(), [0], threading.Lock()
    read, add = ImageSource.read, store.Store.add

    def counted(self):
        with lock:
            counts["read"] += 1
            peak[0] = max(peak[0], counts["read"] - counts["stored"])
        return read(self)

    def stored(self, batch):
        add(self, batch)
        with lock:
            counts["stored"] += len(batch.keys)

    monkeypatch.setattr(ImageSource, "read", counted)
    monkeypatch.setattr(store.Store, "add", stored)
    extract(tmp_path / "list.jsonl", tmp_path / "out", "--keep-size", "--batch-size", "4", "--shard-items", "20")
    assert counts["read"] == counts["stored"] == 160
    batch = 4
    assert batch < peak[0] <= 4 * batch + 2 * batch + batch + 3 * batch + 1  # waiting, ahead, in the model, behind
    assert len(list((tmp_path / "out").glob("features-*"))) == 8  # a shard holds no more than it should


def test_loading_is_overlapped_with_computing(folder, tmp_path, monkeypatch):
    """The model waits for the pictures of the next batch to be read: it would wait for ever if they were read later."""
    readings = threading.Semaphore(0)
    read, call = ImageSource.read, extractor_module.Extractor.__call__
    batches_seen = []

    def counted(self):
        readings.release()
        return read(self)

    def waiting(self, pictures):
        batches_seen.append(len(pictures))
        wanted = 4 if len(batches_seen) == 1 else 2 if len(batches_seen) < 6 else 0
        assert all(readings.acquire(timeout=60) for _ in range(wanted))
        return call(self, pictures)

    monkeypatch.setattr(ImageSource, "read", counted)
    monkeypatch.setattr(extractor_module.Extractor, "__call__", waiting)
    extract(folder, tmp_path / "out", "--batch-size", "2", "--size", "64")
    assert batches_seen == [2] * 6


def test_ahead_brings_errors_and_stops():
    def items():
        yield 1
        raise ValueError("later")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="later"):
        next(found)
    taken = []
    endless = ahead((taken.append(i) or i for i in range(10**9)), 2)
    assert next(endless) == 0
    endless.close()
    assert len(taken) <= 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep-size", "--size", "64"], "leave out --size"),
        (["--multiple", "8"], "go with --keep-size"),
        (["--keep-size", "--max-side", "50", "--multiple", "64"], "--max-side 50 is less than --multiple 64"),
        (["--format", "parquet", "--store-dtype", "bfloat16"], "Parquet has no bfloat16"),
        (["--batch-size", "0"], "--batch-size 0 is out of range; give 1 or more"),
        (["--weights", "nowhere"], "no such file"),
        (["--map", "us12"], "'us12' is not one of us10"),
        (["--prompt", "a cat"], "takes no prompts"),
        (["--model-arg", "colour=8"], "colour"),
        (["--model", "random:test_vit", "--keep-size"], "takes pictures of one size, 160x160"),
        (["--model", "cleandift_tinny"], "did you mean cleandift_tiny"),
        (["--device", "nowhere"], "'nowhere' cannot be used"),
        (["--out", "/proc/features"], "nothing can be written"),
        (["--model-arg", "colour"], "expected KEY=VALUE"),
        (["--model-arg", "device=cpu"], "'device=cpu': that is for options of this command"),
        (["--model-arg", "features_only=True"], "'features_only=True': that is for options of this command"),
        (["--part", "2/2"], "expected I/N"),
    ],
)
def test_wrong_options_are_told_first(folder, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        extract(folder, tmp_path / "out", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_machines_of_different_sizes_share_everything(monkeypatch):
    taken = []
    for part, processes in ((0, 8), (1, 4)):
        args = parser().parse_args([*TINY, "--data", "x", "--out", "y", "--part", f"{part}/2"])
        for rank in range(processes):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            monkeypatch.setenv("RANK", str(rank))
            first, step, _ = process_place(args.part)
            taken += range(1600)[first::step]
    assert sorted(taken) == list(range(1600))


def test_model_arguments_reach_the_model():
    given = parser().parse_args(
        [
            *RANDOM,
            "--data",
            "x",
            "--out",
            "y",
            "--model-arg",
            "timestep=7",
            "prompt_is=text",
            "--model-arg",
            "in_chans=3",
        ]
    )
    assert dict(given.model_arg) == {"timestep": 7, "prompt_is": "text", "in_chans": 3}
    given.model_arg = [pair for pair in given.model_arg if pair[0] != "prompt_is"]
    extractor, resize = load(config_of(given), torch.device("cpu"))
    assert extractor.model.model.timestep == 7 and resize.size == (128, 128)
