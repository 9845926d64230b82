"""Features on disk: computed once, resumed, and never mistaken for others."""

import dataclasses
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from cleandift_backbones.data.images import ImageError, read_image, to_input
from cleandift_backbones.data.sources import ImageSource, file_source
from cleandift_backbones.evaluation.features import FeatureStores
from cleandift_backbones.evaluation.items import DataError, require, sized_source
from cleandift_backbones.features import extractor as extractor_module
from cleandift_backbones.features.extractor import ModelError, load_extractor


def picture(path, seed, size=(80, 64)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def items(tmp_path):
    (tmp_path / "data").mkdir()
    paths = [picture(tmp_path / "data" / f"{i}.png", i, (80 + 8 * i, 64)) for i in range(5)]
    return [file_source(path, tmp_path / "data") for path in paths]


def resnet(seed=0, size=64, map="layer2"):
    torch.manual_seed(seed)
    return load_extractor("test_resnet", map, pretrained=False, size=size)


@pytest.fixture
def passes(monkeypatch):
    """Counts the pictures that go through models."""
    counted, call = [], extractor_module.Extractor.__call__
    monkeypatch.setattr(extractor_module.Extractor, "__call__", lambda self, x: counted.append(len(x)) or call(self, x))
    return counted


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_cached_maps_are_the_models_own(items, tmp_path, mode):
    extractor = resnet()
    stores = FeatureStores(tmp_path / "cache", 2, mode, dtype="float32", progress=False)
    found = stores.features(extractor, items)["layer2"]
    config = timm.data.resolve_model_data_config(extractor.model)
    for i, item in enumerate(items):
        x = to_input(read_image(tmp_path / "data" / item.key), 64, mode, config["mean"], config["std"])[None]
        with torch.inference_mode():
            expected = extractor.model(x)[0][0]
        assert torch.allclose(found[i], expected, atol=1e-4)
    pooled = FeatureStores(tmp_path / "cache", 2, mode, pool=True, dtype="float32", progress=False)
    vectors = pooled.features(extractor, items)["layer2"].stack([4, 1])
    assert torch.allclose(vectors[1], found[1].mean((1, 2)), atol=1e-5)


def test_each_picture_is_computed_once(items, tmp_path, passes):
    stores = FeatureStores(tmp_path / "cache", 2, progress=False, log=print)
    first = stores.features(resnet(), items[:3])["layer2"].stack(range(3))
    assert sum(passes) == 3
    again = stores.features(resnet(), items)["layer2"]
    assert sum(passes) == 5 and torch.equal(again.stack(range(3)), first)
    stores.features(resnet(), items)
    assert sum(passes) == 5
    stores.features(resnet(size=96), items)
    stores.features(resnet(map="layer3"), items)
    assert sum(passes) == 15
    picture(tmp_path / "data" / "1.png", 77)  # another picture under the same name
    changed = [file_source(tmp_path / "data" / item.key, tmp_path / "data") for item in items]
    other = stores.features(resnet(), changed)["layer2"]
    assert sum(passes) == 16 and not torch.equal(other[1], again[1]) and torch.equal(other[2], again[2])


def test_features_of_other_code_are_computed_again(items, tmp_path, passes, monkeypatch):
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=print)
    own = load_extractor("test_cleandift", 0, pretrained=False, size=64)
    for extractor in (resnet(), own):
        stores.features(extractor, items)
    monkeypatch.setattr(timm, "__version__", "0.0.1")
    for extractor in (resnet(), own):
        stores.features(extractor, items)
    assert sum(passes) == 15  # only those of timm's own model


