"""Weights on disk: round trips, and every kind of file that must be refused with a clear word."""

import json
import pickle
import struct

import pytest
import standins
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
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
    with pytest.raises(CheckpointError, match=r"no checkpoint of a form that this package knows.*it holds a, b"):
        load(path)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors does not exist"):
        load(path.parent / "nowhere.safetensors")


def test_missing_extra_and_wrong_shaped_keys(native):
    path, _ = native
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "time_embedding" not in k}, path)
    with pytest.raises(CheckpointError, match=r"does not fit.*missing: unet.time_embedding.linear_1.bias"):
        load(path)
    save_file({k: v for k, v in state.items() if "norm1" not in k}, path)
    with pytest.raises(CheckpointError, match=r"missing: unet.down_blocks.*, \.\.\. \(\d+ in all\)"):
        load(path)
    save_file({**state, "unet.surprise": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not of this model: unet.surprise"):
        load(path)
    save_file({**state, "unet.conv_in.bias": torch.zeros(9), "timestep": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"unfit tensors: .*unet.conv_in.bias is \(9,\), the model needs \(4,\)"):
        load(path)
    save_file({k: v for k, v in state.items() if "up_blocks" not in k}, path)
    with pytest.raises(CheckpointError, match=r"ends at map 'mid' and cannot give 'us9': choose from mid "):
        load(path, features_only=True)
    load(path)  # but a model that ends at mid needs none of them


def test_no_weights_known():
    with pytest.raises(RuntimeError, match=r"no weights are known for test_cleandift.*pretrained=False.*file=PATH"):
        timm.create_model("test_cleandift", pretrained=True)


def test_offline_and_not_cached(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"(?s)unet: someone/something: not in the cache.*sources=dict\(unet=PATH\).*file=FOLDER"
    ):
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

    monkeypatch.setattr(checkpoints.save, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_native({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_disk_full_says_how_much_is_needed(tmp_path, monkeypatch):
    def fail(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints.save, "save_file", fail)
    with pytest.raises(OSError, match=r"did not take a file of 40 MB: .*No space left.*Is the disk full"):
        checkpoints.save_native({"a": torch.zeros(1).expand(10**7)}, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# --- the forms in which weights exist -----------------------------------------------------------------------------


def opened(tmp_path, content, name="file.safetensors"):
    (tmp_path / name).write_bytes(content)
    return checkpoints.open_checkpoint(tmp_path / name)


def test_compvis_unet(tmp_path):
    weights = opened(tmp_path, standins.compvis_unet())
    assert weights.form == "UNet in diffusers' layout"
    count = len(standins.unet().state_dict())
    assert weights.describe() == f"UNet ({count} tensors)"
    assert torch.equal(weights["unet.conv_out.bias"], standins.unet().conv_out.bias.half())


def test_compvis_full(tmp_path):
    weights = opened(tmp_path, standins.compvis_full())
    count = len(standins.unet().state_dict())
    assert weights.form == "CompVis full checkpoint"
    for part in (
        f"UNet ({count} tensors)",
        f"teacher's UNet ({count} tensors)",
        "VAE encoder (",
        "VAE decoder (",
        "timestep",
    ):
        assert part in weights.describe()
    assert "projection heads (" in weights.describe()
    assert weights["timestep"] == standins.TIMESTEP
    assert torch.equal(weights["unet.conv_in.bias"], standins.unet(0).conv_in.bias.half())
    assert torch.equal(weights["teacher.conv_in.bias"], standins.unet(1).conv_in.bias.half())
    teacher = weights.teacher()
    assert torch.equal(teacher["unet.conv_in.bias"], standins.unet(1).conv_in.bias.half())
    assert not teacher.has("teacher.") and not teacher.has("heads.") and not teacher.has("timestep")
    with pytest.raises(CheckpointError, match="holds no teacher, only UNet"):
        teacher.teacher()


def test_projection_heads_fit_ours(tmp_path):
    weights = opened(tmp_path, standins.compvis_full())
    heads = standins.heads()
    ours = {n.removeprefix("heads."): weights[n].float() for n in weights.names() if n.startswith("heads.")}
    assert ours.keys() == heads.state_dict().keys()
    assert all(torch.equal(ours[n], t.half().float()) for n, t in heads.state_dict().items())


@pytest.mark.parametrize("convolutions", [None, False, True])
def test_vae_alone_with_old_attention_names(tmp_path, convolutions):
    state = standins.vae().state_dict()
    old = state if convolutions is None else standins.old_names(state, convolutions)
    assert any(".query." in name for name in old) == (convolutions is not None)
    weights = opened(tmp_path, save({n: t.contiguous() for n, t in old.items()}))
    assert weights.form == "VAE in diffusers' layout"
    assert weights.names() == {f"vae.{name}" for name in state}
    for name, tensor in state.items():
        assert torch.equal(weights[f"vae.{name}"], tensor), name


def test_diffusers_folders(tmp_path):
    files = standins.diffusers_files()
    folder = standins.write(tmp_path / "sd", files)
    weights = checkpoints.open_checkpoint(folder)
    assert weights.form == "diffusers folder" and weights.configs.keys() == {"unet", "vae", "scheduler"}
    assert torch.equal(weights["unet.conv_in.bias"], standins.unet(1).conv_in.bias)
    # The 16-bit variant is taken only where there is nothing else.
    variant = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    variant.write_bytes(save(standins.half(standins.unet(0).state_dict())))
    assert checkpoints.open_checkpoint(folder)["unet.conv_in.bias"].dtype == torch.float32
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert checkpoints.open_checkpoint(folder)["unet.conv_in.bias"].dtype == torch.float16
    assert checkpoints.open_checkpoint(folder / "unet").form == "UNet in diffusers' layout"
    variant.unlink()
    with pytest.raises(CheckpointError, match="has no unet/diffusion_pytorch_model.safetensors"):
        checkpoints.open_checkpoint(folder)


def test_foreign_checkpoints_are_told_apart(tmp_path):
    def refused(state, message):
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path, save({name: torch.zeros(1) for name in state}))

    refused(["unet_encoder.lora_A.weight"], "is a LoRA.*merge it")
    for text in ("{}", "[]", '{"weight_map": {"a": "../b.safetensors"}}', "not json"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="not an index|outside its folder"):
            checkpoints.open_checkpoint(tmp_path)


def test_unet_of_another_family(tmp_path):
    """What an SDXL or SD 1.5 UNet would look like to sd21."""
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    base = {"conv_in.weight": torch.zeros(320, 4, 3, 3), key: torch.zeros(640, 2048)}
    xl = save(base | {"add_embedding.linear_1.weight": torch.zeros(1)})
    (tmp_path / "xl.safetensors").write_bytes(xl)
    (tmp_path / "sd15.safetensors").write_bytes(save(base | {key: torch.zeros(320, 768)}))
    for name, found in (
        ("xl", "Stable Diffusion XL, text of width 2048"),
        ("sd15", "Stable Diffusion 1.x, text of width 768"),
    ):
        with pytest.raises(CheckpointError, match=f"another family .{found}.; the model is of Stable Diffusion 2.x"):
            timm.create_model(
                "cleandift_sd21",
                pretrained=True,
                timestep=261,
                pretrained_cfg_overlay=dict(file=str(tmp_path / f"{name}.safetensors")),
                sources=dict(vae=str(vae_file(tmp_path)), text_encoder=str(text_folder(tmp_path))),
            )


def vae_file(folder):
    (folder / "vae.safetensors").write_bytes(standins.sd_vae())
    return folder / "vae.safetensors"


def text_folder(folder):
    return standins.write(folder / "text", standins.diffusers_files())


def test_zero_copy(native):
    """Weights of the dtype asked for lie in the mapped file; they are not copied."""
    path, _ = native
    weights = checkpoints.open_checkpoint(path)
    name = "unet.mid_block.resnets.0.conv1.weight"
    like = {name: torch.empty(weights.shape(name), device="meta")}
    same = checkpoints.fit(weights, like, lambda name: True)[name]
    other = checkpoints.fit(weights, like, lambda name: True, dtype=torch.float16)[name]
    assert same.data_ptr() == weights[name].data_ptr() != other.data_ptr()


def test_checksum(native):
    path, _ = native
    assert checkpoints.verify(path) == "verified"
    save_file(load_file(path), path)
    assert checkpoints.verify(path) == "no checksum"


@pytest.mark.parametrize("low", [b"\x80", b"PK"])
def test_header_length_that_looks_like_a_pickle(tmp_path, low):
    """The file begins with its header's length, whose lowest bytes may be those of a pickle or of a zip archive."""
    path = tmp_path / "model.safetensors"
    for length in range(0, 40_000, 8):
        save_file({"unet.x": torch.ones(1)}, path, {"filler": "x" * length})
        if path.read_bytes().startswith(low):
            break
    else:
        pytest.fail("no such length")
    assert checkpoints.open_checkpoint(path)["unet.x"] == 1
