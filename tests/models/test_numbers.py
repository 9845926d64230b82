"""Numbers that are not weights keep their precision: the learned timestep, the frequencies of the heads' features."""

import copy

import pytest
import standins
import timm
import torch
from safetensors.torch import load_file, save_file

import cleandift_backbones
import cleandift_backbones.publish.card as publishing
from cleandift_backbones import checkpoints
from cleandift_backbones.models.projection_heads import FourierFeatures
from cleandift_backbones.publish.convert import to_diffusers, to_native

HALVES = [torch.bfloat16, torch.float16]
TIMESTEP = torch.tensor(260.99945068359375)  # bfloat16 has 260, float16 has 261
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", **kwargs)
    model.timestep.copy_(TIMESTEP)
    return model


def same(tensor, wanted=TIMESTEP):
    """Whether it is a float32 tensor of equal bits."""
    return tensor.dtype == torch.float32 and torch.equal(tensor, wanted)


@pytest.fixture
def folder(tmp_path):
    return publishing.save_folder(make(final_map="us10"), tmp_path / "native")


@pytest.mark.parametrize("dtype", ["auto", None, "float64", *HALVES])
def test_create_model(folder, dtype):
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=dtype, features_only=True)
    assert same(whole.model.timestep)
    assert same(timm.create_model("cleandift_tiny", pretrained=True, dtype=dtype).timestep, TINY)
    state = load_file(folder / "model.safetensors")
    assert same(timm.create_model("test_cleandift", pretrained=True, dtype=dtype,
                                  pretrained_cfg_overlay=dict(state_dict=state)).timestep)  # fmt: skip


TINY = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).model.timestep


@pytest.mark.parametrize("dtype", HALVES)
def test_files_and_conversions(folder, tmp_path, dtype):
    state = load_file(folder / "model.safetensors")
    checkpoints.save_native(state, tmp_path / "file.safetensors", dtype=dtype)
    checkpoints.save_native(
        {n: t.to(dtype) for n, t in state.items()} | {"timestep": TIMESTEP}, tmp_path / "b.safetensors"
    )
    publishing.save_folder(make(final_map="us10"), tmp_path / "saved", dtype=dtype)
    to_native(str(folder), tmp_path / "converted", dtype=dtype)
    to_native(str(folder), tmp_path / "again.safetensors", dtype=dtype)
    names = ["file.safetensors", "b.safetensors", "saved/model.safetensors", "converted/model.safetensors"]
    for name in [*names, "again.safetensors"]:
        stored = load_file(tmp_path / name)
        assert same(stored["timestep"]) and stored["unet.conv_in.weight"].dtype == dtype, name
    # Through a folder for diffusers, whose metadata hold it, and on to another such folder.
    (tmp_path / "fill.safetensors").write_bytes(standins.compvis_unet())
    to_diffusers(str(tmp_path / "converted"), tmp_path / "unet", dtype=dtype, fill=str(tmp_path / "fill.safetensors"))
    to_diffusers(str(tmp_path / "unet"), tmp_path / "unet2", dtype=dtype)
    sd = standins.write(tmp_path / "sd", standins.diffusers_files())
    sources = dict(unet=str(tmp_path / "unet2"), vae=str(sd / "vae"), text_encoder=str(sd))
    assert same(timm.create_model("test_cleandift", pretrained=True, dtype=dtype, sources=sources).timestep)


@pytest.mark.parametrize("dtype", HALVES)
def test_modules(dtype):
    model = make()
    for moved in (copy.deepcopy(model).to(dtype), model.half(), model.bfloat16(), copy.deepcopy(model)):
        assert same(moved.timestep)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # as Lightning and transformers do while they build a model
        built = timm.create_model("cleandift_tiny", pretrained=True, timestep=100.7)
        loaded = timm.create_model("cleandift_tiny", pretrained=True)
        fresh = timm.create_model("test_cleandift", projected_timestep=3)
    finally:
        torch.set_default_dtype(before)
    assert same(built.timestep, torch.tensor(100.7)) and same(loaded.timestep, TINY)
    assert fresh.timestep == 261 and fresh.heads.time_emb.weight.dtype == torch.float32
    optimized = cleandift_backbones.optimize(timm.create_model("cleandift_tiny", pretrained=True).eval(), dtype=dtype)
    assert same(optimized.timestep, TINY)
    noisy = timm.create_model("dift_tiny", pretrained=True, dtype=dtype, timestep=77)
    noisy.set_noise(timestep=501)
    assert same(noisy.timestep, torch.tensor(501.0))


