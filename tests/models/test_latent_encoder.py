"""The light latent encoder: against diffusers' own AutoencoderTiny, in models, from disk and from the Hub."""

import json
from functools import cache

import pytest
import standins
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save
from torch.utils.flop_counter import FlopCounterMode

from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints import CheckpointError
from cleandift_backbones.models.architectures import ARCHITECTURES, published
from cleandift_backbones.models.latent_encoders import load_latent_encoder
from cleandift_backbones.models.latents import LatentEncoder, TinyLatentEncoder
from cleandift_backbones.publish import card
from cleandift_backbones.publish.convert import to_native

X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
PLACE = "taesd/taesd/diffusion_pytorch_model.safetensors"


@cache
def taesd(arch="test"):
    """diffusers' whole model, whose file is published."""
    torch.manual_seed(5)
    config = ARCHITECTURES[arch].vae_tiny
    width = config["encoder_block_out_channels"]
    return AutoencoderTiny(**config, decoder_block_out_channels=width, num_decoder_blocks=(1,) * len(width)).eval()


def encoder_of(arch="test"):
    encoder = TinyLatentEncoder(ARCHITECTURES[arch].vae_tiny)
    encoder.load_state_dict({k: v for k, v in taesd(arch).state_dict().items() if k.startswith("encoder.")})
    return encoder.eval()


def published_file():
    return save({name: tensor.contiguous() for name, tensor in taesd().state_dict().items()})


@pytest.fixture
def sources(tmp_path):
    """Parts in files: a UNet, AutoencoderTiny's file, and what else a model needs."""
    (tmp_path / "unet.safetensors").write_bytes(standins.compvis_unet())
    (tmp_path / "full.safetensors").write_bytes(standins.compvis_full())
    (tmp_path / "taesd.safetensors").write_bytes(published_file())
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    parts = dict(unet="unet.safetensors", timestep="full.safetensors", vae="taesd.safetensors")
    return {part: str(tmp_path / name) for part, name in parts.items()} | dict(text_encoder=str(folder))


def create(sources, **kwargs):
    options = dict(pretrained=True, features_only=True, latent_encoder="tiny", sources=sources)
    return timm.create_model("test_cleandift", **{**options, **kwargs}).eval()


# --- the encoder ---


@pytest.mark.parametrize("arch", ["test", "tiny", "sd21"])
def test_equals_diffusers(arch):
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        latents, maps = encoder_of(arch)(x)
        expected = taesd(arch).encode(x).latents * taesd(arch).config.scaling_factor
    torch.testing.assert_close(latents, expected)
    assert maps == {}


def test_published_configuration():
    """TAESD's: diffusers' defaults."""
    config = TinyLatentEncoder(ARCHITECTURES["sd15"].vae_tiny)
    like = AutoencoderTiny()
    assert config.state_dict().keys() == {name for name in like.state_dict() if name.startswith("encoder.")}
    assert like.config.scaling_factor == config.scaling_factor == 1
    for arch in ("sd15", "sd21"):
        assert published(f"cleandift_{arch}")["vae_tiny"] == "madebyollin/taesd/diffusion_pytorch_model.safetensors"


def test_odd_sizes_repeat_the_edge():
    encoder, x = encoder_of(), torch.rand(1, 3, 65, 78)
    latents, maps = encoder(x, ["vae2", "vae4"])
    assert latents.shape == (1, 4, 9, 10)
    torch.testing.assert_close(latents, encoder(F.pad(x, (0, 2, 0, 7), mode="replicate"))[0])
    assert [m.shape[1:] for m in maps.values()] == [(4, 33, 39), (4, 17, 20)]


def test_stage_maps():
    encoder, layers = encoder_of("sd21"), taesd("sd21").encoder.layers
    _, maps = encoder(X, ["vae2", "vae4"])
    assert encoder.map_infos == {"vae2": (64, 2), "vae4": (64, 4)}
    torch.testing.assert_close(maps["vae2"], layers[:6](X.add(1).div(2)))  # 1 + 1 block, 1 + 3 blocks
    torch.testing.assert_close(maps["vae4"], layers[:10](X.add(1).div(2)))


# --- in models ---


