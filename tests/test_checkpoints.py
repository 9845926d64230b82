"""Weights on disk: round trips, and every kind of file that must be refused with a clear word."""

import json
import pickle
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints import CheckpointError

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_cleandift", **kwargs).eval()


def load(path, **kwargs):
    torch.manual_seed(1)
    overlay = dict(file=str(path), **kwargs.pop("cfg", {}))
    return timm.create_model("test_cleandift", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.fixture
def native(tmp_path):
    """A native file with all maps, and the model that it was saved from."""
    model = make(final_map="us10")
    model.timestep.fill_(123.25)
    checkpoints.save_native(model.state_dict(), tmp_path / "model.safetensors", {"made": "here"})
    return tmp_path / "model.safetensors", model


def test_round_trip_at_every_depth(native):
    path, model = native
    names = [info["name"] for info in model.feature_info]
    maps = dict(zip(names, model.forward_intermediates(X, intermediates_only=True)))
    for index, name in enumerate(names):
        loaded = load(path, features_only=True, out_indices=(index,))
        assert loaded.model.timestep == 123.25
        torch.testing.assert_close(loaded(X)[0], maps[name])
    torch.testing.assert_close(load(path, final_map="us6", global_pool="")(X), maps["us6"])


def test_half_file_gives_float32_model(native):
    path, model = native
    checkpoints.save_native({k: v.half() for k, v in model.state_dict().items()}, path)
    loaded = load(path, final_map="us10")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and loaded.prompt_embeds.dtype == torch.float32
    torch.testing.assert_close(loaded(X), model(X), rtol=0.01, atol=0.01)
    loaded(X).sum().backward()


def test_arguments_win_over_the_file(native):
    path, model = native
    loaded = load(path, timestep=7)
    assert loaded.timestep == 7 and loaded.timestep.device.type == "cpu"
    torch.testing.assert_close(loaded.prompt_embeds, model.prompt_embeds)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels_adapt(native, in_chans):
    path, model = native
    loaded = load(path, in_chans=in_chans)
    weight = model.vae.encoder.conv_in.weight
    if in_chans == 1:  # a grey picture given once equals it given three times
        torch.testing.assert_close(loaded.vae.encoder.conv_in.weight, weight.sum(1, keepdim=True))
        gray = make(final_map="us10")
        gray.load_state_dict(model.state_dict())
        torch.testing.assert_close(
            loaded.forward_features(X[:, :1]),
            gray.forward_intermediates(X[:, :1].repeat(1, 3, 1, 1), indices=[10], intermediates_only=True)[0],
            rtol=1e-3,
            atol=1e-4,
        )
    assert loaded(X[:, :1].repeat(1, in_chans, 1, 1)).isfinite().all()


def test_classifier_is_kept_only_if_it_fits(tmp_path):
    model = make(num_classes=5)
    checkpoints.save_native(model.state_dict(), tmp_path / "model.safetensors")
    same = load(tmp_path / "model.safetensors", num_classes=5, cfg=dict(num_classes=5))
    torch.testing.assert_close(same(X), model(X))
    other = load(tmp_path / "model.safetensors", num_classes=3)
    assert other(X).shape == (1, 3) and not any(p.is_meta for p in other.parameters())
    assert load(tmp_path / "model.safetensors", num_classes=0)(X).shape == (1, 8)


@pytest.mark.parametrize("kwargs", [dict(), dict(num_classes=4), dict(final_map="us6", num_classes=2)])
def test_folder_round_trip(tmp_path, kwargs):
    """timm's own hub folder, read back through local-dir:."""
    model = make(**kwargs)
    save_for_hf(
        model, tmp_path, model_args=kwargs and dict(final_map=kwargs.get("final_map", "mid")), safe_serialization=True
    )
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(X), model(X))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(10,)).eval()
    torch.testing.assert_close(features(X)[0], model.forward_intermediates(X, indices=[10], intermediates_only=True)[0])


def test_folder_without_weights_and_with_pickle(tmp_path):
    save_for_hf(make(), tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors.*pytorch_model.bin.*never loaded"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_pickle_is_refused_unopened(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "torch":
        torch.save({"x": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is a pickle file.*refused"):
        load(path)


def test_truncated_and_foreign_files(native):
    path, _ = native
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated or not a safetensors file.*again"):
            load(path)
    path.write_bytes(struct.pack("<Q", 10) + b"not json!!")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(path)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no native cleandift_backbones checkpoint.*it holds a, b"):
        load(path)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors does not exist"):
        load(path.parent / "nowhere.safetensors")


def test_missing_extra_and_wrong_shaped_keys(native):
    path, _ = native
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "time_embedding" not in k}, path)
    with pytest.raises(CheckpointError, match=r"does not fit.*missing: unet.time_embedding.linear_1.bias"):
        load(path)
    save_file({**state, "unet.surprise": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not of this model: unet.surprise"):
        load(path)
    save_file({**state, "unet.conv_in.bias": torch.zeros(9), "timestep": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"unfit tensors: .*unet.conv_in.bias is \(9,\), the model needs \(4,\)"):
        load(path)
    save_file({k: v for k, v in state.items() if "up_blocks" not in k}, path)
    with pytest.raises(CheckpointError, match=r"missing: unet.up_blocks.*, \.\.\. \(\d+ in all\).*coarser map"):
        load(path, features_only=True)
    load(path)  # but a model that ends at mid needs none of them


def test_no_weights_known():
    with pytest.raises(RuntimeError, match=r"no weights are known for test_cleandift.*pretrained=False.*file=PATH"):
        timm.create_model("test_cleandift", pretrained=True)


def test_offline_and_not_cached(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"model.safetensors of someone/something.*not in the cache.*file=PATH"):
        timm.create_model(
            "test_cleandift",
            pretrained=True,
            cache_dir=tmp_path,
            pretrained_cfg_overlay=dict(hf_hub_id="someone/something"),
        )


def test_sharded_folder(native):
    path, model = native
    state = load_file(path)
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: state[n] for n in part}, path.parent / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    path.unlink()
    (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(load(path.parent, final_map="us10")(X), model(X))


def test_save_is_aside_then_renamed(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_native({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
