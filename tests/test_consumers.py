"""Whoever takes timm backbones takes these: segmentation_models_pytorch, transformers, torch.hub's archives."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import cleandift_backbones.publish.card as publishing

ROOT = Path(__file__).parents[1]
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


# --- segmentation_models_pytorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Unet", "FPN", "UPerNet", "Segformer"])
def test_smp_encoders(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, name)("tu-cleandift_tiny_pyramid", encoder_weights=True, classes=4)
    assert model(X).shape == (2, 4, 64, 96)
    model(X).mean().backward()
    encoder = model.encoder.model.model
    assert all(p.grad is not None for p in encoder.parameters()), "nothing unused is held"
    plain = timm.create_model("cleandift_tiny_pyramid", pretrained=True)
    assert torch.equal(encoder.unet.conv_in.weight, plain.unet.conv_in.weight)


@pytest.mark.parametrize("arch", ["sd15", "sd21"])
def test_smp_sizes_of_sd(arch):
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.device("meta"):
        model = smp.Unet(f"tu-cleandift_{arch}_pyramid", encoder_weights=None, classes=2)
        assert model(torch.empty(1, 3, 512, 512)).shape == (1, 2, 512, 512)
    assert list(model.encoder.out_channels) == [3, 128, 256, 640, 1280, 1280]


def test_smp_dpt():
    """DPT takes the four maps us9, us6, us3 and mid of the ordinary model, which must end at the finest of them."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.DPT("tu-cleandift_tiny", encoder_weights=True, classes=4, final_map="us9", decoder_readout="ignore")
    assert [model.encoder.model.feature_info[i]["name"] for i in model.encoder._output_indices] == [
        "us9", "us6", "us3", "mid",
    ]  # fmt: skip
    assert model(X).shape[:2] == (2, 4)


def test_smp_preprocessing():
    smp = pytest.importorskip("segmentation_models_pytorch")
    params = smp.encoders.get_preprocessing_params("tu-cleandift_sd21_pyramid")
    assert params["mean"] == params["std"] == [0.5, 0.5, 0.5] and params["input_space"] == "RGB"


# --- transformers -------------------------------------------------------------------------------------------------


def test_auto_backbone(hub):
    """Both ways load the package's weights. transformers ignores `use_pretrained_backbone` of the config."""
    from transformers import AutoBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="cleandift_tiny", out_indices=[4, 10])
    built = AutoBackbone.from_config(config, pretrained=True).eval()
    loaded = AutoBackbone.from_pretrained("cleandift_tiny", use_timm_backbone=True, out_indices=(4, 10)).eval()
    expected = timm.create_model("cleandift_tiny", pretrained=True, features_only=True, out_indices=(4, 10)).eval()
    for backbone in (built, loaded):
        assert backbone.channels == [112, 112]
        with torch.no_grad():
            for found, wanted in zip(backbone(X).feature_maps, expected(X), strict=True):
                torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("arguments", [{}, dict(final_map="us6")])
def test_timm_wrapper(tmp_path, arguments):
    from transformers import AutoImageProcessor, AutoModel

    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", **arguments).eval()
    model.timestep.fill_(100.5)
    folder = publishing.save_folder(model, tmp_path / "folder")
    wrapped = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = wrapped(X)
        torch.testing.assert_close(found.last_hidden_state, model.forward_features(X))
        torch.testing.assert_close(found.pooler_output, model(X))
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(torch.zeros(3, 200, 300, dtype=torch.uint8).numpy().transpose(1, 2, 0))["pixel_values"]
    assert float(pixels.max()) == -1  # black, with mean and std of 0.5


def test_timm_wrapper_classifies(tmp_path):
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", num_classes=5).eval()
    folder = publishing.save_folder(model, tmp_path / "folder")
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(X).logits, model(X))


# --- torch.hub ----------------------------------------------------------------------------------------------------


SCRIPT = """
import shutil, sys, timm, torch, torch.hub
archive, home = sys.argv[1:]
torch.hub.set_dir(home)
def download(url, path, *args, **kwargs):  # what torch.hub fetches, from here
    assert url == "https://github.com/OWNER/REPO/zipball/main", url
    shutil.copy(archive, path)
torch.hub.download_url_to_file = download
options = dict(trust_repo=True, skip_validation=True, verbose=False)
model = torch.hub.load("OWNER/REPO:main", "cleandift_tiny", pretrained=True, features_only=True, **options).eval()
import cleandift_backbones
assert cleandift_backbones.__file__.startswith(home), cleandift_backbones.__file__
assert "cleandift_sd21" in torch.hub.list("OWNER/REPO:main", **options)
torch.manual_seed(0)
with torch.no_grad():
    print([round(x.abs().sum().item(), 1) for x in model(torch.rand(1, 3, 64, 64) * 2 - 1)])
"""


def test_torch_hub_from_an_archive(tmp_path):
    """As torch.hub.load("OWNER/REPO", ...) does it: an archive is fetched, unpacked and imported, in a new process."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    with zipfile.ZipFile(tmp_path / "repo.zip", "w") as archive:
        archive.writestr("REPO-main/", "")
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                archive.write(ROOT / name, f"REPO-main/{name}")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "repo.zip"), str(tmp_path / "home")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    torch.manual_seed(0)
    model = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        expected = [round(x.abs().sum().item(), 1) for x in model(torch.rand(1, 3, 64, 64) * 2 - 1)]
    assert run.stdout.strip().splitlines()[-1] == str(expected)