def test_default_is_what_it_was():
    torch.manual_seed(0)
    plain = timm.create_model("test_cleandift")
    torch.manual_seed(0)
    named = timm.create_model("test_cleandift", latent_encoder="default")
    assert isinstance(plain.vae, LatentEncoder) and all(map(torch.equal, plain.parameters(), named.parameters()))
    with pytest.raises(ValueError, match="latent_encoder must be 'default' .* or 'tiny' .*, got 'taesd'"):
        timm.create_model("test_cleandift", latent_encoder="taesd")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = timm.create_model("test_cleandift", latent_encoder="tiny", features_only=True, dtype=dtype).eval()
    with torch.no_grad():
        assert all(m.dtype == dtype and m.isfinite().all() for m in model(X.to(dtype)))


def test_gradient_checkpointing_is_exact():
    model = timm.create_model("test_cleandift", latent_encoder="tiny", final_map="us10")
    found = []
    for enabled in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enabled)
        out = model(X)
        out.square().mean().backward()
        found.append([out, *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    assert all(p.grad.abs().sum() > 0 for p in model.vae.parameters() if p.ndim > 1)


def test_compiles_and_exports():
    model = timm.create_model("test_cleandift", latent_encoder="tiny", features_only=True).eval()
    with torch.no_grad():
        expected = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
        exported = torch.export.export(model, (X,)).module()(X)
    for plain, one, other in zip(expected, compiled, exported):
        torch.testing.assert_close(plain, one)
        torch.testing.assert_close(plain, other)


def test_the_noisy_baseline_and_pyramids():
    noisy = timm.create_model("dift_tiny", latent_encoder="tiny", features_only=True, ensemble_size=1)
    assert [m.shape[-1] for m in noisy(X)] == [16, 8, 4, 2]
    pyramid = timm.create_model("cleandift_tiny_pyramid", latent_encoder="tiny", features_only=True)
    assert pyramid.feature_info.channels() == [32, 80, 112, 112, 112]
    assert pyramid.feature_info.reduction() == [2, 4, 8, 16, 32]
    for info, found in zip(pyramid.feature_info.get_dicts(), pyramid(X)):
        assert found.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
        assert pyramid.model.get_submodule(info["module"]) is not None


def test_less_work_than_the_vae():
    """GFLOP of TAESD's encoder and of Stable Diffusion's at 512 px, by torch's counter on the meta device."""
    work = {}
    for name, encoder in (("vae", LatentEncoder), ("vae_tiny", TinyLatentEncoder)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encoder(getattr(ARCHITECTURES["sd21"], name))(torch.zeros(1, 3, 512, 512))
        work[name] = counter.get_total_flops() / 1e9
    assert 1116 < work["vae"] < 1118 and work["vae_tiny"] < 0.12 * work["vae"]


# --- weights ---


def test_published_parts(sources):
    model = create(sources)
    latents = taesd().encode(X).latents
    with torch.no_grad():
        torch.testing.assert_close(model.model.vae(X)[0], latents)
    assert model.model.pretrained_cfg["first_conv"] == "vae.encoder.layers.0"
    assert model.model.timestep == standins.TIMESTEP


def test_from_the_hub(hub, sources, monkeypatch):
    hub.place("taesd/taesd", {"diffusion_pytorch_model.safetensors": published_file()})
    rest = {part: source for part, source in sources.items() if part != "vae"}
    standins.publish(monkeypatch, "test_cleandift", vae="gone/gone/vae.safetensors", vae_tiny=PLACE)
    torch.testing.assert_close(create(rest).model.vae(X)[0], taesd().encode(X).latents)
    alone = load_latent_encoder("test_cleandift", "tiny")
    torch.testing.assert_close(alone(X)[0], taesd().encode(X).latents)
    with pytest.raises(RuntimeError, match=r"vae: .*gone/gone.*\n.*sources=dict\(vae=PATH\)"):
        create(rest | dict(vae="gone/gone"))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(sources, in_chans):
    first = create(sources, in_chans=in_chans).model.vae.encoder.layers[0].weight
    assert first.shape[1] == in_chans
    if in_chans == 1:
        torch.testing.assert_close(first, taesd().encoder.layers[0].weight.sum(1, keepdim=True))


def test_one_kind_for_the_other(sources, tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(standins.sd_vae())
    with pytest.raises(CheckpointError, match=r"holds the encoder of an AutoencoderKL, .*latent_encoder='default'"):
        create(sources | dict(vae=str(tmp_path / "vae.safetensors")))
    with pytest.raises(CheckpointError, match=r"holds a light encoder .*latent_encoder='tiny'"):
        create(sources, latent_encoder="default")
    (tmp_path / "taesd").mkdir()
    (tmp_path / "taesd/diffusion_pytorch_model.safetensors").write_bytes(published_file())
    (tmp_path / "taesd/config.json").write_text(json.dumps({"latent_channels": 16, "num_encoder_blocks": [1, 3, 3, 3]}))
    with pytest.raises(CheckpointError, match="num_encoder_blocks of its vae is"):
        create(sources | dict(vae=str(tmp_path / "taesd")))


def test_native_folders_remember_it(sources, tmp_path):
    model = create(sources, out_indices=tuple(range(11)))
    card.save_folder(model, tmp_path / "native")
    assert json.loads((tmp_path / "native/config.json").read_text())["model_args"]["latent_encoder"] == "tiny"
    assert 'latent_encoder="tiny"' in (tmp_path / "native/README.md").read_text().replace("'", '"')
    again = timm.create_model(f"local-dir:{tmp_path / 'native'}", pretrained=True, features_only=True).eval()
    state = model.model.state_dict()
    assert again.model.vae.kind == "tiny" and "vae.encoder.layers.0.weight" in state
    assert all(torch.equal(state[name], tensor) for name, tensor in again.model.state_dict().items())
    # A bare file cannot say so: the error does.
    overlay = dict(file=str(tmp_path / "native/model.safetensors"))
    with pytest.raises(CheckpointError, match="latent_encoder='tiny'"):
        timm.create_model("test_cleandift", pretrained=True, pretrained_cfg_overlay=overlay)
    told = timm.create_model("test_cleandift", pretrained=True, pretrained_cfg_overlay=overlay, latent_encoder="tiny")
    assert torch.equal(told.vae.encoder.layers[0].weight, state["vae.encoder.layers.0.weight"])
    # Back on the VAE, which must be given.
    (tmp_path / "vae.safetensors").write_bytes(standins.sd_vae())
    parts = dict(vae=str(tmp_path / "vae.safetensors"))
    back = timm.create_model(
        f"local-dir:{tmp_path / 'native'}", pretrained=True, latent_encoder="default", sources=parts
    )
    assert back.vae.kind == "default"


def test_convert(sources, tmp_path):
    """A light encoder comes in place of a VAE, and stays when the result is converted again."""
    parts = {part: source for part, source in sources.items() if part not in ("unet", "vae")}
    to_native(sources["timestep"], tmp_path / "default", parts=parts)  # the full file holds a VAE
    to_native(str(tmp_path / "default"), tmp_path / "light", parts=dict(vae=sources["vae"]), latent_encoder="tiny")
    to_native(str(tmp_path / "light"), tmp_path / "again", dtype=torch.float16)
    model = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True, features_only=True).eval()
    torch.testing.assert_close(model.model.vae(X)[0], taesd().encode(X).latents, rtol=0.01, atol=0.01)
    names = checkpoints.open_checkpoint(tmp_path / "again").names()
    assert not any(name.startswith(("vae.decoder", "vae.quant_conv", "vae.encoder.conv_in")) for name in names)


def test_the_small_model_has_one():
    """Works offline, and gives nearly the VAE's latents."""
    light = timm.create_model("cleandift_tiny", pretrained=True, features_only=True, latent_encoder="tiny").eval()
    plain = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).eval()
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6) * 2 - 1, 128, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        one, other = light.model.vae(images)[0], plain.model.vae(images)[0]
        maps = zip(light(images), plain(images))
    assert (one - other).square().mean() < 0.1 * other.var()
    assert all(F.cosine_similarity(a, b, dim=1).mean() > 0.8 for a, b in maps)
    assert torch.equal(light.model.unet.conv_in.weight, plain.model.unet.conv_in.weight)
