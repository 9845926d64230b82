"""A diffusion model of the user's own is one entry, registered from outside of the package."""

from dataclasses import replace
from pathlib import Path

import pytest
import standins
import timm
import torch
from diffusers import UNet2DConditionModel

from cleandift_backbones.checkpoints import open_checkpoint
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.features.model_names import default_map, is_noisy, shown_maps, twin
from cleandift_backbones.mm_checks import describe
from cleandift_backbones.models import (
    ARCHITECTURES,
    MODELS,
    Architecture,
    Defaults,
    DenoiserSpec,
    Published,
    Schedule,
    TextConditions,
    model_names,
    register_architecture,
    unet_config,
)
from cleandift_backbones.publish.convert import find_model

RECIPE = Path(__file__).parents[2] / "configs/finetune/cleandift_tiny.yaml"
CONFIG = unet_config(
    (8, 16, 16), "-xx", cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4, layers_per_block=1
)
MINE = Architecture(
    name="mine",
    title="three levels of one layer",
    denoiser=DenoiserSpec(CONFIG),
    vae=dict(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, shift_factor=0.5, scaling_factor=2.0),
    conditions=TextConditions(5, 12),
    schedule=Schedule(),
    image_size=96,
    defaults=Defaults(
        map="us2",
        shown=("us2", "us4"),
        searched=("us1", "us2"),
        final_map="us1",
        timestep=100,
        ensemble_size=2,
        min_side=32,
    ),
)


@pytest.fixture
def mine():
    """Registers MINE, and forgets it afterwards."""
    with standins.registry_kept():
        yield register_architecture(MINE)