def test_features_are_those_of_the_whole_number(folder):
    """In bfloat16 a timestep of 260 in the place of 260.9994 would show in the time embedding."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype="bfloat16")
    seen = {}
    model.unet.time_proj.register_forward_hook(lambda m, inputs, output: seen.update(angles=output))
    model(X.bfloat16())
    exact = timm.create_model(f"local-dir:{folder}", pretrained=True).unet.time_proj(TIMESTEP.reshape(1))
    assert torch.equal(seen["angles"], exact)


def test_transformers(folder):
    transformers = pytest.importorskip("transformers")
    for dtype in HALVES:
        wrapped = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
        assert same(wrapped.timm_model.timestep) and wrapped.dtype == dtype
        config = transformers.TimmBackboneConfig(backbone="cleandift_tiny", out_indices=[4, 10])
        backbone = transformers.AutoBackbone.from_config(config, pretrained=True, dtype=dtype)
        assert same(backbone._backbone.model.timestep, TINY)


def test_mm(folder):
    pytest.importorskip("mmengine")
    from cleandift_backbones.mm import backbone as mm

    backbone = mm.CleanDIFT("test_cleandift", str(folder), out_indices=["us6"], frozen=True, dtype="bfloat16")
    assert same(backbone.model.timestep) and same(backbone.half().model.timestep)
    assert same(backbone.state_dict()["model.timestep"])


# --- the heads' frequencies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_frequencies_of_the_heads(tmp_path, dtype):
    """Projected features in 16 bit, and files of them; a rounded frequency turns its features by up to 20 degrees."""
    model = make(projected_timestep=700).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(X)
    frequencies = model.heads.time_emb.weight.clone()
    publishing.save_folder(model, tmp_path / "f", dtype=dtype)
    state = load_file(tmp_path / "f/model.safetensors")
    assert same(state["heads.time_emb.weight"], frequencies)
    loaded = timm.create_model(f"local-dir:{tmp_path}/f", pretrained=True, projected_timestep=700, dtype="auto").eval()
    assert same(loaded.heads.time_emb.weight, frequencies) and loaded.heads.time_in_proj.weight.dtype == dtype
    with torch.no_grad():
        for found in (loaded(X.to(dtype)), model.to(dtype)(X.to(dtype))):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


def test_angles_under_autocast():
    features = FourierFeatures(64)
    t = torch.linspace(0, 1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(t), features.bfloat16()(t))
    torch.testing.assert_close(features(t), (lambda a: torch.cat([a.cos(), a.sin()], -1))(
        2 * torch.pi * t[:, None] @ features.weight.T))  # fmt: skip


# --- numbers that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nan", "soon", "-3", "1e9"])
def test_a_timestep_that_is_none(tmp_path, text):
    unet = {n: t.contiguous() for n, t in standins.unet().state_dict().items()}
    save_file(unet, tmp_path / "unet.safetensors", {"timestep": text})
    weights = checkpoints.open_checkpoint(tmp_path / "unet.safetensors")
    from cleandift_backbones.models.learned import learned_timestep, stored_timestep

    with pytest.raises(
        checkpoints.CheckpointError, match="unet.safetensors holds the timestep .*not a number in 0..999"
    ):
        stored_timestep(weights)
    assert learned_timestep(None, 261, weights) == 261  # with a warning


def test_a_student_goes_on_from_the_timestep_that_it_learned(tmp_path):
    """Also from a UNet in diffusers' layout, as `to_diffusers` writes it: the metadata hold it."""
    from cleandift_backbones.distill.recipe import Recipe
    from cleandift_backbones.distill.setup import build_module, load_teacher

    unet = timm.create_model("cleandift_tiny", pretrained=True, final_map="us10").unet.state_dict()
    save_file(unet, tmp_path / "unet.safetensors", {"timestep": str(TINY.item())})
    recipe = Recipe(model="cleandift_tiny", teacher="dift_tiny", student_weights=str(tmp_path / "unet.safetensors"))
    assert torch.equal(build_module(recipe, load_teacher(recipe)).timestep.detach(), TINY.reshape(1))
