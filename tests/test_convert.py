"""tools/convert.py: a diffusers folder becomes a native file with equal maps."""

import json
import shutil

import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open

from cleandift_backbones.models import ARCHITECTURES, ASSETS
from cleandift_backbones.unet import FeatureUNet
from tools.convert import main

TINY = ARCHITECTURES["tiny"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    UNet2DConditionModel(**TINY["unet"]).save_pretrained(folder / "unet")
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    AutoencoderKL(**TINY["vae"], **blocks).save_pretrained(folder / "vae")
    DDIMScheduler(**TINY["scheduler"]).save_pretrained(folder / "scheduler")
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(ASSETS / "tiny_text" / part, folder / part)
    return folder


def test_equal_maps(source, tmp_path):
    out = tmp_path / "native.safetensors"
    assert main([str(source), "--model", "dift_tiny", "--out", str(out), "--dtype", "float32"]) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata()["model"] == "dift_tiny"
        names = list(file.keys())
    assert not [n for n in names if n.startswith(("vae.decoder", "unet.conv_out"))]
    model = timm.create_model(
        "cleandift_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(out)), features_only=True
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(source / "vae").eval()
        latents = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        unet = FeatureUNet.from_pretrained(source / "unet").eval()
        expected = unet(latents, 261, model.model.prompt_embeds, ["us9", "us6", "us3", "mid"])
        for a, b in zip(reversed(model(x)), expected.values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_refusals(source, tmp_path, capsys):
    out = tmp_path / "native.safetensors"

    def refused(folder, message, model="dift_tiny"):
        with pytest.raises(SystemExit) as stop:
            main([str(folder), "--model", model, "--out", str(out)])
        assert stop.value.code == 2 and message in capsys.readouterr().err and not out.exists()

    refused(tmp_path, "has no unet/diffusion_pytorch_model.safetensors")
    refused(source, "block_out_channels is [48, 80, 112, 112], the model has", model="dift_sd15")
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    config = json.loads((changed / "vae/config.json").read_text()) | {"scaling_factor": 0.5}
    (changed / "vae/config.json").write_text(json.dumps(config))
    refused(changed, "scaling_factor is 0.5")
