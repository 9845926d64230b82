"""The latent encoder against diffusers' own AutoencoderKL."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.models.latents import LatentEncoder


def pair(arch):
    config = ARCHITECTURES[arch].vae
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    vae = AutoencoderKL(**config, **blocks).eval()
    encoder = LatentEncoder(config).eval()
    state = vae.state_dict()
    encoder.load_state_dict({k: v for k, v in state.items() if k.startswith(("encoder.", "quant_conv."))})
    return vae, encoder


@pytest.mark.parametrize("arch", ["test", "tiny"])
def test_equals_diffusers_posterior_mean(arch):
    vae, encoder = pair(arch)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        latents, maps = encoder(x)
    torch.testing.assert_close(latents, expected)
    assert maps == {} and not any("decoder" in name for name in encoder.state_dict())


def test_odd_sizes_repeat_the_edge():
    _, encoder = pair("test")
    x = torch.rand(1, 3, 65, 78)
    latents, _ = encoder(x)
    assert latents.shape == (1, 4, 9, 10)
    torch.testing.assert_close(latents, encoder(F.pad(x, (0, 2, 0, 7), mode="replicate"))[0])


def test_stage_maps():
    vae, encoder = pair("test")
    x = torch.rand(1, 3, 64, 64)
    _, maps = encoder(x, ["vae2", "vae4"])
    reference = vae.encoder.conv_in(x)
    for name, block in zip(("vae2", "vae4"), vae.encoder.down_blocks):
        reference = block(reference)
        torch.testing.assert_close(maps[name], reference)
    assert [m.shape[1:] for m in maps.values()] == [(2, 32, 32), (2, 16, 16)]
    assert encoder.map_infos == {"vae2": (2, 2), "vae4": (2, 4)}