def test_optimised_features_are_kept_apart(items, tmp_path, passes):
    """Beside those of the model as timm gives it, under the hash of the same weights; with a prompt per picture too."""
    said, texts = [], ("", "a cat", "", "a dog", "")
    items = [dataclasses.replace(item, caption=text) for item, text in zip(items, texts)]
    stores, found = FeatureStores(tmp_path / "cache", 2, dtype="float32", progress=False, log=said.append), []
    for optimised in (False, True, True, False):
        extractor = load_extractor("cleandift_tiny", "mid", size=64)
        if optimised:
            extractor.optimize(fixed_prompt=False)
        found.append(stores.features(extractor, items)["mid"].stack(range(5)))
    assert sum(passes) == 10 and not any("other weights" in sentence for sentence in said)
    assert torch.equal(found[0], found[3]) and torch.equal(found[1], found[2]) and not torch.equal(*found[:2])
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()
    infos = [json.loads(path.read_text())["settings"] for path in (tmp_path / "cache").glob("*/meta.json")]
    assert [info.get("optimize") for info in infos].count("exact") == 1
    assert len({info["weights"] for info in infos}) == 1


def test_features_of_other_weights_are_computed_again_and_it_is_said(items, tmp_path, passes):
    said = []
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=said.append)
    old = stores.features(resnet(0), items)["layer2"][0]
    assert not said
    new = stores.features(resnet(1), items)["layer2"][0]
    assert sum(passes) == 10 and not torch.allclose(old, new, atol=1e-3)
    assert "test_resnet: the stored features of layer2 are of other weights" in said[0]
    infos = [json.loads(path.read_text())["settings"] for path in (tmp_path / "cache").glob("*/meta.json")]
    assert len({info["weights"] for info in infos}) == 2 and {info["model"] for info in infos} == {"test_resnet"}


def test_other_maps_are_no_other_weights(items, tmp_path):
    """A deeper map needs more layers, whose hash is another one."""
    said = []
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=said.append)
    stores.features(resnet(), items[:1])
    stores.features(resnet(map=["layer2", "layer3"]), items[:1])
    assert not said


def test_an_interrupted_run_goes_on(items, tmp_path, passes):
    class Stop(ImageSource):
        def read(self):
            raise KeyboardInterrupt

    stores = FeatureStores(tmp_path / "cache", 1, workers=0, progress=False, log=print)
    with pytest.raises(KeyboardInterrupt):
        stores.features(resnet(), [*items[:3], Stop("stop")])
    assert sum(passes) == 3
    stores.features(resnet(), items)
    assert sum(passes) == 5


KILLED = """
import os, signal, sys, time
from pathlib import Path
from cleandift_backbones.features import extractor as models
from cleandift_backbones.data.sources import file_source
from cleandift_backbones.evaluation import features
features.SHARD_BYTES = 1  # every batch is a file
call = models.Extractor.__call__
def stop(self, x, count=[0]):
    count[0] += len(x)
    if count[0] > 3:
        time.sleep(1)  # what was computed is being written
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, x)
models.Extractor.__call__ = stop
folder = Path(sys.argv[1])
data = [file_source(path, folder / "data") for path in sorted((folder / "data").iterdir())]
extractor = models.load_extractor("pixels", size=64)
features.FeatureStores(folder / "cache", 1, progress=False).features(extractor, data)
"""


def test_a_killed_run_goes_on(items, tmp_path, passes):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    said = []
    stores = FeatureStores(tmp_path / "cache", 1, progress=False, log=said.append)
    stores.features(load_extractor("pixels", size=64), items)
    assert sum(passes) == 2 and "features of 3 pictures are taken from" in said[0]


def test_damaged_files_are_computed_again(items, tmp_path, passes):
    said = []
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=said.append)
    stores.features(resnet(), items)
    (path,) = (tmp_path / "cache").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert stores.features(resnet(), items)["layer2"].stack(range(5)).shape[0] == 5
    assert sum(passes) == 10 and "is damaged" in said[0]


def test_every_picture_has_noises_of_its_own(items, tmp_path):
    noisy = load_extractor("dift_tiny", "mid", size=64, ensemble_size=1, timestep=500)
    twins = [dataclasses.replace(items[0], key=key) for key in "ab"]
    stores = FeatureStores(tmp_path / "1", progress=False)
    a, b = stores.features(noisy, twins)["mid"].stack([0, 1])
    assert not torch.allclose(a, b, atol=1e-2)
    again = FeatureStores(tmp_path / "2", progress=False).features(noisy, twins[::-1])["mid"]
    assert torch.equal(again[0], b) and torch.equal(again[1], a)


