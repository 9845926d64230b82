"""The distillation run as a whole: it learns, loads, and does what its recipe says."""

import json
import math
import os
import re

import pytest
import timm
import torch
import yaml
from finetune_runs import arguments, equal, finetune, log, refused
from safetensors.torch import load_file

from cleandift_backbones.checkpoints import CheckpointError
from cleandift_backbones.distill import setup
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.setup import Prompts
from cleandift_backbones.distill.train import Training
from cleandift_backbones.models.latents import LatentEncoder
from cleandift_backbones.models.text import PromptEncoder
from tools.finetune import main

# --- what comes out ---


@pytest.mark.slow
def test_it_learns_and_loads(pictures, tmp_path):
    options = [
        "max_steps=24",
        "warmup_steps=4",
        "validate_every=12",
        "sample_every=12",
        "tensorboard=true",
        "text=distilled",
    ]
    state = finetune(pictures, tmp_path / "run", *options)
    validation = log(tmp_path / "run", "validation")
    assert validation[-1] < validation[0] - 0.001
    model = timm.create_model(f"local-dir:{tmp_path / 'run/native'}", pretrained=True, features_only=True)
    assert model.model.timestep == state["timestep"] != 261
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    assert not torch.equal(model.model.unet.conv_in.weight, teacher["unet.conv_in.weight"])
    assert torch.equal(model.model.vae.encoder.conv_in.weight, teacher["vae.encoder.conv_in.weight"])
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["max_steps"] == 24 and recipe["timestep_levels"] == 3
    card = (tmp_path / "run/native/README.md").read_text()
    assert '"learning_rate"' in card and "validation loss, after" in card and str(tmp_path) not in card
    assert {p.name for p in (tmp_path / "run/samples").iterdir()} == {"step_0000012.png", "step_0000024.png"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [round(e.value, 5) for e in events.Scalars("validation")] == [round(v, 5) for v in validation]
    assert "loss/us6" in events.Tags()["scalars"] and "features" in events.Tags()["images"]


@pytest.mark.parametrize("overrides", [[], ["latent_encoder=tiny"], ["mixed_precision=bf16", "cache_dir=cache"]])
def test_the_teacher_and_the_encoder_are_loaded_once(pictures, tmp_path, monkeypatch, overrides):
    """The export has the teacher's own VAE and prompt, also where the run has dropped or halved them."""
    monkeypatch.chdir(tmp_path)
    loaded, create, load = [], timm.create_model, setup.load_latent_encoder
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: (k.get("pretrained") and loaded.append(a)) or create(*a, **k)
    )
    monkeypatch.setattr(setup, "load_latent_encoder", lambda *a, **k: loaded.append(a) or load(*a, **k))
    state = finetune(pictures, tmp_path / "run", "max_steps=1", *overrides)
    assert loaded == [("dift_tiny",)] + [("cleandift_tiny", "tiny", None)] * ("latent_encoder=tiny" in overrides)
    monkeypatch.undo()
    kind = "tiny" if "latent_encoder=tiny" in overrides else "default"
    teacher = timm.create_model("dift_tiny", pretrained=True, latent_encoder=kind).state_dict()
    for name in [name for name in teacher if name.startswith("vae.")] + ["prompt_embeds"]:
        assert torch.equal(state[name], teacher[name]), name


def test_half_precision_and_a_push_at_the_end(pictures, tmp_path, hub, logged_in):
    given = arguments(pictures, tmp_path / "run", "max_steps=2", "mixed_precision=bf16", "sample_every=2")
    assert main([*given, "--push-to-hub", "me/student"]) == 0
    assert all(map(math.isfinite, log(tmp_path / "run", "loss") + log(tmp_path / "run", "validation")))
    assert re.search(
        r"Data: \d+ pictures, \d+ px; before that on emoji", (tmp_path / "run/native/README.md").read_text()
    )
    model = timm.create_model("hf-hub:me/student", pretrained=True, features_only=True)
    assert torch.equal(
        model.model.unet.conv_in.bias, load_file(tmp_path / "run/native/model.safetensors")["unet.conv_in.bias"]
    )


def test_options_that_do_not_change_the_result(pictures, tmp_path):
    """Gradient checkpointing is exact; two accumulated batches equal one of twice the size."""
    plain = finetune(pictures, tmp_path / "plain", "batch_size=4", "max_steps=2", "data.flip=false")
    again = finetune(
        pictures, tmp_path / "again", "batch_size=4", "max_steps=2", "data.flip=false", "gradient_checkpointing=true"
    )
    equal(plain, again, rtol=1e-4, atol=1e-6)


def test_subset_of_maps_trains_no_deeper(pictures, tmp_path):
    state = finetune(pictures, tmp_path / "run", "maps={us3: 1, mid: 2}", "max_steps=2", "heads.depth=0", "loss=l2")
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us3").state_dict()
    assert state.keys() == teacher.keys()
    changed = {n for n in teacher if not torch.equal(teacher[n].float(), state[n].float())}
    assert any("mid_block" in n for n in changed) and any("up_blocks.0.upsamplers" in n for n in changed)
    assert not any(n.startswith("vae.") for n in changed)


FOUR = ["us9", "us6", "us3", "mid"]


