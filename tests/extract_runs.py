"""Small extractions, shared by the tests of extraction."""

import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from PIL import Image

from cleandift_backbones.cli.extract import main
from cleandift_backbones.data.images import read_image, to_input
from cleandift_backbones.features import Features

ROOT = Path(__file__).parents[1]
RANDOM = ["--model", "random:test_cleandift"]


def noise(seed, width, height, mode="RGB"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def make_pictures(folder, count=12):
    """PNGs of three sizes, in two folders."""
    for number in range(count):
        path = folder / ("one" if number % 2 else "two") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 64 + 16 * (number % 3), 64).save(path)
    return folder


def extract(data, out, *arguments, model=RANDOM, workers=0):
    """tools/extract.py in this process."""
    given = [*model, "--data", data, "--out", out, "--workers", workers, "--device", "cpu", *arguments]
    return main([str(word) for word in given])


def command(data, out, *arguments, launcher=(), model=RANDOM, workers=0, slow=0, calls=""):
    """tools/extract.py in a process of its own, started; `slow`: seconds more for each batch, counted in `calls`."""
    given = [*model, "--data", data, "--out", out, "--workers", workers, "--device", "cpu", *arguments]
    launcher = launcher or [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"SLOW": str(slow), "CALLS": str(calls)}
    tool = ROOT / ("tests/slow_extract.py" if slow else "tools/extract.py")
    return subprocess.Popen(
        [*launcher, str(tool), *map(str, given)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def plain(path, maps=("us6", "mid"), size=None, mode="keep"):
    """The maps of cleandift_tiny, one picture at a time and without any of this package's extraction."""
    if not hasattr(plain, "models"):
        plain.models = {}
    if maps not in plain.models:
        indices = [{"us6": 4, "us9": 1, "mid": 10}[name] for name in maps]
        plain.models[maps] = timm.create_model(
            "cleandift_tiny", pretrained=True, features_only=True, out_indices=indices
        ).eval()
    x = to_input(read_image(path, min_side=1), size, mode)[None]
    with torch.inference_mode():
        return {name: found[0] for name, found in zip(maps, plain.models[maps](x))}


def same(one, other, atol=2e-3, rtol=2e-3):
    """Two folders hold the same features, up to what other batches change in float16."""
    one, other = (found if isinstance(found, Features) else Features(found) for found in (one, other))
    assert one.keys == other.keys and one.keys
    for a, b in zip(one, other):
        assert {name: a[name] for name in ("key", "width", "height", "input")} == {
            name: b[name] for name in ("key", "width", "height", "input")
        }
        for name in one.maps:
            torch.testing.assert_close(a[name].float(), b[name].float(), atol=atol, rtol=rtol)
