"""The last map of a truncated UNet is read from its tensors: folders whose config.json is wrong load as they are."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import cleandift_backbones.publish as publishing
import tools.convert
from cleandift_backbones import checkpoints
from cleandift_backbones.features.extractor import list_maps, load_extractor
from cleandift_backbones.features.model_names import map_names

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FOUR = ["us9", "us6", "us3", "mid"]
ALL = [*(f"us{i}" for i in range(10, 0, -1)), "mid"]


def save(folder, last="us10", held="mid", recipe=None, **kwargs):
    """A native folder that ends at map `last`, of which its config and card say that it ends at `held`."""
    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", features_only=True, out_indices=(ALL.index(last),)).eval()
    metadata = dict(recipe=json.dumps(recipe)) if recipe else None
    publishing.save_folder(model, folder, metadata=metadata, arguments=dict(held=held), **kwargs)
    return model


def names(model):
    return [info["name"] for info in model.feature_info.get_dicts()]


@pytest.mark.parametrize("shards", ["5GB", 50_000])
def test_an_old_folder_gives_all_its_maps(tmp_path, shards):
    """As tools/finetune.py wrote them: all maps trained and stored, and `held` is mid."""
    saved = save(tmp_path / "old", max_shard_size=shards)
    assert json.loads((tmp_path / "old/config.json").read_text())["model_args"] == {"held": "mid"}
    model = timm.create_model(f"local-dir:{tmp_path / 'old'}", pretrained=True, features_only=True).eval()
    assert names(model) == FOUR
    assert names(timm.create_model(f"local-dir:{tmp_path / 'old'}", features_only=True)) == FOUR  # without weights
    with torch.no_grad():
        every = saved.model.forward_intermediates(X, intermediates_only=True)
        for name, found in zip(FOUR, model(X), strict=True):
            torch.testing.assert_close(found, every[ALL.index(name)])


def test_an_old_file_in_a_card_s_torch_hub_line(tmp_path):
    """There `held` is an argument beside the place of the weights."""
    save(tmp_path / "old")
    for place in (
        dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "old"))),
        dict(sources=dict(unet=str(tmp_path / "old/model.safetensors"))),
    ):
        model = timm.create_model("test_cleandift", pretrained=True, features_only=True, held="mid", **place)
        assert names(model) == FOUR


@pytest.mark.parametrize("shards", ["5GB", 100_000])
def test_an_old_repository(tmp_path, hub, offline, shards):
    save(tmp_path / "old", max_shard_size=shards)
    hub.place("me/old", {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()})
    assert map_names("hf-hub:me/old") == ALL  # of the page, before it loads anything
    assert not list(hub.cache.rglob("*.safetensors"))  # read by ranges, nothing fetched
    load = dict(model_name="hf-hub:me/old", pretrained=True, features_only=True)
    assert names(timm.create_model(**load)) == FOUR
    offline()
    assert names(timm.create_model(**load)) == FOUR


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_an_old_repository_on_a_mirror_that_sends_files_whole(tmp_path, hub, variant):
    """Also one whose file has a variant's name, which is loaded too."""
    save(tmp_path / "old")
    files = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    files[f"model{variant}.safetensors"] = files.pop("model.safetensors")
    hub.place("me/old", files)
    hub.ranges = False
    assert names(timm.create_model("hf-hub:me/old", pretrained=True, features_only=True)) == FOUR


def test_weights_in_memory_decide_what_a_folder_s_config_gives(tmp_path):
    for name, last in (("cut", "mid"), ("whole", "us10")):
        save(tmp_path / name, last)
    cut, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    for folder, state, given in (("cut", whole, FOUR), ("whole", whole, FOUR), ("whole", cut, ["mid"])):
        load = dict(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(state_dict=state))
        assert names(timm.create_model(f"local-dir:{tmp_path / folder}", **load)) == given


