"""What configs of mmsegmentation and mmdetection need to know; neither is needed here."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from cleandift_backbones import mm_checks
from cleandift_backbones.mm_checks import check_launcher, check_model, check_packages, describe, model_names
from cleandift_backbones.utils.errors import StateError


@pytest.mark.parametrize("name", model_names())
def test_described_as_built(name):
    described = describe(name)
    with torch.device("meta"):
        built = timm.create_model(name, features_only=True)
    assert described.out_channels == built.feature_info.channels()
    assert described.strides == built.feature_info.reduction()
    assert described.names == [info["name"] for info in built.feature_info.get_dicts()]


def test_maps_by_index_and_by_name():
    assert describe("cleandift_sd21", ["mid", "us6", -4]) == (
        ["mid", "us6", "us3"], [10, 4, 7], [1280] * 3, [64, 16, 32],
    )  # fmt: skip
    assert describe("cleandift_sd21", 2).names == ["us1", "mid"]
    assert describe("cleandift_sd21_pyramid", ["vae4", "us9"]).strides == [4, 8]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet50",), "unknown model_name 'resnet50': it is one of cleandift_sd15.*pretrained="),
        (("cleandift_tiny", [11]), "out_indices.*11.*0 = us10"),
        (("cleandift_tiny", ["us11"]), "no map 'us11'. This model has 0 = us10, 1 = us9"),
        (("cleandift_tiny", []), "out_indices"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        describe(*arguments)


def test_package_imports_no_mmengine():
    code = "import sys, cleandift_backbones, cleandift_backbones.mm_checks as m; m.describe('cleandift_tiny'); "
    code += "assert not {'mmengine', 'cleandift_backbones.registry'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


FORKS = ["onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation"]


@pytest.mark.parametrize(
    "installed, message",
    [
        ([], r'pip install "cleandift_backbones\[mmseg\]"'),
        (
            [*FORKS, "mmcv-lite"],
            "onedl-mmcv and mmcv-lite are both.*pip uninstall onedl-mmcv mmcv-lite, .*install onedl-",
        ),
        ([*FORKS, "mmdet"], "do not work with mmdet .*pip uninstall mmdet, then pip install onedl-mmdetection"),
        (["mmengine", "onedl-mmcv"], "do not work with mmengine.*uninstall mmengine, then pip install onedl-mmengine"),
        (FORKS, None),
        (["mmengine", "mmcv", "mmsegmentation", "mmdet"], None),
    ],
)
def test_families_of_packages(monkeypatch, installed, message):
    monkeypatch.setattr(mm_checks, "_installed", lambda name: name in installed)
    if message is None:
        return check_packages()
    with pytest.raises(ImportError, match=message):
        check_packages()


def test_installed_is_read_from_metadata():
    assert mm_checks._installed("timm") and not mm_checks._installed("no-such-package")


# --- heads that do not fit: mmsegmentation's and mmdetection's own are in test_mm_configs.py ------------------------


def segmentor(**head):
    """As much of a segmentor as is looked at."""
    return SimpleNamespace(
        backbone=SimpleNamespace(out_channels=[640, 1280], strides=[8, 16]),
        decode_head=SimpleNamespace(**{"in_channels": [640, 1280], "in_index": [0, 1], **head}),
    )


def test_a_head_that_fits():
    check_model(segmentor())
    check_model(segmentor(in_channels=1280, in_index=-1, feature_strides=[4]))
    check_model(SimpleNamespace(backbone=torch.nn.Identity()))  # another backbone: none of our business


def test_what_is_not_known_is_not_judged():
    """CenterNet's neck overwrites its in_channels as it is built; BoxInst's mask head takes maps of its own."""
    maps = SimpleNamespace(out_channels=[1280], strides=[16])
    check_model(SimpleNamespace(backbone=maps, neck=SimpleNamespace(in_channels=64)))
    check_model(SimpleNamespace(backbone=maps, mask_head=SimpleNamespace(in_channels=16)))


@pytest.mark.parametrize(
    "head, message",
    [
        (
            dict(in_channels=[320, 1280]),
            r"decode_head.in_channels is \[320, 1280\], but the backbone gives \[640, 1280\]",
        ),
        (dict(in_index=[0, 2]), r"in_index \[0, 2\].* out of range: it gets 2 maps"),
        (dict(feature_strides=[4, 16]), r"feature_strides is \[8, 32\], but the backbone gives \[8, 16\]"),
        (dict(in_channels=1280, input_transform="resize_concat"), r"in_channels is \[1280\], but .* \[1920\]"),
    ],
)
def test_a_head_that_does_not_fit(head, message):
    with pytest.raises(ValueError, match=message):
        check_model(segmentor(**head))


@pytest.mark.parametrize("given", [["--launcher", "pytorch"], ["--launcher=slurm"], ["--launcher", "none"], []])
@pytest.mark.parametrize("gpu", [True, False])
def test_launchers_without_a_gpu_are_refused(given, gpu, monkeypatch):
    """mmengine would end in "Found no NVIDIA driver", with any backend."""
    monkeypatch.setattr(sys, "argv", ["train.py", "config.py", *given])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    if gpu or not given or "none" in given:
        check_launcher()
    else:
        with pytest.raises(StateError, match="--launcher (pytorch|slurm): .* start one process, without torchrun"):
            check_launcher()
