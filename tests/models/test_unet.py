"""FeatureUNet against diffusers' own forward, read with hooks."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.models.denoisers.maps import unet_maps
from cleandift_backbones.models.denoisers.unet import FeatureUNet

NAMES = ["mid", *(f"us{i}" for i in range(1, 11))]
TEST, TINY = ARCHITECTURES["test"].denoiser.config, ARCHITECTURES["tiny"].denoiser.config


def hooked_maps(config, state, latents, timestep, prompt):
    """All 11 maps out of diffusers' own UNet2DConditionModel.forward, by forward hooks on the modules of METHOD."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.load_state_dict(state, assign=True)
    found, handles = {}, []
    for info in unet_maps(config):

        def hook(module, args, output, name=info.name):
            found[name] = output if torch.is_tensor(output) else output[0]

        handles.append(unet.get_submodule(info.module).register_forward_hook(hook))
    with torch.no_grad():
        unet(latents, timestep, encoder_hidden_states=prompt)
    return found


def full_state(config, seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).state_dict()


def compare(config, height, width, timestep=261, batch=1):
    state = full_state(config)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    prompt = torch.randn(batch, 7, config["cross_attention_dim"], generator=generator)
    expected = hooked_maps(config, state, latents, timestep, prompt)
    with torch.device("meta"):
        unet = FeatureUNet.build(config)
    unet.load_state_dict({k: v for k, v in state.items() if k not in unet.dropped_keys}, assign=True)
    with torch.no_grad():
        maps = unet(latents, timestep, prompt)
    assert list(maps) == NAMES
    for name in NAMES:
        difference = (maps[name] - expected[name]).norm() / expected[name].norm()
        assert maps[name].shape == expected[name].shape
        assert difference < 1e-4, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("config", [TEST, TINY], ids=["test", "tiny"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 11), (9, 8)])
def test_maps_equal_diffusers(config, size):
    compare(config, *size, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sd21", "sd15"])
@pytest.mark.parametrize("size", [(512, 512), (520, 392)])
def test_maps_equal_diffusers_full_size(arch, size):
    compare(ARCHITECTURES[arch].denoiser.config, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("last", NAMES)
def test_cut_unet_holds_nothing_deeper(last):
    """Cut at any map, each parameter still gets a gradient, and the shared maps are those of the whole UNet."""
    state = full_state(TEST)
    whole, cut = FeatureUNet.build(TEST), FeatureUNet.build(TEST, last)
    whole.load_state_dict({k: v for k, v in state.items() if k not in whole.dropped_keys})
    cut.load_state_dict({k: v for k, v in state.items() if k not in cut.dropped_keys})
    assert set(cut.state_dict()) | cut.dropped_keys == set(state)
    latents, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 3, TEST["cross_attention_dim"])
    maps, expected = cut(latents, 33.5, prompt), whole(latents, 33.5, prompt)
    assert list(maps) == NAMES[: NAMES.index(last) + 1]
    for name, x in maps.items():
        torch.testing.assert_close(x, expected[name])
    maps[last].square().sum().backward()
    assert [n for n, p in cut.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_whole_unet_stops_after_deepest_map():
    unet = FeatureUNet(**TEST)
    ran = []
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, 6), ["us4", "mid"])
    assert "up_blocks.1.attentions.0" in ran
    assert not [n for n in ran if n.startswith(("up_blocks.1.resnets.1", "up_blocks.2", "up_blocks.3", "conv_out"))]


def test_parameters_held():
    with torch.device("meta"):
        held = {
            m: sum(p.numel() for p in FeatureUNet.build(ARCHITECTURES["sd21"].denoiser.config, m).parameters()) / 1e6
            for m in ("us6", "mid")
        }
        whole = sum(p.numel() for p in UNet2DConditionModel(**ARCHITECTURES["sd21"].denoiser.config).parameters()) / 1e6
    assert (round(held["us6"]), round(held["mid"]), round(whole)) == (774, 352, 866)


def test_timestep_is_a_float_and_one_per_sample():
    unet = FeatureUNet.build(TEST, "us3").eval()
    latents, prompt = torch.randn(2, 4, 16, 16), torch.randn(1, 3, 6)
    both = unet(latents, torch.tensor([10.0, 261.5]), prompt)["us3"]
    torch.testing.assert_close(both[1:], unet(latents[1:], torch.tensor(261.5), prompt)["us3"])
    assert not torch.equal(both[1:], unet(latents[1:], 261, prompt)["us3"])


@pytest.mark.parametrize("name, message", [("us11", "unknown map 'us11'"), ("us7", "not held.*us6.*final_map='us7'")])
def test_unknown_and_cut_maps(name, message):
    with pytest.raises(ValueError, match=message):
        FeatureUNet.build(TEST, "us6")(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, 6), [name])


def test_diffusers_folder_lora_and_processors(tmp_path):
    """Published UNet folders load, and diffusers' own attention processors and peft adapters fit the cut UNet."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    reference = UNet2DConditionModel(**TEST)
    reference.save_pretrained(tmp_path)
    unet = FeatureUNet.from_pretrained(tmp_path).truncate("us6")
    args = torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, 6)
    before = unet(*args)["us6"]
    assert set(unet.attn_processors) < set(reference.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(unet(*args)["us6"], before, rtol=1e-4, atol=1e-4)

    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(unet(*args)["us6"], before)
    unet.disable_adapters()
    torch.testing.assert_close(unet(*args)["us6"], before, rtol=1e-4, atol=1e-4)


def test_random_build_is_initialised_and_seeded():
    torch.manual_seed(3)
    first = FeatureUNet.build(TEST, "us6").state_dict()
    torch.manual_seed(3)
    second = FeatureUNet.build(TEST, "us6").state_dict()
    assert all(torch.equal(first[k], second[k]) and first[k].isfinite().all() for k in first)
    assert first["conv_in.weight"].std() > 0.01


@pytest.mark.slow
def test_compile_fullgraph():
    torch._dynamo.reset()
    unet = FeatureUNet.build(TEST, "us6").eval()
    args = torch.randn(1, 4, 16, 16), torch.tensor(261.0), torch.randn(1, 3, 6)
    compiled = torch.compile(unet, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args)["us6"], unet(*args)["us6"], rtol=1e-4, atol=1e-4)


def test_export():
    unet = FeatureUNet.build(TEST, "us6").eval()
    args = torch.randn(1, 4, 16, 16), torch.tensor(261.0), torch.randn(1, 3, 6)
    program = torch.export.export(unet, args)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args)["us6"], unet(*args)["us6"])