def test_an_old_folder_through_the_other_doors(tmp_path):
    save(tmp_path / "old")
    name = f"local-dir:{tmp_path / 'old'}"
    assert map_names(name) == [info["name"] for info in list_maps(name)] == ALL
    assert load_extractor(name, "us9")(torch.rand(1, 3, 64, 64))["us9"].shape[-1] == 8
    assert tools.convert.main([str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--model", "test_cleandift"]) == 0
    assert json.loads((tmp_path / "new/config.json").read_text())["model_args"] == {}
    assert "held" not in (tmp_path / "new/README.md").read_text()


@pytest.mark.parametrize(
    "recipe", [dict(maps={"us6": 1, "us3": 0.5}), dict(maps={}), dict(steps=3), "by hand", ["maps"]]
)
def test_layers_behind_the_trained_maps_do_not_count(tmp_path, recipe):
    """Old folders of a run of some maps hold the teacher's layers behind them."""
    save(tmp_path / "old", recipe=recipe)
    model = timm.create_model(f"local-dir:{tmp_path / 'old'}", pretrained=True, features_only=True)
    some = isinstance(recipe, dict) and recipe.get("maps")
    assert names(model) == (FOUR[1:] if some else FOUR)
    tools.convert.main([str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--model", "test_cleandift"])
    assert json.loads((tmp_path / "new/config.json").read_text())["model_args"] == ({"held": "us6"} if some else {})
    found = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True, features_only=True)
    assert names(found) == names(model)


@pytest.mark.parametrize("last, default", [("us6", ["us6", "us3", "mid"]), ("mid", ["mid"])])
@pytest.mark.parametrize("held", ["mid", "us10"])
def test_a_folder_that_is_truncated_says_so(tmp_path, last, default, held):
    """Whatever its config says: its tensors decide what is given, and a finer map is refused by name."""
    save(tmp_path / "cut", last, held=held)
    model = timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True, features_only=True)
    assert names(model) == default
    with pytest.raises(
        checkpoints.CheckpointError, match=f"ends at map '{last}' and cannot give 'us7': choose from mid"
    ):
        timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True, features_only=True, out_indices=(3,))


def test_a_push_corrects_an_old_folder(tmp_path, hub, logged_in):
    save(tmp_path / "old", card=publishing.CardInfo(notes="Trained on cats."))
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    publishing.push_to_hub(tmp_path / "old", "me/cats")
    repo = hub.repos["me/cats"]
    files = repo.commits[repo.refs["main"]]
    assert json.loads(files["config.json"].content)["model_args"] == {}
    card = files["README.md"].content.decode()
    assert f"fine to coarse {', '.join(ALL)}." in card and "model(images)  # us9, us6, us3, mid\n" in card
    assert "held" not in card and "Trained on cats." in card and 'hf_hub_id="me/cats"' in card
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize("held", [None, "mid"])
def test_transformers_lists_no_unexpected_tensors(tmp_path, held, caplog):
    """AutoModel pools mid and leaves out the finer layers of the file, as timm does; model_args gives another map."""
    from transformers import AutoModel
    from transformers.utils import logging

    saved = save(tmp_path / "folder", held=held)
    logging.enable_propagation()
    wrapped, report = AutoModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    deeper = AutoModel.from_pretrained(tmp_path / "folder", model_args=dict(final_map="us6")).eval()
    logging.disable_propagation()
    assert not report["unexpected_keys"] and not report["missing_keys"] and "UNEXPECTED" not in caplog.text
    with torch.no_grad():
        every = saved.model.forward_intermediates(X, intermediates_only=True)
        torch.testing.assert_close(wrapped.eval()(X).last_hidden_state, every[ALL.index("mid")])
        torch.testing.assert_close(deeper(X).last_hidden_state, every[ALL.index("us6")])
        hidden = deeper(X, output_hidden_states=True).hidden_states
    for found, wanted in zip(hidden, every[ALL.index("us6") :], strict=True):
        torch.testing.assert_close(found, wanted)
