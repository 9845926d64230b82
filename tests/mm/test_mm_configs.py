"""Every shipped config is built; full-size ones on the meta device, where their heads meet the maps of the backbone."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.optim import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import init_default_scope

from cleandift_backbones.mm_checks import check_model

CONFIGS = Path(__file__).parents[2] / "configs"
SEG = sorted((CONFIGS / "mmseg").glob("*.py"))
DET = sorted((CONFIGS / "mmdet").glob("*.py"))
HEADS = {"mmseg": ("linear", "upernet", "fpn"), "mmdet": ("retinanet", "fcos", "mask-rcnn")}
DATA = {"mmseg": ("ade20k-512x512", "voc12aug-512x512", "scenes"), "mmdet": ("coco", "scenes")}
CLASSES = {"ade20k-512x512": 150, "voc12aug-512x512": 21, "coco": 80}


def build(path, **options):
    """The model of a config on the meta device, as if its weights had been loaded."""
    if path.parent.name == "mmdet":
        pytest.importorskip("mmcv.ops")
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    config.merge_from_dict({"model.backbone.pretrained": False, **options})
    with torch.device("meta"):
        model = MODELS.build(config.model)
    model.data_preprocessor = MODELS.build(config.model.data_preprocessor)  # with its numbers
    model.backbone.has_weights = model.backbone._seen_images = True
    return model, config


@pytest.mark.parametrize("kind", ["mmseg", "mmdet"])
def test_nothing_is_missing(kind):
    names = [path.name for path in sorted((CONFIGS / kind).glob("*.py"))]
    for head in HEADS[kind]:
        for variant in ("sd21-frozen", "sd21-finetune", "tiny"):
            for data in DATA[kind]:
                (_,) = (n for n in names if n.startswith(f"{head}_cleandift-{variant}_") and n.endswith(f"_{data}.py"))
    assert len(names) == 9 * len(DATA[kind])


@pytest.mark.parametrize("path", SEG + DET, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_heads_meet_the_maps(path):
    model, config = build(path)
    check_model(model)
    backbone = config.model.backbone
    frozen, finetuned = not path.stem.count("finetune"), bool(path.stem.count("finetune"))
    assert model.backbone.frozen == frozen and bool(backbone.get("with_cp")) == finetuned
    assert config.optim_wrapper.type == ("AmpOptimWrapper" if finetuned else "OptimWrapper")
    assert any(p.requires_grad for p in model.backbone.parameters()) == finetuned
    data = path.stem.split("_")[-1]
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, 3, 256, 320)
        kind = next(model.backbone.model.parameters()).dtype
        assert kind == (torch.bfloat16 if "sd21-frozen" in path.stem else torch.float32)
        for x, channels, stride in zip(model.backbone(images), model.backbone.out_channels, model.backbone.strides):
            assert x.shape == (1, channels, 256 // stride, 320 // stride)
        features = model.eval().extract_feat(images)
        if path.parent.name == "mmseg":
            assert model.decode_head(features).shape[1] == CLASSES.get(data, 6)
            if model.with_auxiliary_head:
                assert model.auxiliary_head(features).shape[1] == CLASSES.get(data, 6)
        else:
            assert len(features) == 5 and len({x.shape[1] for x in features}) == 1
            regions = hasattr(model, "roi_head")
            head = model.rpn_head if regions else model.bbox_head
            head(features)
            assert (model.roi_head.bbox_head if regions else head).num_classes == CLASSES.get(data, 5)


@pytest.mark.parametrize("path", [p for p in SEG + DET if "sd21-frozen" in p.stem], ids=lambda path: path.stem)
def test_frozen_checkpoints_are_small(path):
    """The weights; AdamW's two moments, which mmengine keeps beside them to resume, are twice as much again."""
    model, _ = build(path)
    assert model.backbone.save_frozen is False
    frozen = {f"backbone.{name}" for name in model.backbone.frozen_state()}
    state = model.state_dict()
    held = sum(t.numel() * t.element_size() for name, t in state.items() if name not in frozen)
    assert held < 100e6 < sum(t.numel() * t.element_size() for t in state.values())
    assert not any(name.startswith("backbone.") for name in set(state) - frozen)


