"""mmsegmentation itself on the shipped configs: trained, validated, saved, resumed, used on small labelled scenes."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("mmseg")
pytest.importorskip("mmcv")

import mmseg
from mm_runs import ROOT, make_scenes, shortened, train
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS

from cleandift_backbones.checkpoints import save_native
from cleandift_backbones.mm.backbone import RECORD, CleanDIFT

TOOLS = Path(mmseg.__file__).parent / ".mim" / "tools"
FEW = {"train_cfg.max_iters": 2, "train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 2}
KEPT = {"backbone." + RECORD}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def picture_of(scenes):
    return str(next((scenes / "images" / "val").iterdir()))


def test_in_the_registry_of_mmseg():
    for name in ("CleanDIFT", "cleandift_backbones.CleanDIFT", "cleandift_backbones.mm.CleanDIFT"):
        assert MODELS.get(name) is ROOT_MODELS.get(name) is CleanDIFT


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "upernet", "fpn"])
def test_a_family_is_trained_resumed_and_used(head, scenes, tmp_path):
    name = f"mmseg/{head}_cleandift-tiny_1xb8-500_scenes.py"
    runner = train(shortened(name, scenes, tmp_path / "run", **FEW))
    score = runner.message_hub.get_scalar("val/mIoU").current()
    assert 0 < score < 100
    saved = torch.load(tmp_path / "run" / "iter_2.pth", weights_only=False)
    assert {n for n in saved["state_dict"] if n.startswith("backbone.")} == KEPT
    before = {n: p.clone() for n, p in runner.model.named_parameters()}

    longer = {"train_cfg.max_iters": 3, "resume": True}
    resumed = train(shortened(name, scenes, tmp_path / "run", **{**FEW, **longer}))
    assert resumed.iter == 3
    changed = {n.split(".")[0] for n, p in resumed.model.named_parameters() if not torch.equal(p, before[n])}
    assert "decode_head" in changed and "backbone" not in changed

    weights = str(tmp_path / "run" / "iter_2.pth")
    tested = Runner.from_cfg(shortened(name, scenes, tmp_path / "test", load_from=weights)).test()
    assert tested["mIoU"] == pytest.approx(score, abs=0.02)  # reported with two digits

    model = init_model(shortened(name, scenes, tmp_path), weights, device="cpu")
    found = inference_model(model, picture_of(scenes)).pred_sem_seg.data
    assert found.shape == (1, 64, 64) and model.dataset_meta["classes"][1] == "face"
    inferencer = MMSegInferencer(shortened(name, scenes, tmp_path), weights, device="cpu", classes=None)
    result = inferencer(picture_of(scenes), out_dir=str(tmp_path / "out"), show=False)
    np.testing.assert_array_equal(result["predictions"], found[0].numpy())
    (drawn,) = (tmp_path / "out" / "vis").iterdir()
    assert Image.open(drawn).size == (64, 64)


@pytest.mark.slow
def test_fine_tuning(scenes, tmp_path):
    """The recipe for sd21 on the small model: the UNet learns, the VAE does not, and checkpoints hold all of it."""
    config = shortened("mmseg/linear_cleandift-sd21-finetune_1xb8-500_scenes.py", scenes, tmp_path, **FEW)
    config.optim_wrapper.type = "OptimWrapper"  # Amp's asserts a GPU
    config.optim_wrapper.pop("dtype")
    config.model.backbone.model_name = "cleandift_tiny"
    config.model.decode_head.in_channels = config.model.decode_head.channels = 112
    runner = train(config)
    start = timm.create_model("cleandift_tiny", pretrained=True, final_map="us6").state_dict()
    state = {n: t for n, t in runner.model.backbone.model.state_dict().items() if n in start}
    moved = {n.split(".")[0] for n, t in state.items() if not torch.equal(t, start[n])}
    assert moved == {"unet"}
    model = init_model(config, str(tmp_path / "iter_2.pth"), device="cpu")
    assert torch.equal(model.backbone.model.unet.conv_in.weight, state["unet.conv_in.weight"])


def as_ade(scenes, folder):
    for split, ade in (("train", "training"), ("val", "validation")):
        for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
            (folder / kind / ade).mkdir(parents=True)
            for file in sorted((scenes / kind / split).iterdir())[:2]:
                Image.open(file).save(folder / kind / ade / f"{file.stem}{suffix}")


def as_voc(scenes, folder):
    lists = folder / "ImageSets" / "Segmentation"
    for path in (folder / "JPEGImages", folder / "SegmentationClass", folder / "SegmentationClassAug", lists):
        path.mkdir(parents=True)
    for split, name, labels in (("train", "train", ""), ("train", "aug", "Aug"), ("val", "val", "")):
        files = sorted((scenes / "images" / split).iterdir())[:2]
        for file in files:
            Image.open(file).save(folder / "JPEGImages" / f"{name}{file.stem}.jpg")
            mask = scenes / "annotations" / split / file.name
            shutil.copy(mask, folder / f"SegmentationClass{labels}" / f"{name}{file.name}")
        (lists / f"{name}.txt").write_text("".join(f"{name}{file.stem}\n" for file in files))


@pytest.mark.slow
@pytest.mark.parametrize("data, lay_out", [("ade20k", as_ade), ("voc12aug", as_voc)])
def test_layouts_of_ade20k_and_voc(data, lay_out, scenes, tmp_path):
    """Folders as these data sets have them: their classes, pipelines and schedules run as they are shipped."""
    lay_out(scenes, tmp_path / "data")
    path = f"mmseg/linear_cleandift-tiny_8xb2-80k_{data}-512x512.py"
    config = Config.fromfile(ROOT / "configs" / path)
    root = config.data_root
    text = config.pretty_text.replace(root, str(tmp_path / "data"))
    (tmp_path / "config.py").write_text(text)
    config = Config.fromfile(tmp_path / "config.py")
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False
    config.merge_from_dict({**FEW, "work_dir": str(tmp_path / "run"), "visualizer.name": data})
    config.train_cfg.max_iters = config.train_cfg.val_interval = 1
    assert train(config).message_hub.get_scalar("val/mIoU").current() >= 0


@pytest.mark.slow
def test_the_tools_of_mmsegmentation(scenes, tmp_path):
    """Command lines as docs/mm.md shows them, from a folder that is not the checkout."""
    config = shortened("mmseg/linear_cleandift-tiny_1xb8-500_scenes.py", scenes, tmp_path / "run", **FEW)
    config.dump(tmp_path / "config.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def tool(name, *arguments):
        command = [sys.executable, str(TOOLS / name), "config.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    tool("train.py", "--work-dir", "work")
    assert (tmp_path / "work" / "iter_2.pth").is_file()
    options = ["train_cfg.max_iters=3", "train_dataloader.batch_size=1"]
    assert "Iter(train) [3/3]" in tool("train.py", "--work-dir", "work", "--resume", "--cfg-options", *options)
    assert "mIoU" in tool("test.py", "work/iter_2.pth", "--show-dir", "drawn")
    assert list((tmp_path / "work").rglob("drawn/**/*.png")) or list(tmp_path.rglob("drawn/**/*.png"))


PAGE = (ROOT / "docs" / "mm.md").read_text()


@pytest.mark.slow
def test_python_blocks_of_the_page(scenes, tmp_path, monkeypatch):
    train(shortened("mmseg/linear_cleandift-tiny_1xb8-500_scenes.py", scenes, tmp_path / "runs" / "linear", **FEW))
    (tmp_path / "runs" / "linear" / "iter_2.pth").rename(tmp_path / "runs" / "linear" / "iter_500.pth")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), "mm.md", "exec"), names)
    assert names["maps"].strides == [4, 8, 16, 32] and names["labels"].shape == (1, 64, 64)
    assert list((tmp_path / "drawn" / "vis").iterdir())


@pytest.mark.parametrize("line", re.findall(r"^(?:python|bash) \$MM\w+/.*$", PAGE, re.M))
def test_command_lines_of_the_page(line, monkeypatch, capsys):
    """The tools are there, their parsers take the arguments, and the configs exist."""
    program, tool, *arguments = line.split()
    package = pytest.importorskip(re.match(r"\$(MM\w+)", tool)[1].lower())
    path = Path(package.__file__).parent / ".mim" / "tools" / Path(tool).name
    assert path.is_file() and (ROOT / arguments[0]).is_file()
    if program == "python":
        monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--surely-unknown"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
        assert "error: unrecognized arguments: --surely-unknown\n" in capsys.readouterr().err


def test_the_hook_stops_a_run_before_it_starts(scenes, tmp_path):
    config = shortened("mmseg/linear_cleandift-tiny_1xb8-500_scenes.py", scenes, tmp_path)
    config.model.backbone.out_indices = ["us9"]
    with pytest.raises(ValueError, match=r"decode_head.in_channels is \[112\], but the backbone gives \[80\]"):
        train(config)
    config.model.backbone.out_indices = ["us6"]
    config.model.data_preprocessor.std = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="data_preprocessor has mean and std"):
        train(config)


@ROOT_MODELS.register_module()
class Pixels(BaseModule):
    """Raw pixels as features: blocks of 8 x 8, the stride of us6."""

    def forward(self, x):
        return (F.pixel_unshuffle(x, 8),)


@pytest.mark.slow
def test_linear_probe_beats_raw_pixels_and_random_weights(tmp_path):
    """One 1 x 1 convolution, 60 steps of 8 pictures; the drawings of the validation are not among them."""
    data = make_scenes(tmp_path / "scenes", "--size", "96", "--train", "120", "--val", "24")
    torch.manual_seed(0)
    save_native(timm.create_model("cleandift_tiny", final_map="us10").state_dict(), tmp_path / "random.safetensors")
    kinds = {
        "clean": {},
        "random": {"model.backbone.pretrained": str(tmp_path / "random.safetensors")},
        "pixels": {"model.decode_head.in_channels": 192, "model.decode_head.channels": 192},
    }
    scores = {}
    for kind, options in kinds.items():
        steps = {"train_cfg.max_iters": 60, "train_cfg.val_interval": 60, "param_scheduler.1.end": 60}
        rate = {"optim_wrapper.optimizer.lr": 5e-3, "train_dataloader.batch_size": 8}
        name = "mmseg/linear_cleandift-tiny_1xb8-500_scenes.py"
        config = shortened(name, data, tmp_path / kind, **steps, **rate, **options)
        if kind == "pixels":
            config.model.backbone = dict(type="Pixels")
        scores[kind] = train(config).message_hub.get_scalar("val/mIoU").current()
    print(scores)
    assert scores["clean"] > 10 + max(scores["random"], scores["pixels"]), scores
