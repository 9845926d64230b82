"""mmdetection itself on the shipped configs: trained, validated, saved, resumed, used on small labelled scenes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmcv.ops", reason="detection needs compiled operators: tools/build_mmcv.sh", exc_type=ImportError)

import mmdet
from mm_runs import make_scenes, shortened, train
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import Runner

from cleandift_backbones.mm.backbone import RECORD, CleanDIFT

TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
FEW = {
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    "default_hooks.checkpoint.interval": 1,
    "param_scheduler.1.end": 20,
}
HEADS = ("retinanet", "fcos", "mask-rcnn")
ANY = {  # a few steps give no confident boxes; without boxes there is no mAP
    "retinanet": {"model.test_cfg.score_thr": 0.0},
    "fcos": {"model.test_cfg.score_thr": 0.0},
    "mask-rcnn": {"model.test_cfg.rcnn.score_thr": 0.0},
}
SCORE = {"retinanet": "bbox_mAP", "fcos": "bbox_mAP", "mask-rcnn": "segm_mAP"}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def picture_of(scenes):
    return str(next((scenes / "images" / "val").iterdir()))


def test_in_the_registry_of_mmdet():
    for name in ("CleanDIFT", "cleandift_backbones.CleanDIFT", "cleandift_backbones.mm.CleanDIFT"):
        assert MODELS.get(name) is ROOT_MODELS.get(name) is CleanDIFT


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_family_is_trained_resumed_and_used(head, scenes, tmp_path):
    name, few = f"mmdet/{head}_cleandift-tiny_fpn_1xb8-20e_scenes.py", {**FEW, **ANY[head]}
    runner = train(shortened(name, scenes, tmp_path / "run", **few))
    score = runner.message_hub.get_scalar(f"val/coco/{SCORE[head]}").current()
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert all(0 < loss < 100 for loss in losses) and -1 <= score <= 1
    saved = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=False)["state_dict"]
    assert {n for n in saved if n.startswith("backbone.")} == {"backbone." + RECORD}
    before = {n: p.clone() for n, p in runner.model.named_parameters()}

    resumed = train(shortened(name, scenes, tmp_path / "run", **{**few, "train_cfg.max_epochs": 2, "resume": True}))
    assert resumed.epoch == 2
    changed = {n.split(".")[0] for n, p in resumed.model.named_parameters() if not torch.equal(p, before[n])}
    assert "neck" in changed and "backbone" not in changed

    weights = str(tmp_path / "run" / "epoch_1.pth")
    tested = Runner.from_cfg(shortened(name, scenes, tmp_path / "test", load_from=weights, **few)).test()
    assert tested[f"coco/{SCORE[head]}"] == pytest.approx(score, abs=2e-3)

    config = shortened(name, scenes, tmp_path, **few)
    model = init_detector(config, weights, device="cpu")
    found = inference_detector(model, picture_of(scenes)).pred_instances
    assert ("masks" in found) == (head == "mask-rcnn") and model.dataset_meta["classes"][0] == "face"
    inferencer = DetInferencer(shortened(name, scenes, tmp_path, **few), weights, device="cpu", show_progress=False)
    result = inferencer(picture_of(scenes), out_dir=str(tmp_path / "out"), pred_score_thr=0.0)
    assert len(result["predictions"][0]["scores"]) == len(found)
    (drawn,) = (tmp_path / "out" / "vis").iterdir()
    assert Image.open(drawn).size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_layout_of_coco(head, scenes, tmp_path):
    """A folder as COCO has it, with classes of COCO's names; pictures smaller than the config's."""
    kinds = CocoDataset.METAINFO["classes"]
    ours = [kinds.index(name) + 1 for name in ("person", "cat", "cake", "bus", "clock")]
    data = tmp_path / "coco"
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (data / f"{split}2017").symlink_to(scenes / "images" / split)
        labels = json.loads((scenes / f"{split}.json").read_text())
        labels["categories"] = [dict(id=i, name=name) for i, name in enumerate(kinds, 1)]
        for annotation in labels["annotations"]:
            annotation["category_id"] = ours[annotation["category_id"] - 1]
        (data / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(labels))
    config = shortened(f"mmdet/{head}_cleandift-tiny_fpn_8xb2-1x_coco.py", data, tmp_path / "run", **FEW, **ANY[head])
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        (resize,) = (step for step in loader.dataset.pipeline if step.type == "Resize")
        resize.scale = (96, 64)
    runner = train(config)
    assert -1 <= runner.message_hub.get_scalar(f"val/coco/{SCORE[head]}").current() <= 1
    assert len(runner.train_dataloader.dataset) > 0 and len(runner.visualizer.dataset_meta["classes"]) == 80


@pytest.mark.slow
def test_fine_tuning(scenes, tmp_path):
    """The recipe for sd21 on the small model: the UNet learns, the VAE does not."""
    config = shortened("mmdet/retinanet_cleandift-sd21-finetune_fpn_1xb8-20e_scenes.py", scenes, tmp_path, **FEW)
    config.optim_wrapper.type = "OptimWrapper"  # Amp's asserts a GPU
    config.optim_wrapper.pop("dtype")
    config.model.backbone.model_name = "cleandift_tiny"
    config.model.neck.in_channels = [80, 112, 112, 112]
    config.model.bbox_head.anchor_generator.strides = [4, 8, 16, 32, 64]
    runner = train(config)
    start = CleanDIFT("cleandift_tiny").model.state_dict()
    moved = {
        n.split(".")[0] for n, t in runner.model.backbone.model.state_dict().items() if not torch.equal(t, start[n])
    }
    assert moved == {"unet"}


@pytest.mark.slow
def test_the_tools_of_mmdetection(scenes, tmp_path):
    """Command lines as docs/mm.md shows them, from a folder that is not the checkout."""
    config = shortened(
        "mmdet/retinanet_cleandift-tiny_fpn_1xb8-20e_scenes.py", scenes, tmp_path / "run", **FEW, **ANY["retinanet"]
    )
    config.dump(tmp_path / "config.py")

    def tool(name, *arguments):
        command = [sys.executable, str(TOOLS / name), "config.py", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    tool("train.py", "--work-dir", "work")
    assert "bbox_mAP" in tool("test.py", "work/epoch_1.pth", "--show-dir", "drawn")
    assert list(tmp_path.rglob("drawn/**/*.png"))
