"""Two runs in one folder: the second one is refused at once, and a killed one leaves nothing that blocks."""

import os
import subprocess
import sys
import threading
import time

import pytest
import timm
import torch
from disk_faults import contents
from finetune_runs import ROOT, arguments, finetune, refused
from PIL import Image

from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.evaluation.features import FeatureStores
from cleandift_backbones.features.extractor import load_extractor
from cleandift_backbones.utils.errors import FolderInUseError
from cleandift_backbones.utils.locks import hold
from tools.finetune import main


def test_the_same_training_twice(pictures, tmp_path, capsys):
    """As from two terminals; the first is killed, and another one goes on from its checkpoint."""
    out = tmp_path / "run"
    options = ["max_steps=100000", "checkpoint_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tools/finetune.py"), *arguments(pictures, out, *options)]
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while not list(out.glob("checkpoints/step_*")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        before = (out / "recipe.yaml").read_bytes()
        refused(pictures, out, capsys, f"{out} is in use by process {first.pid} on ", "seed=7")
        assert (out / "recipe.yaml").read_bytes() == before and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert list(out.glob(".cleandift*"))  # what the killed process left
    assert main(arguments(pictures, out, *options, "stop_after=1")) == 0
    assert not list(out.glob(".cleandift*"))


def test_the_other_processes_of_a_distributed_run_do_not_hold(pictures, tmp_path, monkeypatch):
    from cleandift_backbones.distill import train

    ran = []
    monkeypatch.setattr(train, "Training", lambda recipe: type("Run", (), {"run": lambda self: ran.append(1) or 0})())
    recipe = type("Recipe", (), {"output_dir": str(tmp_path / "run")})()
    with hold(tmp_path / "run"):
        for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "1")
                assert train.distill(recipe) == 0
        with pytest.raises(FolderInUseError):
            train.distill(recipe)
    assert train.distill(recipe) == 0 and len(ran) == 3


def test_a_cache_of_latents_is_waited_for(pictures, tmp_path, caplog):
    """Two runs may share a cache: the second one finds everything there."""
    cache, held, seen = tmp_path / "cache", threading.Event(), []

    def first():
        with hold(cache, "latents"):
            held.set()
            while "waiting for it" not in caplog.text and not seen:
                time.sleep(0.02)
            seen.extend(cache.glob("*/*.safetensors"))

    other = threading.Thread(target=first, daemon=True)
    other.start()
    assert held.wait(10)
    finetune(pictures, tmp_path / "run", f"cache_dir={cache}", "max_steps=1")
    other.join(10)
    assert "waiting for it" in caplog.text and not seen and len(list(cache.glob("*/*.safetensors"))) == 12


def test_the_same_evaluation_twice(tmp_path, capsys):
    """Another task may write to the same folder; the same one is refused before models are loaded."""
    from cleandift_backbones.cli.evaluate import main as evaluate

    for number in range(4):
        path = tmp_path / "data" / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * number, 9, 9)).save(path)
    words = ["retrieval", "--model", "pixels", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    words += ["--k", "1"]
    with hold(tmp_path / "out", "retrieval"):
        with pytest.raises(SystemExit) as stop:
            evaluate(words)
        assert stop.value.code == 2 and f"out is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".cleandift-retrieval.lock"]
    with hold(tmp_path / "out", "knn"):
        evaluate(words)
    assert not list(tmp_path.rglob(".cleandift*"))


def test_features_that_another_process_computes(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / f"{name}.png")
    a, b = (ImageSource(name, str(tmp_path / "data" / f"{name}.png")) for name in "ab")
    stores = FeatureStores(tmp_path / "stores", progress=False)
    one, two = load_extractor("pixels", size=64), load_extractor("pixels", size=96)
    stores.features(one, [a])
    (folder,) = (tmp_path / "stores").iterdir()
    with hold(folder, "share-0-of-1"):
        assert len(stores.features(one, [a])["pixels"]) == 1  # all there
        stores.features(two, [a])
        with pytest.raises(FolderInUseError, match="is in use by process"):
            stores.features(one, [b])


@pytest.mark.parametrize("tool", ["train_vae", "train_teacher", "train_latent_encoder", "make_pictures", "make_scenes"])
def test_tools_that_own_a_folder(tmp_path, tool, monkeypatch, capsys):
    module = __import__(f"tools.tiny.{tool}", fromlist=["main"])
    out = str(tmp_path / "out")
    words = ["--out", out]
    if tool.startswith("train"):
        words += ["--data", "data", "--max-steps", "1"] + (["--vae", "vae"] if tool == "train_teacher" else [])
    if tool == "make_pictures":
        monkeypatch.setattr(module, "find_packages", lambda *_: {})
        words += ["--packages", "packages"]
    before = contents(tmp_path)
    with hold(out):
        try:
            module.main(words)
            said = ""
        except FolderInUseError as error:
            said = str(error)
        except SystemExit as stop:
            assert stop.code == 2
            said = capsys.readouterr().err
        assert "is in use by process" in said
    assert contents(tmp_path) == before


def test_the_same_conversion_twice(tmp_path, capsys):
    from cleandift_backbones.checkpoints import save_native
    from tools.convert import main as convert

    model = timm.create_model("test_cleandift")
    save_native(model.state_dict(), tmp_path / "in.safetensors", {"model": "test_cleandift"})
    words = [str(tmp_path / "in.safetensors"), "--model", "test_cleandift", "--out", str(tmp_path / "a/native")]
    with hold(tmp_path / "a", "native"), pytest.raises(SystemExit):
        convert(words)
    assert "is in use by process" in capsys.readouterr().err
    assert convert(words) == 0 and [path.name for path in (tmp_path / "a").iterdir()] == ["native"]