def test_its_models_are_models_like_any_other(mine):
    assert mine == ["cleandift_mine", "cleandift_mine_pyramid", "dift_mine"]
    assert set(mine) <= set(model_names()) and set(mine) <= set(timm.list_models("*mine*"))
    model = timm.create_model("cleandift_mine", features_only=True).eval()
    assert model.feature_info.module_name() == [
        "unet.up_blocks.1.upsamplers.0",
        "unet.up_blocks.0.upsamplers.0",
        "unet.mid_block",
    ]
    maps = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 16, 24), (16, 8, 12), (16, 4, 6)]
    ending = timm.create_model("cleandift_mine", num_classes=3)  # at the architecture's final map
    assert ending.denoiser.last_map == "us1" and ending(torch.zeros(2, 3, 40, 40)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 32 x 32, got 31 x 40"):
        model(torch.zeros(1, 3, 31, 40))
    noisy = timm.create_model("dift_mine", features_only=True).eval()
    assert (noisy.model.timestep, noisy.model.ensemble_size) == (100, 2)
    pyramid = timm.create_model("cleandift_mine_pyramid", features_only=True)
    assert pyramid.feature_info.reduction() == [2, 4, 8, 16]
    assert timm.get_pretrained_cfg("cleandift_mine").input_size == (3, 96, 96)


def test_its_defaults_hold_everywhere(mine):
    assert default_map("cleandift_mine") == "us2" and shown_maps("cleandift_mine", ["us4", "us3", "us2"]) == [
        "us2",
        "us4",
    ]
    assert is_noisy("dift_mine") and not is_noisy("cleandift_mine") and twin("cleandift_mine") == "dift_mine"
    assert describe("cleandift_mine").names == ["us4", "us2", "mid"]
    recipe = load_recipe(RECIPE, ["model=cleandift_mine", "data.path=x", "output_dir=y", "maps=null"])
    assert recipe.teacher == "dift_mine" and recipe.timestep == 100


@pytest.mark.parametrize(
    "clean, noisy",
    [
        ("cleandift_tiny", "dift_tiny"),
        ("cleandift_tiny.emoji", "dift_tiny.emoji"),
        ("cleandift_sd21", "dift_sd21.sd"),  # the tag of the one is none of the other
        ("test_cleandift", "test_dift"),
    ],
)
def test_models_of_the_other_kind(clean, noisy):
    assert twin(noisy, "clean") == clean and twin(clean) == noisy.removesuffix(".sd")
    assert twin(noisy) is None and twin(clean, "clean") is None and twin("resnet18", "clean") is None


def test_its_weights_are_recognised_and_loaded(mine, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG)
    unet.save_pretrained(tmp_path / "unet")
    assert find_model(open_checkpoint(tmp_path)) == "dift_mine"
    student = timm.create_model("cleandift_mine", final_map="us5").eval()
    state = student.state_dict() | {
        f"unet.{k}": v for k, v in unet.state_dict().items() if f"unet.{k}" in student.state_dict()
    }
    loaded = timm.create_model(
        "cleandift_mine", pretrained=True, final_map="us5", pretrained_cfg_overlay=dict(state_dict=state)
    )
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    outputs = []  # of diffusers' own network, at the same map
    unet.up_blocks[2].resnets[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        latents = loaded.vae(x)[0]
        mean = loaded.vae.quant_conv(loaded.vae.encoder(x))[:, :4]
        torch.testing.assert_close(latents, (mean - 0.5) * 2)  # as in diffusers' pipelines of SD 3 and Flux
        unet.eval()(latents, loaded.timestep, loaded.prompt_embeds)
        torch.testing.assert_close(loaded.eval().forward_features(x), outputs[0])


def test_mistakes_are_named(mine):
    with pytest.raises(ValueError, match="architecture 'mine' exists already"):
        register_architecture(MINE)
    with pytest.raises(ValueError, match="name the maps us9, and its denoiser has mid, us1, us2, us3, us4, us5"):
        register_architecture(replace(MINE, name="other", defaults=Defaults(map="us2", shown=("us9",), searched=())))
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        register_architecture(replace(MINE, name="my model"))
    with pytest.raises(ValueError, match="cleandift_tiny_pyramid is a model already"):
        register_architecture(replace(MINE, name="tiny_pyramid"))
    for change, message in (
        (dict(published={"student": ()}), "the kinds are 'clean' and 'noisy'"),
        (dict(published={"clean": Published("x", dict(unet="a/b/c"), "mit")}), "must be a tuple of Published"),
        (dict(conditions=TextConditions(5, 13)), "conditions are 13 wide, and cross_attention_dim is 12"),
        (dict(defaults=replace(MINE.defaults, timestep=5000)), "the default timestep 5000 is none of the schedule's"),
        (dict(denoiser=DenoiserSpec({**CONFIG, "layers_per_block": (1, 2, 1)})), "one number for all levels"),
        (dict(denoiser=DenoiserSpec({**CONFIG, "addition_embed_type": "text_time"})), "'text_time' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(MINE, name="other", **change)
    assert "other" not in ARCHITECTURES and "cleandift_other" not in MODELS
    with pytest.raises(ValueError, match="mine has no light encoder"):
        timm.create_model("cleandift_mine", latent_encoder="tiny")


def test_a_failed_registration_leaves_nothing_behind():
    wrong = replace(MINE, name="nowhere", published={"clean": (Published("x", dict(unet="file"), "mit"),)})
    with standins.registry_kept():
        with pytest.raises(ValueError, match="is 'file': give an absolute path, or OWNER/NAME/PATH"):
            register_architecture(wrong)
        assert "nowhere" not in ARCHITECTURES and not [name for name in MODELS if "nowhere" in name]
        assert register_architecture(replace(wrong, published={}))


def test_published_places(mine):
    with standins.registry_kept():
        parts = dict(unet="me/repo/unet.safetensors")
        register_architecture(replace(MINE, name="hub", published={"clean": (Published("v1", parts, "mit", "cats"),)}))
        config = timm.get_pretrained_cfg("cleandift_hub")
        assert (config.hf_hub_id, config.hf_hub_filename) == ("me/repo", "unet.safetensors")
        assert config.license == "mit" and config.description == "Trained on cats"
        assert timm.is_model_pretrained("cleandift_hub.v1") and not timm.is_model_pretrained("dift_hub")


def test_flow_is_a_line():
    flow = Schedule("flow")
    assert flow.steps == 1000 and flow.levels(0) == (1, 0) and flow.levels(250) == (0.75, 0.25)
    with pytest.raises(ValueError, match="'ddpm' or 'flow'"):
        Schedule("cosine")
    with pytest.raises(ValueError, match="needs a DDPM schedule"):
        flow.scheduler()
