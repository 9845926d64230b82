"""Weights that other programs wrote in ways of their own: odd names, shapes, configs, and models of other purposes."""

import json

import pytest
import standins
import timm
import torch
from safetensors.torch import load_file, save, save_file

from cleandift_backbones.checkpoints import CheckpointError, ldm
from cleandift_backbones.models.latent_encoders import load_latent_encoder
from cleandift_backbones.publish.convert import to_diffusers, to_native
from cleandift_backbones.utils.errors import CleanDIFTError, InputError
from tools.convert import main

UNET, VAE = standins.unet(1).state_dict(), standins.vae().state_dict()
NATIVE = {f"unet.{name}": tensor for name, tensor in UNET.items()}
NATIVE |= {f"vae.{name}": tensor for name, tensor in VAE.items()}
LDM = ldm.ldm_state(NATIVE)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Published VAE and text encoder of the test architecture."""
    folder = standins.write(tmp_path / "published", standins.diffusers_files())
    standins.publish(monkeypatch, "test_cleandift", vae=str(folder), text_encoder=str(folder))
    return folder


def load(path, **sources):
    options = dict(pretrained=True, features_only=True, out_indices=("us10",), timestep=100)
    return timm.create_model("test_cleandift", sources=dict(unet=str(path), **sources), **options)


def check(path):
    """All tensors are those of the teacher and VAE in tests/standins.py."""
    state = load(path).model.state_dict()
    held = NATIVE.keys() & state.keys()
    assert len(held) > 600 and all(torch.equal(state[name], NATIVE[name]) for name in held)


def written(path, state):
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


# --- names and shapes ---------------------------------------------------------------------------------------------


def _attention(names, biases):
    """LDM's keys with the VAE's attention as versions of diffusers' converter left it."""
    state = {}
    for name, tensor in LDM.items():
        for old, new in zip((".q.", ".k.", ".v.", ".proj_out."), names):
            if f".mid.attn_1{old}" in name:
                name = name.replace(old, new)
                tensor = tensor[:, None, None] if biases and name.endswith("bias") else tensor
                tensor = tensor[:, :, 0, 0] if new != old and tensor.ndim == 4 else tensor
        state[name] = tensor
    return state


@pytest.mark.parametrize(
    "names, biases",
    [
        ((".q.", ".k.", ".v.", ".proj_out."), True),
        ((".to_q.", ".to_k.", ".to_v.", ".to_out.0."), False),
        ((".query.", ".key.", ".value.", ".proj_attn."), False),
    ],
)
def test_attention_of_the_vae_as_converters_wrote_it(tmp_path, published, names, biases):
    """diffusers 4790, 6226, 8320: names of diffusers in LDM's files, biases of C x 1 x 1."""
    check(written(tmp_path / "file.safetensors", _attention(names, biases)))


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "model._orig_mod.", "state_dict.", "pipe."])
def test_prefixes_of_single_files(tmp_path, published, prefix):
    check(written(tmp_path / "file.safetensors", {prefix + name: tensor for name, tensor in LDM.items()}))


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model.", "unet.", "unet.module.", "pipe.unet.", "unet.unet."])
def test_prefixes_of_a_unet(tmp_path, published, prefix):
    alone = {name.removeprefix(ldm.UNET): tensor for name, tensor in LDM.items() if name.startswith(ldm.UNET)}
    for unet in (alone, UNET):
        check(written(tmp_path / "file.safetensors", {prefix + name: tensor for name, tensor in unet.items()}))


# --- models that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [9, 8, 7, 5])
@pytest.mark.parametrize("state, first", [(UNET, "conv_in.weight"), (LDM, f"{ldm.UNET}input_blocks.0.0.weight")])
def test_unets_of_more_than_a_latent(tmp_path, published, state, first, channels):
    file = written(tmp_path / "file.safetensors", {**state, first: torch.zeros(4, channels, 3, 3)})
    message = rf"file.safetensors .* holds a UNet of {channels} input channels.*take the base model"
    for attempt in (
        lambda: load(file),
        lambda: to_native(str(file), tmp_path / "out"),
        lambda: to_diffusers(str(file), tmp_path / "out", model="test_cleandift"),
    ):
        with pytest.raises(CheckpointError, match=message):
            attempt()


