"""Weights as people have them: in memory, under wrapped names, in variants of a folder, in 8 bits."""

import logging

import pytest
import standins
import timm
import torch
from safetensors.torch import load, load_file, save, save_file
from timm.models._pretrained import PretrainedCfg

import cleandift_backbones.publish.card as publishing
from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints import CheckpointError
from cleandift_backbones.publish.convert import to_diffusers, to_native
from cleandift_backbones.utils.errors import CleanDIFTError

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_cleandift", **kwargs).eval()


def load_model(path=None, state=None, **kwargs):
    overlay = dict(file=str(path)) if path else dict(state_dict=state)
    return timm.create_model("test_cleandift", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.fixture
def whole():
    model = make(final_map="us10")
    model.timestep.fill_(123.25)
    return model


def equal(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- state_dict ---------------------------------------------------------------------------------------------------


def test_a_state_dict_is_used(whole):
    state = whole.state_dict()
    loaded = load_model(state=state, final_map="us10")
    assert equal(loaded, whole)
    loaded.unet.conv_in.weight.data.zero_()  # the user's tensors are not the model's
    assert state["unet.conv_in.weight"].any()
    assert "state_dict" not in loaded.pretrained_cfg or loaded.pretrained_cfg["state_dict"] is None
    features = load_model(state=state, features_only=True, out_indices=("us6",), dtype="bfloat16")
    assert features(X.bfloat16())[0].shape == (1, 8, 4, 4) and features.model.timestep == 123.25
    base = timm.get_pretrained_cfg("test_cleandift").to_dict()
    for cfg in (base | dict(state_dict=state), PretrainedCfg(**base | dict(state_dict=state))):
        assert equal(timm.create_model("test_cleandift", pretrained=True, pretrained_cfg=cfg, final_map="us10"), whole)


def test_a_state_dict_goes_before_the_weights_that_are_included():
    state = {name: torch.zeros_like(t) for name, t in timm.create_model("cleandift_tiny").state_dict().items()}
    model = timm.create_model("cleandift_tiny", pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
    assert not any(p.any() for p in model.parameters()) and model.timestep == 0


def test_a_state_dict_is_completed_like_a_file(tmp_path):
    parts = dict(vae=str(tmp_path / "sd/vae"), text_encoder=str(tmp_path / "sd"), timestep=str(tmp_path / "full.st"))
    standins.write(tmp_path / "sd", standins.diffusers_files())
    (tmp_path / "full.st").write_bytes(standins.compvis_full())
    options = dict(pretrained=True, features_only=True, sources=parts, out_indices=("us6", "mid"))
    model = timm.create_model(
        "test_cleandift", pretrained_cfg_overlay=dict(state_dict=load(standins.compvis_unet())), **options
    ).eval()
    assert model.model.timestep == standins.TIMESTEP
    expected = standins.expected_maps(X)
    with torch.no_grad():
        for found, name in zip(model(X), ("us6", "mid"), strict=True):
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
    full = load_model(state=load(standins.compvis_full()), sources=dict(text_encoder=str(tmp_path / "sd")))
    assert full.timestep == standins.TIMESTEP


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {}, "the state_dict given must be a mapping .* that is not empty"),
        (
            lambda s: {"state_dict": s, "epoch": 3},
            r"given must hold tensors.* epoch, state_dict are none.*checkpoint\[",
        ),
        (lambda s: {"a": torch.zeros(1)}, "the state_dict given is no checkpoint of a form"),
        (lambda s: s | {"unet.surprise": torch.zeros(1)}, "the state_dict given .*not of this model: unet.surprise"),
        (lambda s: s | {"unet.conv_in.bias": torch.zeros(9)}, r"unet.conv_in.bias is \(9,\)"),
        (lambda s: {n: t.to("meta") for n, t in s.items()}, "must hold tensors with values"),
    ],
)
def test_a_state_dict_is_checked_like_a_file(whole, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(state=change(whole.state_dict()))


@pytest.mark.parametrize(
    "cfg, message",
    [
        (
            dict(url="https://example.org/x.pth"),
            "url='https://example.org/x.pth' is not fetched: download it and give file",
        ),
        (dict(file="x.npz", custom_load=True), "custom_load is not taken"),
    ],
)
def test_other_ways_of_timm_are_refused(cfg, message):
    with pytest.raises(CleanDIFTError, match=message):
        timm.create_model("cleandift_tiny", pretrained=True, pretrained_cfg_overlay=cfg)


def test_other_arguments_of_timm_are_refused(whole):
    with pytest.raises(CleanDIFTError, match="pretrained_filter_fn is not taken"):
        timm.create_model("cleandift_tiny", pretrained=True, pretrained_filter_fn=lambda state, model: state)
    with pytest.raises(CleanDIFTError, match=r"both a state_dict and sources=dict\(unet"):
        load_model(state=whole.state_dict(), sources=dict(unet="x"))


# --- names of wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.", "_orig_mod.model.", "backbone.model.",
     "module.backbone.model.", "_fsdp_wrapped_module.", "ema_model.module.", "encoder.model.model.", "timm_model."],
)  # fmt: skip
def test_prefixes_are_taken_off(tmp_path, whole, prefix):
    state = {prefix + name: tensor for name, tensor in whole.state_dict().items()}
    save_file(state, tmp_path / "file.safetensors")
    assert equal(load_model(tmp_path / "file.safetensors", final_map="us10"), whole)
    assert equal(load_model(state=state, final_map="us10"), whole)
    unet = {prefix + name: tensor for name, tensor in standins.unet().state_dict().items()}
    save_file(unet, tmp_path / "unet.safetensors")
    weights = checkpoints.open_checkpoint(tmp_path / "unet.safetensors")
    assert weights.form == "UNet in diffusers' layout" and "unet.mid_block.resnets.0.conv1.weight" in weights