def test_prompts_reach_the_model(items, tmp_path):
    extractor = load_extractor("cleandift_tiny", "mid", size=64)
    named = [dataclasses.replace(item, caption=f"a photo of a {word}") for item, word in zip(items, ["cat", "dog"])]
    stores = FeatureStores(tmp_path / "cache", 2, dtype="float32", progress=False)
    plain = stores.features(extractor, items[:2])["mid"].stack([0, 1])
    told = stores.features(extractor, named)["mid"].stack([0, 1])
    direct = timm.create_model(
        "cleandift_tiny", pretrained=True, features_only=True, out_indices=[10], prompt=[i.caption for i in named]
    ).eval()
    with torch.inference_mode():
        expected = direct(torch.stack([to_input(item.read(), 64) for item in named]))[0]
    assert torch.allclose(told, expected, atol=1e-3) and not torch.allclose(told, plain, atol=1e-2)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the prompt did not stay: the weights are still the same
    with pytest.raises(ModelError, match="test_resnet takes no prompts.*--prompt none"):
        stores.features(resnet(), named)


@pytest.mark.parametrize("words", [["cat", "cat", "", ""], ["cat", "", "dog", "", "owl"]])
def test_prompts_do_not_reach_other_pictures(items, tmp_path, words):
    """Batches of 2 with and without prompts, the last one short: every picture gets what it gets alone."""
    extractor = load_extractor("cleandift_tiny", "mid", size=64)
    mixed = [dataclasses.replace(i, caption=f"A photo of a {word}." if word else "") for i, word in zip(items, words)]
    found = FeatureStores(tmp_path / "2", 2, dtype="float32", progress=False).features(extractor, mixed)["mid"]
    for number, item in enumerate(mixed):
        alone = FeatureStores(tmp_path / f"alone{number}", 1, dtype="float32", progress=False)
        assert torch.allclose(found[number], alone.features(extractor, [item])["mid"][0], atol=1e-3)


def test_pictures_that_cannot_be_read(items, tmp_path):
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    (tmp_path / "data" / "3.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"2 of 5 pictures cannot be used, the first: .*1\.png: not an image"):
        FeatureStores(tmp_path / "cache", 2, progress=False).features(resnet(), items)
    wrong = sized_source(tmp_path / "data" / "2.png", tmp_path / "data", "", (64, 99))
    with pytest.raises(ImageError, match=r"2\.png: 96x64 pixels, but its annotation says 99x64"):
        FeatureStores(tmp_path / "other", progress=False).features(resnet(), [wrong])
    said = r"1 of 2 pictures are missing, first .*9\.png, listed in list\.txt; expected PNG"
    with pytest.raises(DataError, match=said):
        require([(tmp_path / "data" / name, "list.txt") for name in ("2.png", "9.png")], "pictures", "PNG")


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return [self.value.expand(len(x), 2, 1, 1)]


def test_numbers_that_do_not_fit(items, tmp_path):
    extractor = resnet()
    for value, dtype, words in (
        (1e9, "float16", "is not finite; too large for float16; give --dtype float32"),
        (float("nan"), "float32", "is not finite; look at the weights"),
    ):
        extractor.model = Constant(value)
        with pytest.raises(ModelError, match=words):
            FeatureStores(tmp_path, dtype=dtype, progress=False).features(extractor, items)


def test_out_of_memory_names_the_flag():
    extractor = resnet()

    def full(x):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    extractor.model = full
    with pytest.raises(ModelError, match="out of memory with a batch of 2; lower the batch size .--batch-size"):
        extractor(torch.rand(2, 3, 64, 64))
    with pytest.raises(ModelError, match="out of memory with a batch of 1; lower the size .--size"):
        extractor(torch.rand(1, 3, 64, 64))
