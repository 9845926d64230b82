"""The models under timm's contract, on test_cleandift and cleandift_tiny."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay

import cleandift_backbones
from cleandift_backbones.models.architectures import model_names

NAMES = ["us10", "us9", "us8", "us7", "us6", "us5", "us4", "us3", "us2", "us1", "mid"]
ALL = (
    {f"{kind}_{arch}" for kind in ("cleandift", "dift") for arch in ("sd15", "sd21", "tiny")}
    | {"test_cleandift"}
    | {f"cleandift_{arch}_pyramid" for arch in ("sd15", "sd21", "tiny")}
)
SMALL = ["test_cleandift", "cleandift_tiny"]


def images(batch=2, height=64, width=64, channels=3, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def make(name="test_cleandift", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


# --- registration ---


def test_registered():
    assert set(timm.list_models("*dift*")) == set(model_names()) == ALL - {"test_cleandift"}
    assert timm.is_model("test_cleandift")
    assert {n.split(".")[0] for n in timm.list_pretrained("*dift*")} >= {"cleandift_tiny", "dift_tiny"}
    for name in ALL:
        assert timm.models.model_entrypoint(name).__doc__.strip()


@pytest.mark.parametrize("name", sorted(ALL))
def test_default_cfgs(name):
    cfg = timm.get_pretrained_cfg(name)
    stride = 32 if "tiny" in name else 64
    side = {"sd15": 512, "sd21": 768}.get(name.split("_")[1], 128)
    assert cfg.input_size == (3, side, side) and cfg.min_input_size == (3, 64, 64) and not cfg.fixed_input_size
    assert cfg.pool_size == (side // stride, side // stride)
    assert cfg.mean == cfg.std == (0.5, 0.5, 0.5)
    assert cfg.num_classes == 0 and cfg.crop_pct == 1.0 and cfg.interpolation == "bicubic"
    assert cfg.paper_ids == "arXiv:2412.03439" and cfg.license and cfg.paper_name and cfg.origin_url
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model.get_submodule(cfg.first_conv), torch.nn.Conv2d)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    data = resolve_model_data_config(model)
    assert data["mean"] == (0.5, 0.5, 0.5) and data["input_size"] == cfg.input_size


def test_import_is_light():
    code = (
        "import timm, sys, time; start = time.perf_counter(); import cleandift_backbones; "
        "spent = time.perf_counter() - start; "
        "assert not {'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules), sorted(sys.modules); "
        "assert spent < 0.3, spent"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"CleanDIFT", "DIFT", "FeatureUNet"} <= set(cleandift_backbones.__all__)
    assert issubclass(cleandift_backbones.DIFT, cleandift_backbones.CleanDIFT)
    with pytest.raises(AttributeError, match="CleanDift"):
        _ = cleandift_backbones.CleanDift


# --- features_only ---


@pytest.mark.parametrize("name", SMALL)
def test_default_features(name):
    model = make(name, features_only=True)
    stride = 8 if name == "test_cleandift" else 4
    assert model.out_indices == [1, 4, 7, 10] and list(model.feature_info.out_indices) == [1, 4, 7, 10]
    assert [f["name"] for f in model.feature_info.get_dicts()] == ["us9", "us6", "us3", "mid"]
    assert model.feature_info.reduction() == [stride, 2 * stride, 4 * stride, 8 * stride]
    assert len(model.model.unet.up_blocks) == 3, "us10 was not asked for"
    for x, chs, red in zip(model(images()), model.feature_info.channels(), model.feature_info.reduction()):
        assert x.shape == (2, chs, 64 // red, 64 // red)


@pytest.mark.parametrize("height, width", [(64, 64), (100, 77), (65, 128)])
@pytest.mark.parametrize("name", SMALL)
def test_every_map_at_any_size(name, height, width):
    model = make(name, features_only=True, out_indices=range(11))
    infos = model.feature_info.get_dicts()
    assert [f["name"] for f in infos] == NAMES
    reductions = [f["reduction"] for f in infos]
    assert reductions == sorted(reductions)
    maps = model(images(1, height, width))
    for x, info in zip(maps, infos):
        assert x.shape == (1, info["num_chs"], -(-height // info["reduction"]), -(-width // info["reduction"]))
        assert x.isfinite().all()
        model.model.get_submodule(info["module"])


def test_out_indices_order_negative_and_last_n():
    model = make(features_only=True, out_indices=range(11))
    state, maps = model.state_dict(), dict(zip(NAMES, model(images())))
    for indices, expected in [((10, 1, 4), ["mid", "us9", "us6"]), ((-1, -7), ["mid", "us6"]), ((4,), ["us6"])]:
        some = make(features_only=True, out_indices=indices)
        assert [f["name"] for f in some.feature_info.get_dicts()] == expected
        some.load_state_dict({name: state[name] for name in some.state_dict()})
        for x, name in zip(some(images()), expected):
            torch.testing.assert_close(x, maps[name])
    three = make(features_only=True, out_indices=3)
    assert [f["name"] for f in three.feature_info.get_dicts()] == ["us2", "us1", "mid"]


@pytest.mark.parametrize("index, name", list(enumerate(NAMES)))
def test_features_hold_nothing_unused(index, name):
    """Each parameter of a model cut at any map gets a gradient from its output."""
    model = make(features_only=True, out_indices=(index,))
    assert model.model.unet.last_map == name
    # At 64 px the coarsest grid would be one cell, where self-attention's queries have nothing to choose from.
    model(images(2, 128, 128))[0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("indices", [(11,), (0, -12), (), 0, 12])
def test_bad_out_indices(indices):
    with pytest.raises(ValueError, match=r"out_indices .*0 = us10, 1 = us9.*10 = mid"):
        make(features_only=True, out_indices=indices)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "fx", "hook"])
def test_only_getter(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls '{feature_cls}'.*getter"):
        make(features_only=True, feature_cls=feature_cls)
    assert make(features_only=True, feature_cls="getter")(images())


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="output_stride"):
        make(features_only=True, output_stride=8)
    with pytest.raises(TypeError, match="no_such_thing"):
        make(no_such_thing=1)
    with pytest.raises(ValueError, match="unknown map 'us12'.*us10"):
        make(final_map="us12")
    with pytest.raises(ValueError, match="timestep must lie in 0..999, got 1000"):
        make(timestep=1000)


def test_pyramid():
    model = make("cleandift_tiny_pyramid", features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [f["name"] for f in model.feature_info.get_dicts()] == ["vae2", "us9", "us6", "us3", "mid"]
    maps = model(images(1, 100, 84))
    for x, info in zip(maps, model.feature_info.get_dicts()):
        assert x.shape[1:] == (info["num_chs"], -(-100 // info["reduction"]), -(-84 // info["reduction"]))
    with torch.device("meta"):
        big = timm.create_model("cleandift_sd21_pyramid", features_only=True)
    assert big.feature_info.reduction() == [2, 4, 8, 16, 32, 64]
    assert big.feature_info.channels() == [128, 256, 640, 1280, 1280, 1280]
    with pytest.raises(ValueError, match="only maps of the VAE"):
        make("cleandift_tiny_pyramid", features_only=True, out_indices=(0,))


# --- forward_intermediates, pruning ---


def test_forward_intermediates_every_mode():
    model, x = make(final_map="us10"), images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) == 11
    named = dict(zip(NAMES, maps))
    torch.testing.assert_close(final, named["us10"])
    some_final, some = model.forward_intermediates(x, indices=[10, 4], norm=True)
    torch.testing.assert_close(some_final, final)
    torch.testing.assert_close(some, [named["mid"], named["us6"]])
    only = model.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
    torch.testing.assert_close(only, [named["mid"], named["us10"]])
    early_final, early = model.forward_intermediates(x, indices=[10, 7], stop_early=True)
    torch.testing.assert_close(early_final, named["us3"])
    torch.testing.assert_close(early, [named["mid"], named["us3"]])
    result = model.forward_intermediates(x, indices=2, output_dict=True)
    assert set(result) == {"image_features", "image_intermediates"}
    torch.testing.assert_close(result["image_features"], final)
    torch.testing.assert_close(result["image_intermediates"], [named["us1"], named["mid"]])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match="out_indices"):
        model.forward_intermediates(x, indices=[11])


def test_stop_early_runs_nothing_deeper():
    model = make(final_map="us10")
    ran = []
    for name, module in model.unet.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.forward_intermediates(images(), indices=[10], stop_early=True)
    assert "mid_block.resnets.1" in ran and not [n for n in ran if n.startswith("up_blocks")]


def test_model_that_ends_at_mid():
    model = make()
    final, maps = model.forward_intermediates(images())
    assert len(maps) == 1 and torch.equal(maps[0], final)
    with pytest.raises(ValueError, match="map 'us6' is not held.*final_map='us6'"):
        model.forward_intermediates(images(), indices=[4])


def test_prune_intermediate_layers():
    model, x = make(final_map="us10", num_classes=5), images()
    before = model.forward_intermediates(x, indices=[10, 4], intermediates_only=True)
    assert model.prune_intermediate_layers([-1, 4]) == [10, 4]
    assert model.unet.last_map == "us6" and model.num_features == 8 and model.num_classes == 0
    torch.testing.assert_close(model.forward_intermediates(x, indices=[10, 4], intermediates_only=True), before)
    assert make().prune_intermediate_layers(1) == [10]


# --- classifier, pooling, input channels ---


def test_pooling_and_classifier():
    x = images()
    model = make()
    assert model.num_features == model.head_hidden_size == 8
    features = model.forward_features(x)
    assert features.shape == (2, 8, 1, 1) and model(x).shape == (2, 8)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    assert make(global_pool="")(x).shape == (2, 8, 1, 1)
    model = make(final_map="us6", num_classes=7)
    assert model(x).shape == (2, 7) and model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 8)
    assert {n for n in model.state_dict() if n.startswith("head.")} == {"head.fc.weight", "head.fc.bias"}
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3 and model.get_classifier().out_features == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 4, 4)
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), model.forward_features(x).amax((2, 3)))


def test_classifier_trains_every_parameter():
    model = make(num_classes=4)
    model(images(2, 128, 128)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    model = make(in_chans=in_chans, features_only=True)
    assert model(images(channels=in_chans))[0].shape[0] == 2
    with pytest.raises(ValueError, match=f"B x {in_chans} x H x W"):
        model(images(channels=3))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(1, 3, 63, 64), ValueError, "at least 64 x 64, got 63 x 64"),
        (torch.zeros(1, 3, 256, 8), ValueError, "at least 64 x 64, got 256 x 8"),
        (torch.zeros(1, 4, 64, 64), ValueError, "B x 3 x H x W.*4, 64, 64"),
        (torch.zeros(3, 64, 64), ValueError, "B x 3 x H x W.*3, 64, 64"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating-point.*uint8"),
    ],
)
def test_bad_images(x, error, message):
    with pytest.raises(error, match=message):
        make(features_only=True)(x)


# --- training ---


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_is_equal(name):
    plain, saving = make(name, final_map="us6"), make(name, final_map="us6")
    saving.set_grad_checkpointing()
    results = []
    for model in (plain.train(), saving.train()):
        out = model(images())
        out.square().sum().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for n, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][n], rtol=1e-4, atol=1e-5)


def test_checkpointing_recomputes():
    """With checkpointing on, layers run again in the backward pass."""
    model = make(final_map="us6").train()
    model.set_grad_checkpointing()
    runs = []
    model.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: runs.append(1))
    out = model(images())
    assert len(runs) == 1
    out.sum().backward()
    assert len(runs) == 2


def test_layer_groups():
    model = make(final_map="us10", num_classes=3)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [
        "vae.encoder.conv_in.weight",
        "unet.down_blocks.0.resnets.0.conv1.weight",
        "unet.down_blocks.3.resnets.1.conv1.weight",
        "unet.mid_block.resnets.0.conv1.weight",
        "unet.up_blocks.0.resnets.0.conv1.weight",
        "unet.up_blocks.2.resnets.2.conv1.weight",
        "head.fc.weight",
    ]
    layers = [groups[name] for name in order]
    assert layers == sorted(set(layers)) and layers[0] == 0 and max(groups.values()) == layers[-1]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) < max(groups.values())
    assert len(param_groups_layer_decay(model, layer_decay=0.7)) > 10
    assert model.no_weight_decay() == set()


def test_deterministic_and_batch_independent():
    for train in (False, True):
        model = make(features_only=True, out_indices=(0,)).train(train)
        x = images(3)
        with torch.no_grad():
            both = model(x)[0]
            torch.testing.assert_close(both, model(x)[0], rtol=0, atol=0)
            torch.testing.assert_close(both[1:2], model(x[1:2])[0], rtol=1e-4, atol=1e-5)


# --- dtypes, formats, copies ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make(features_only=True, out_indices=(4, 10))
    expected = model(images())
    half = copy.deepcopy(model).to(dtype)
    assert half.model.timestep.dtype == torch.float32 and half.model.timestep == 261
    for x, reference in zip(half(images().to(dtype)), expected):
        assert x.dtype == dtype
        assert (x.float() - reference).norm() / reference.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_channels_last():
    model, x = make(features_only=True), images()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    for a, b in zip(model(x.to(memory_format=torch.channels_last)), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_meta_device():
    with torch.device("meta"):
        model = timm.create_model("cleandift_tiny", features_only=True)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(1, 3, 64, 64, device="meta"))[0].shape == (1, 80, 16, 16)


def test_deepcopy_pickle_state_dict(tmp_path):
    model, x = make(final_map="us6", num_classes=3), images()
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    state = model.state_dict()
    assert {n.split(".")[0] for n in state} == {"vae", "unet", "prompt_embeds", "timestep", "head"}
    assert state["prompt_embeds"].shape == (1, 3, 6) and state["timestep"].shape == ()
    other = make(seed=1, final_map="us6", num_classes=3)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other(x), expected)
    with pytest.raises(RuntimeError, match="vae.encoder.conv_in.bias"):
        other.load_state_dict({k: v for k, v in state.items() if k != "vae.encoder.conv_in.bias"})


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    model, x = make(name, features_only=True, out_indices=(10, 7)), images()
    backend = "inductor" if name == "test_cleandift" else "aot_eager"
    with torch.no_grad():
        for a, b in zip(torch.compile(model, fullgraph=True, backend=backend)(x), model(x)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_export(name):
    model, x = make(name, features_only=True), images()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        for a, b in zip(program.module()(x), model(x)):
            torch.testing.assert_close(a, b)


def test_export_dynamic_size():
    model, x = make(final_map="us6", global_pool=""), images(2, 128, 128)
    step = torch.export.Dim("height", min=2, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: 64 * step},))
    other = images(2, 192, 128)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other))


# --- prompts ---


def test_prompt_embeddings_change_the_maps():
    model, x = make(features_only=True, out_indices=(4,)), images()
    before = model(x)[0]
    embeds = torch.randn(2, 3, 6)
    model.model.set_prompt(embeds)
    both = model(x)[0]
    assert not torch.allclose(both, before)
    model.model.set_prompt(embeds[1:])
    torch.testing.assert_close(model(x)[0][1], both[1])
    model.model.set_prompt(embeds)
    with pytest.raises(ValueError, match="2 prompts were set, but the batch has 3 images"):
        model(images(3))
    with pytest.raises(ValueError, match="N x L x 6"):
        model.model.set_prompt(torch.randn(1, 3, 7))
    with pytest.raises(ValueError, match="no text encoder is known.*a cat.*text_encoder="):
        make(prompt="a cat")


def test_bfloat16_on_a_device_without_it(monkeypatch):
    monkeypatch.setattr("cleandift_backbones.models.cleandift.lacks_bfloat16", lambda device: device.type == "cpu")
    with pytest.raises(RuntimeError, match="cpu has no bfloat16: use dtype=torch.float16 or torch.float32"):
        timm.create_model("test_cleandift").bfloat16()
    with pytest.raises(RuntimeError, match="cpu has no bfloat16"):
        timm.create_model("cleandift_tiny", pretrained=True, features_only=True, dtype=torch.bfloat16)


def test_dtype_and_device_arguments():
    model = timm.create_model("test_cleandift", dtype="float16", device="meta", features_only=True)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float16, "meta")}
    assert model.model.timestep.dtype == torch.float32