def test_wrappers_of_parts(tmp_path, whole):
    """Of a model whose UNet, or some blocks of it, were compiled, sharded or checkpointed."""
    state = {}
    for name, tensor in whole.state_dict().items():
        name = name.replace("unet.", "unet._orig_mod.").replace(
            "up_blocks.1.", "up_blocks.1._checkpoint_wrapped_module."
        )
        state[name] = tensor
    save_file(state, tmp_path / "file.safetensors")
    assert equal(load_model(tmp_path / "file.safetensors", final_map="us10"), whole)


def test_folders_of_wrapped_parts(tmp_path):
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in standins.unet(1).state_dict().items()}
    save_file(wrapped, folder / "unet/diffusion_pytorch_model.safetensors")
    vae = {f"_orig_mod.{name}": t.contiguous() for name, t in standins.old_names(standins.vae().state_dict()).items()}
    save_file(vae, folder / "vae/diffusion_pytorch_model.safetensors")
    assert torch.equal(load_model(folder, timestep=1).unet.conv_in.bias, standins.unet(1).conv_in.bias)


def test_a_whole_segmenter(tmp_path, whole, caplog):
    state = {f"backbone.model.{name}": tensor for name, tensor in whole.state_dict().items()}
    save_file(state | {"decode_head.conv_seg.weight": torch.zeros(2), "decode_head.conv_seg.bias": torch.zeros(2)},
              tmp_path / "file.safetensors")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert equal(load_model(tmp_path / "file.safetensors", final_map="us10"), whole)
    assert "2 tensors beside the backbone's are left out: decode_head.conv_seg.bias" in caplog.text


def test_two_models_in_one_file(tmp_path, whole):
    state = whole.state_dict()
    for other, message in (
        ("ema_model.", "several models, under ema_model., model."),
        ("model.module.", "tensors twice"),
    ):
        both = {f"{prefix}{n}": t.clone() for prefix in ("model.", other) for n, t in state.items()}
        save_file(both, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "file.safetensors")