@pytest.mark.parametrize("path", [SEG[0].with_name("upernet_cleandift-sd21-finetune_8xb2-80k_ade20k-512x512.py"),
                                  DET[0].with_name("retinanet_cleandift-sd21-finetune_fpn_8xb2-1x_coco.py")],
                         ids=["mmseg", "mmdet"])  # fmt: skip
def test_early_layers_learn_slowly(path):
    model, config = build(path)
    wrapper = dict(config.optim_wrapper, type="OptimWrapper")  # Amp's asserts a GPU
    wrapper.pop("dtype")
    paramwise = wrapper.pop("paramwise_cfg")
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(type="DefaultOptimWrapperConstructor", optim_wrapper_cfg=wrapper, paramwise_cfg=paramwise)
    )
    rates = {id(p): g["lr"] for g in constructor(model).optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    unet = "backbone.model.unet."
    blocks = ["conv_in", *(f"down_blocks.{i}" for i in range(4)), "mid_block"]
    blocks += [f"up_blocks.{i}" for i in range(len(model.backbone.model.unet.up_blocks))]
    found = [{rates[id(p)] for n, p in named.items() if n.startswith(unet + block)} for block in blocks]
    assert all(len(rate) == 1 for rate in found)
    found = [rate.pop() for rate in found]
    assert (
        found == sorted(found)
        and len(set(found)) == len(found)
        and found[-1] <= 0.1 * config.optim_wrapper.optimizer.lr
    )
    heads = {rates[id(p)] for n, p in named.items() if not n.startswith("backbone.")}
    assert heads == {config.optim_wrapper.optimizer.lr}


WRONG = [
    ("mmseg/linear_cleandift-tiny", {"model.backbone.out_indices": ["us9"]}, r"decode_head.in_channels is \[112\]"),
    ("mmseg/upernet_cleandift-tiny", {"model.decode_head.in_index": [0, 1, 2, 4]}, "in_index .*out of range"),
    ("mmseg/upernet_cleandift-tiny", {"model.auxiliary_head.in_channels": 80}, r"auxiliary_head.in_channels is \[80\]"),
    ("mmseg/fpn_cleandift-tiny", {"model.neck.in_channels": [80, 112, 112, 80]}, "neck.in_channels .*backbone gives"),
    ("mmseg/fpn_cleandift-tiny", {"model.decode_head.feature_strides": [4, 8, 16, 64]}, "feature_strides is"),
    ("mmseg/linear_cleandift-tiny", {"model.data_preprocessor.mean": [123.675, 116.28, 103.53]}, r"mean=\[127.5"),
    ("mmseg/linear_cleandift-tiny", {"model.data_preprocessor.bgr_to_rgb": False}, "BGR.*bgr_to_rgb=True"),
    ("mmdet/retinanet_cleandift-tiny", {"model.bbox_head.anchor_generator.strides": [8, 16, 32, 64, 128]},
     r"bbox_head.prior_generator.strides is \[8, 16, 32, 64, 128\], but the neck gives \[4, 8, 16, 32, 64\]"),
    ("mmdet/retinanet_cleandift-tiny", {"model.neck.start_level": 1}, "strides is"),
    ("mmdet/fcos_cleandift-tiny", {"model.bbox_head.in_channels": 256}, r"bbox_head.in_channels is \[256\].*\[64\]"),
    ("mmdet/mask-rcnn_cleandift-tiny", {"model.roi_head.mask_roi_extractor.featmap_strides": [8, 16, 32, 64]},
     r"mask_roi_extractor.featmap_strides is \[8, 16, 32, 64\], but the neck gives \[4, 8, 16, 32\]"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, message", WRONG)
def test_heads_that_do_not_fit(name, options, message):
    folder, start = name.split("/")
    (path,) = (
        p for p in (SEG if folder == "mmseg" else DET) if p.stem.startswith(f"{start}_") and p.stem.endswith("scenes")
    )
    model, _ = build(path, **options)
    with pytest.raises(ValueError, match=message):
        check_model(model)