@pytest.mark.parametrize(
    "maps, default, offered",
    [("null", FOUR, [f"us{i}" for i in range(10, 0, -1)] + ["mid"]), ("{us6: 1, us3: 0.5}", FOUR[1:], None)],
)
def test_the_native_folder_offers_the_maps_that_were_trained(pictures, tmp_path, capsys, maps, default, offered):
    """The finest trained map is the last: in config.json, in the card, in the file, and in what timm gives."""
    offered = offered or [f"us{i}" for i in range(6, 0, -1)] + ["mid"]
    state = finetune(pictures, tmp_path / "run", f"maps={maps}", "max_steps=1")
    folder = tmp_path / "run/native"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    assert [info["name"] for info in model.feature_info.get_dicts()] == default
    with torch.no_grad():
        assert [x.shape[-1] for x in model(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2][-len(default) :]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"].get("held") == (None if len(default) == 4 else "us6")
    card = (folder / "README.md").read_text()
    assert f"fine to coarse {', '.join(offered)}." in card and f"maps = model(images)  # {', '.join(default)}\n" in card
    assert ("held=" in card) == ("held" in config["model_args"])
    assert any(name.startswith("unet.up_blocks.2.") for name in state) == (len(default) == 4)
    indices = range(11 - len(offered), 11)  # fine to coarse
    found = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=indices)
    assert [info["name"] for info in found.feature_info.get_dicts()] == offered
    if len(default) < 4:
        with pytest.raises(CheckpointError, match="ends at map 'us6' and cannot give 'us9'"):
            timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1,))
        message = "ends at map 'us6' and cannot give 'us10': choose from mid, us1"
        refused(pictures, tmp_path / "deeper", capsys, message, f"student_weights={folder}")


def test_lora_trains_adapters_alone_and_merges(pictures, tmp_path):
    state = finetune(pictures, tmp_path / "run", "lora.rank=4", "learning_rate=0.01", "warmup_steps=1")
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    changed = {
        n for n in teacher if n.startswith("unet.") and (teacher[n].float() - state[n].float()).abs().max() > 1e-6
    }
    assert changed and all("attn1." in n or ".ff.net." in n for n in changed) and not any("attn2" in n for n in changed)
    (checkpoint, *_) = sorted((tmp_path / "run/checkpoints").iterdir())
    kept = load_file(checkpoint)
    assert not any(n.startswith("model/student") and "lora" not in n for n in kept)
    adapters = load_file(tmp_path / "run/lora.safetensors")
    # diffusers itself loads the adapters onto the teacher's UNet, with the same weights as the merged export.
    from cleandift_backbones.models.denoisers.unet import FeatureUNet

    model = timm.create_model("dift_tiny", pretrained=True, final_map="us10")
    unet: FeatureUNet = model.unet
    unet.load_lora_adapter(adapters, prefix=None)
    args = torch.randn(1, 4, 16, 16), 100.0, model.prompt_embeds
    plain = timm.create_model(f"local-dir:{tmp_path / 'run/native'}", pretrained=True, final_map="us10").unet
    with torch.no_grad():
        torch.testing.assert_close(unet(*args)["us10"], plain(*args)["us10"], rtol=1e-3, atol=1e-3)


def test_cached_latents_need_neither_vae_nor_text_encoder(pictures, tmp_path, monkeypatch):
    options = ["text=distilled", "data.flip=true", f"cache_dir={tmp_path / 'cache'}", "max_steps=3"]
    live = finetune(pictures, tmp_path / "live", *options[:2], "max_steps=3")
    first = finetune(pictures, tmp_path / "first", *options)
    equal(live, first, rtol=0.02, atol=2e-3)  # latents are kept in 16 bit

    def refuse(*args, **kwargs):
        raise AssertionError("used although everything is cached")

    monkeypatch.setattr(LatentEncoder, "forward", refuse)
    monkeypatch.setattr(PromptEncoder, "__init__", refuse)
    equal(first, finetune(pictures, tmp_path / "second", *options))
    # A picture that changes is encoded again.
    with pytest.raises(AssertionError, match="used although"):
        os.utime(next(pictures.glob("*.png")))
        main(arguments(pictures, tmp_path / "third", *options))


def test_heads_of_an_earlier_run_are_a_start(pictures, tmp_path):
    state = finetune(
        pictures, tmp_path / "first", "max_steps=2", "heads.conditioning=adarms", "heads_learning_rate=0.1"
    )
    given = arguments(
        pictures, tmp_path / "second", "heads.conditioning=adarms", f"heads.weights={tmp_path / 'first/native'}"
    )
    heads = Training(load_recipe(given[0], given[1:])).module.heads.state_dict()
    assert all(torch.equal(tensor, state[f"heads.{name}"]) for name, tensor in heads.items())
    with pytest.raises(SystemExit):  # heads of another kind
        main([*given, "heads.conditioning=film"])
    # And they are there for features as the teacher would give them.
    folder = f"local-dir:{tmp_path / 'first/native'}"
    model = timm.create_model(folder, pretrained=True, features_only=True, projected_timestep=200)
    assert torch.equal(model.model.heads.time_in_proj.weight, state["heads.time_in_proj.weight"])


def test_text_modes():
    empty, source = torch.zeros(1, 16, 96), timm.create_model("dift_tiny").text_encoder
    embeds = Prompts("caption", empty, source).embed(["red apple", ""])
    assert embeds.shape == (2, 16, 96)
    for mode, teacher, student in (("caption", embeds, embeds), ("distilled", embeds, empty), ("empty", empty, empty)):
        found = Prompts(mode, empty, source).split(embeds)
        assert found[0] is teacher and found[1] is student
    with pytest.raises(ValueError, match="text=caption needs a text encoder"):
        Prompts("caption", empty, None)