@pytest.mark.parametrize("features_only", [False, True])
def test_wrappers_are_never_written(tmp_path, features_only):
    options = dict(features_only=True, out_indices=("us10", "mid")) if features_only else dict(final_map="us10")
    model = make(**options)
    plain = model.model if features_only else model
    wrapped = [torch.compile(model), torch.nn.DataParallel(model), torch.nn.DataParallel(torch.compile(model))]
    for number, outer in enumerate(wrapped):
        checkpoints.save_native(outer.state_dict(), tmp_path / "file.safetensors")
        publishing.save_folder(outer, tmp_path / f"folder{number}")
        for path in (tmp_path / "file.safetensors", tmp_path / f"folder{number}/model.safetensors"):
            assert load_file(path).keys() == plain.state_dict().keys()
    plain.unet = torch.compile(plain.unet)
    publishing.save_folder(model, tmp_path / "folder")
    assert not [name for name in load_file(tmp_path / "folder/model.safetensors") if "_orig_mod" in name]


# --- variants -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_parts(tmp_path):
    """Saves the parts of a pipeline with a variant, in one file or in shards, by diffusers and transformers."""

    def save_parts(variant, shards=False):
        folder = standins.write(tmp_path / f"{variant}{shards}", standins.diffusers_files())
        _, encoder = standins.text_encoder()
        for name, part in (("unet", standins.unet(0)), ("vae", standins.vae()), ("text_encoder", encoder)):
            for path in (folder / name).glob("*.safetensors"):
                path.unlink()
            size = dict(max_shard_size="6KB") if shards and name != "vae" else {}
            part.save_pretrained(folder / name, variant=variant, **size)
        return folder

    return save_parts


@pytest.mark.parametrize("variant, shards", [("fp16", False), ("fp16", True), ("bf16", False), ("ema", True)])
def test_folders_saved_with_a_variant(pipeline_parts, tmp_path, variant, shards):
    folder = pipeline_parts(variant, shards)
    assert len(list(folder.glob("unet/*.safetensors"))) > 1 or not shards
    assert len(list(folder.glob("text_encoder/*.safetensors"))) > 1 or not shards
    model = load_model(folder, timestep=247.5, features_only=True, out_indices=("us6",))
    with torch.no_grad():
        torch.testing.assert_close(model(X)[0], standins.expected_maps(X, dtype=torch.float32)["us6"])
        model.model.set_prompt("cat")
    to_native(str(folder), tmp_path / "native", timestep=3)
    assert torch.equal(load_file(tmp_path / "native/model.safetensors")["prompt_embeds"], standins.empty_prompt())


def test_repositories_that_hold_a_variant_only(pipeline_parts, hub, offline):
    for shards in (False, True):
        folder = pipeline_parts("fp16", shards)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.place(f"me/variant{shards}", files)
        source = dict(
            sources=dict(unet=f"me/variant{shards}"), timestep=247.5, features_only=True, out_indices=("us6",)
        )
        model = timm.create_model("test_cleandift", pretrained=True, **source).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(X)[0], standins.expected_maps(X, dtype=torch.float32)["us6"])
            model.model.set_prompt("dog")
    offline()
    again = timm.create_model("test_cleandift", pretrained=True, **source, prompt="red apple").eval()
    assert torch.equal(again.model.unet.conv_in.weight, model.model.unet.conv_in.weight)


def test_which_variant_is_taken():
    choose = checkpoints.choose_file
    plain, fp16 = "model.safetensors", "model.fp16.safetensors"
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    assert choose([fp16, plain, index, shard], plain) == (plain, None)
    assert choose([fp16, index, shard], plain) == (index, None)
    assert choose(["model.bf16.safetensors", fp16, "model.ema.safetensors"], plain) == (fp16, "fp16")
    assert choose(["model.ema.safetensors", "README.md"], plain) == ("model.ema.safetensors", "ema")
    for name in ("model.safetensors.index.fp16.json", "model.safetensors.fp16.index.json"):
        assert choose([name, "model.fp16-00001-of-00002.safetensors"], plain) == (name, "fp16")
    assert choose(["other.safetensors", "model.bin", shard], plain) is None
    with pytest.raises(CheckpointError, match="several variants are there, model.ema.safetensors, model.non_ema"):
        choose(["model.ema.safetensors", "model.non_ema.safetensors"], plain)