def test_weights_without_a_unet(tmp_path, published):
    ema = {
        f"model_ema.diffusion_model{name.removeprefix(ldm.UNET).replace('.', '')}": tensor
        for name, tensor in LDM.items()
        if name.startswith(ldm.UNET)
    }
    vae = {name: tensor for name, tensor in LDM.items() if name.startswith(ldm.VAE)}
    file = written(tmp_path / "file.safetensors", ema | vae)
    with pytest.raises(CheckpointError, match="holds no UNet, but VAE encoder .* EMA weights, not read"):
        load(file)
    with pytest.raises(CheckpointError, match="published/vae .* holds no UNet, but VAE encoder"):
        load(published / "vae")
    with pytest.raises(CheckpointError, match="it holds nothing"):
        load(written(tmp_path / "empty.safetensors", {}))


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", [dict(scaling_factor=0.13025), dict(shift_factor=0.1), dict(act_fn="gelu")])
def test_a_vae_of_the_same_shapes_that_computes_otherwise(tmp_path, published, changes):
    """SDXL's has the shapes of Stable Diffusion's, and another scale."""
    other = standins.write(tmp_path / "other", standins.diffusers_files())
    _edit(other / "vae/config.json", **changes)
    (name, value), *_ = changes.items()
    for attempt in (
        lambda: load(published, vae=str(other / "vae")),
        lambda: load(other),
        lambda: load_latent_encoder("test_cleandift", source=str(other)),
        lambda: to_native(str(other), tmp_path / "out", timestep=1),
    ):
        with pytest.raises(CheckpointError, match=f"{name} of its vae is {value}"):
            attempt()


def test_configs_that_mean_the_same(published):
    """A number for all levels may be a list of it; newer configs have null where older ones have nothing."""
    _edit(published / "unet/config.json", attention_head_dim=[2, 2, 2, 2], freq_shift=0.0, norm_num_groups=2)
    _edit(published / "vae/config.json", shift_factor=None, scaling_factor=0.18215)
    check(published)
    _edit(published / "unet/config.json", flip_sin_to_cos=False)
    with pytest.raises(CheckpointError, match="flip_sin_to_cos of its unet is False"):
        load(published)


def test_an_index_without_its_shards(published):
    (published / "unet/diffusion_pytorch_model.safetensors").unlink()
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (published / "unet" / shards[0]).write_bytes(save(dict(list(UNET.items())[:300])))
    index = dict(weight_map={name: shards[number >= 300] for number, name in enumerate(UNET)})
    (published / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json names 2 files, of which .*00002.* is missing: get the whole"):
        load(published)


# --- what is given is used ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A native file of cleandift_tiny with the timestep 123.25."""
    to_native("cleandift_tiny", tmp_path / "tiny.safetensors", timestep=123.25)
    return str(tmp_path / "tiny.safetensors")


def make(**kwargs):
    return timm.create_model("cleandift_tiny", pretrained=True, **kwargs)


def test_a_timestep_that_is_given_goes_before_the_stored_one(tmp_path, tiny, capsys):
    assert make(sources=dict(timestep=tiny)).timestep == 123.25
    assert main(["cleandift_tiny", "--timestep", tiny, "--out", str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out/model.safetensors")["timestep"] == 123.25
    unet = written(tmp_path / "unet.safetensors", UNET)
    with pytest.raises(CheckpointError, match="unet.safetensors holds no timestep: give a file that does"):
        make(sources=dict(timestep=str(unet)))
    with pytest.raises(CleanDIFTError, match="/none.safetensors is neither a file"):
        make(sources=dict(timestep="/none.safetensors"))
    for text, message in (("nan", "0..999, got nan"), ("-1", "0..999, got -1"), ("soon", "soon is neither a file")):
        with pytest.raises(SystemExit):
            main(["cleandift_tiny", f"--timestep={text}", "--out", str(tmp_path / "other")])
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["cleandift_tiny", "--timestep", "1e2", "--out", str(tmp_path / "other")]) == 0
    assert load_file(tmp_path / "other/model.safetensors")["timestep"] == 100


def test_a_timestep_for_dift(tmp_path):
    """It is an argument there, which the folder's config.json holds."""
    assert main(["dift_tiny", "--timestep", "100", "--out", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True).model
    assert model.timestep == 100
    with pytest.raises(InputError, match="of dift_tiny is not learned: give a number, not x.safetensors"):
        to_native("dift_tiny", tmp_path / "other", parts=dict(timestep="x.safetensors"))
    with pytest.raises(InputError, match="timestep must be an integer in 0..999, got 100.5"):
        to_native("dift_tiny", tmp_path / "other", timestep=100.5)


def test_a_repository_goes_before_the_file_in_the_package(hub, tiny):
    with open(tiny, "rb") as file:
        hub.place("me/mine", {"model.safetensors": file.read()})
    assert make(pretrained_cfg_overlay=dict(hf_hub_id="me/mine")).timestep == 123.25
    with pytest.raises(CleanDIFTError, match="me/none does not exist"):
        make(pretrained_cfg_overlay=dict(hf_hub_id="me/none"))


def test_weights_that_would_stay_unused():
    with pytest.raises(InputError, match="pretrained=False leaves it unused"):
        timm.create_model("cleandift_tiny", pretrained_cfg_overlay=dict(state_dict=NATIVE))
    with pytest.raises(CleanDIFTError, match="pretrained='my.safetensors' names no weights"):
        timm.create_model("cleandift_tiny", pretrained="my.safetensors")


def test_a_text_encoder_of_another_model(published):
    with pytest.raises(CheckpointError, match="prompts of 3 x 6 numbers, the model .* needs 16 x 96"):
        make(sources=dict(text_encoder=str(published)))