# --- 8 bits, and other dtypes -------------------------------------------------------------------------------------


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("all_of_it", [True, False])
def test_8_bit_weights_become_16_bit_ones(tmp_path, whole, dtype, all_of_it, caplog):
    state = {n: t.to(dtype) if all_of_it or n.endswith("to_k.weight") else t for n, t in whole.state_dict().items()}
    state["timestep"] = whole.timestep
    save_file(state, tmp_path / "file.safetensors")
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path / "file.safetensors", dtype="auto", final_map="us10")
    wide = torch.float16 if all_of_it else torch.float32
    assert {p.dtype for p in model.parameters()} == {wide} and model(X.to(wide)).isfinite().all()
    assert len(caplog.records) == 1 and f"8-bit weights ({dtype})" in caplog.text and str(wide) in caplog.text
    key = next(name for name in state if name.endswith("attn2.to_k.weight"))
    assert torch.equal(model.state_dict()[key], state[key].to(wide))
    to_native(str(tmp_path / "file.safetensors"), tmp_path / "native.safetensors")
    assert load_file(tmp_path / "native.safetensors")[key].dtype == wide
    (tmp_path / "fill.safetensors").write_bytes(standins.compvis_unet())
    to_diffusers(str(tmp_path / "file.safetensors"), tmp_path / "unet", fill=str(tmp_path / "fill.safetensors"))
    assert load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")[key.removeprefix("unet.")].dtype == wide
    assert load_model(tmp_path / "file.safetensors").unet.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_8_bit_weights(tmp_path, whole, name):
    state, wanted = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for number, (key, tensor) in enumerate(whole.state_dict().items()):
        state[key] = tensor
        if key.startswith("unet.") and key.endswith(".weight") and tensor.ndim == 2:
            scale = torch.tensor(0.5 + number) if number % 2 else torch.rand(len(tensor)) + 0.5
            state[key] = (tensor / (scale if scale.ndim == 0 else scale[:, None])).to(torch.float8_e4m3fn)
            state[f"{key.removesuffix('weight')}{name}"] = scale
            state[f"{key.removesuffix('weight')}scale_input"] = torch.tensor(3.0)
            wanted[key] = state[key].float() * (scale if scale.ndim == 0 else scale[:, None])
    save_file(state, tmp_path / "file.safetensors")
    model = load_model(tmp_path / "file.safetensors", final_map="us10")
    assert wanted and all(torch.equal(model.state_dict()[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("dtype", [*FP8, "float8_e4m3fn", "float8_e5m2", "int8", "complex64", 16])
def test_dtypes_that_no_model_has(tmp_path, whole, dtype):
    message = "dtype must be float32, float16, bfloat16, float64.*got"
    for action in (
        lambda: timm.create_model("cleandift_tiny", pretrained=True, dtype=dtype),
        lambda: timm.create_model("cleandift_tiny", dtype=dtype),
        lambda: checkpoints.save_native(whole.state_dict(), tmp_path / "x.safetensors", dtype=dtype),
        lambda: publishing.save_folder(whole, tmp_path / "x", dtype=dtype),
        lambda: to_native("cleandift_tiny", tmp_path / "x", dtype=dtype),
    ):
        with pytest.raises(CleanDIFTError, match=message):
            action()
    assert not list(tmp_path.iterdir())


def test_float64(whole, tmp_path):
    model = make(dtype="float64")
    assert model(X.double()).dtype == torch.float64
    checkpoints.save_native({n: t.double() for n, t in whole.state_dict().items()}, tmp_path / "file.safetensors")
    assert load_model(tmp_path / "file.safetensors", dtype="auto").unet.conv_in.weight.dtype == torch.float64


def test_integers_are_refused(tmp_path, whole):
    state = whole.state_dict()
    key = next(name for name in state if name.endswith("attn2.to_k.weight"))
    save_file(state | {key: torch.zeros_like(state[key], dtype=torch.int8)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} holds torch.int8, which cannot be turned into weights"):
        load_model(tmp_path / "file.safetensors", dtype="auto", final_map="us10")
    for mark in (".absmax", ".quant_map"):
        save_file(state | {f"{key}{mark}": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=f"quantised to integers .*{mark}.*dequantize"):
            load_model(tmp_path / "file.safetensors")
    (tmp_path / "lora.safetensors").write_bytes(save({"unet.conv_in.lora_A.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="is a LoRA"):
        load_model(tmp_path / "lora.safetensors")
