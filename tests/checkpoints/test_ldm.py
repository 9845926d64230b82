"""Single-file checkpoints with the key names of the original Stable Diffusion code, both ways."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import standins
import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from finetune_runs import RECIPE
from safetensors.torch import load_file, save_file

from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints import ldm
from cleandift_backbones.checkpoints.hub import HubFile
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.setup import load_teacher
from cleandift_backbones.models.architectures import ARCHITECTURES, published
from cleandift_backbones.models.latent_encoders import load_latent_encoder
from cleandift_backbones.models.pretrained import open_header
from cleandift_backbones.publish.card import save_folder
from cleandift_backbones.publish.convert import find_model
from tools.convert import main


def parts(arch, device="meta"):
    """diffusers' own UNet and VAE of an architecture, with their configs."""
    cfg = ARCHITECTURES[arch]
    levels = len(cfg.vae["block_out_channels"])
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**cfg.denoiser.config), AutoencoderKL(
            **{**blocks, "layers_per_block": 2, **cfg.vae}
        )


def native(unet, vae):
    state = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    return state | {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_names_are_those_that_diffusers_reads(arch):
    """diffusers' own converter turns what is written into the state dicts of its modules; so does the way back."""
    unet, vae = parts(arch)
    state = native(unet, vae)
    written = ldm.ldm_state(state)
    assert len(written) == len(state)
    for module, convert in ((unet, convert_ldm_unet_checkpoint), (vae, convert_ldm_vae_checkpoint)):
        found = convert(dict(written), dict(module.config))
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in module.state_dict().items()}
    form, rename = ldm.identify(written)
    assert form == "LDM checkpoint" and [rename(name) for name in written] == list(state)


def test_tensors_are_those_that_diffusers_reads():
    unet, vae = parts("test", "cpu")
    written = ldm.ldm_state(native(unet, vae))
    for module, convert in ((unet, convert_ldm_unet_checkpoint), (vae, convert_ldm_vae_checkpoint)):
        found = convert(dict(written), dict(module.config))
        assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_names_of_the_published_files():
    """Some keys of the public files of SD 1.5 and 2.1, and their shapes."""
    for arch, linear in (("sd15", 4), ("sd21", 2)):
        written = ldm.ldm_state(native(*parts(arch)))
        shapes = {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
            "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1)[:linear],
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (
                320,
                ARCHITECTURES[arch].denoiser.config["cross_attention_dim"],
            ),
            "model.diffusion_model.time_embed.2.weight": (1280, 1280),
            "model.diffusion_model.out.2.bias": (4,),
            "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "first_stage_model.decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
            "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        }
        assert {name: tuple(written[name].shape) for name in shapes} == shapes


class Shapes(dict):
    """Tensors on the meta device as an open file."""

    def metadata(self):
        return None

    def get_slice(self, name):
        return SimpleNamespace(get_shape=lambda: self[name].shape)


@pytest.mark.parametrize("arch", ["sd15", "sd21", "tiny"])
def test_a_base_model_is_taken_for_dift(arch):
    weights = checkpoints.open_files("v1-5-pruned.safetensors", [Shapes(ldm.ldm_state(native(*parts(arch))))])
    assert find_model(weights) == f"dift_{arch}" and weights.latent_encoder() == "default"


# --- files --------------------------------------------------------------------------------------------------------

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def rest():
    """What stands beside UNet and VAE in files of SD 1.x: text encoder, EMA weights, noise schedule."""
    _, encoder = standins.text_encoder()
    text = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in encoder.state_dict().items()}
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    ema = {f"model_ema.diffusion_model{n.replace('.', '')}": t + 1 for n, t in standins.unet(1).state_dict().items()}
    return text | ema | {"model_ema.num_updates": torch.tensor(5), "betas": torch.rand(1000)}


def single_file(path, *without, dtype=torch.float32):
    """A single file of the teacher in tests/standins.py, without keys that begin so."""
    state = ldm.ldm_state(native(standins.unet(1), standins.vae())) | rest()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items() if not n.startswith(without)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return str(path)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Published VAE and text encoder of the test architecture."""
    folder = standins.write(tmp_path / "published", standins.diffusers_files())
    standins.publish(monkeypatch, "test_cleandift", vae=str(folder), text_encoder=str(folder))
    return folder


def check(model):
    """Maps equal those of diffusers' own VAE and UNet."""
    expected = standins.expected_maps(X, 1, 100, torch.float32)
    with torch.no_grad():
        for info, found in zip(model.feature_info.get_dicts(), model(X)):
            torch.testing.assert_close(found, expected[info["name"]], rtol=1e-3, atol=1e-4)


def load(unet, timestep=100, **sources):
    options = dict(pretrained=True, features_only=True, out_indices=range(11), timestep=timestep)
    return timm.create_model("test_cleandift", sources=dict(unet=str(unet), **sources), **options).eval()


@pytest.mark.parametrize("without", [(), ("model_ema", "betas", "cond_stage_model"), ("first_stage_model",)])
def test_single_files_load(tmp_path, known, without):
    """Whole, pruned, and without a VAE, which then comes from where it is published."""
    file = single_file(tmp_path / "model.safetensors", *without)
    check(load(file))
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file), features_only=True, timestep=100)
    check(timm.create_model("test_cleandift", **overlay).eval())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_unet_alone(tmp_path, known, prefix):
    """As in ComfyUI's folder diffusion_models."""
    state = ldm.ldm_state(native(standins.unet(1), standins.vae()))
    unet = {n.replace(ldm.UNET, prefix): t.contiguous() for n, t in state.items() if n.startswith(ldm.UNET)}
    save_file(unet, tmp_path / "unet.safetensors")
    check(load(tmp_path / "unet.safetensors"))


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_alone(tmp_path, known, prefix):
    """As in vae-ft-mse-840000-ema-pruned, also with the loss of its training."""
    state = ldm.ldm_state(native(standins.unet(1), standins.vae()))
    vae = {n.replace(ldm.VAE, prefix): t.contiguous() for n, t in state.items() if n.startswith(ldm.VAE)}
    save_file(vae | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    (known / "vae/diffusion_pytorch_model.safetensors").unlink()
    check(load(known / "unet", vae=str(tmp_path / "vae.safetensors")))
    encoder = load_latent_encoder("test_cleandift", source=str(tmp_path / "vae.safetensors"))
    assert torch.equal(encoder.quant_conv.weight, standins.vae().quant_conv.weight)


def test_on_the_hub(hub, tmp_path, known):
    """Its header is read before anything large is fetched."""
    data = Path(single_file(tmp_path / "model.safetensors")).read_bytes()
    hub.place("me/sd", {"v1-5-pruned.safetensors": data})
    weights = open_header(HubFile("me/sd", "v1-5-pruned.safetensors"))
    assert weights.form == "LDM checkpoint" and "EMA weights, not read (" in weights.describe()
    assert not list(hub.cache.rglob("*.safetensors"))
    check(load("me/sd/v1-5-pruned.safetensors"))


def test_as_the_teacher_of_a_training(tmp_path, known, monkeypatch):
    file = single_file(tmp_path / "model.safetensors")
    standins.use_parts(monkeypatch, "tiny", ARCHITECTURES["test"])
    standins.publish(monkeypatch, "dift_tiny", **published("test_cleandift"))
    teacher = load_teacher(load_recipe(RECIPE, [f"teacher_weights={file}", "data.path=x", "output_dir=y"]))
    assert torch.equal(teacher.unet.conv_in.weight, standins.unet(1).conv_in.weight)


def test_to_native(tmp_path, known, capsys):
    file = single_file(tmp_path / "model.safetensors", dtype=torch.float16)
    out = ["--model", "test_cleandift", "--out", str(tmp_path / "native"), "--timestep", "100"]
    assert main([file, *out]) == 0
    said = capsys.readouterr().out
    assert "found LDM checkpoint with UNet (684 tensors), VAE encoder (" in said
    assert "text encoder, not read (" in said and "EMA weights, not read (" in said
    model = timm.create_model(f"local-dir:{tmp_path / 'native'}", pretrained=True, features_only=True)
    assert torch.equal(model.model.unet.conv_in.weight, standins.unet(1).conv_in.weight.half().float())
    names = checkpoints.open_checkpoint(tmp_path / "native").names()
    assert all(name.startswith(("unet.", "vae.", "timestep", "prompt_embeds")) for name in names)


def test_there_and_back(tmp_path, known, capsys):
    """native -> LDM -> native: equal tensors, timestep and all maps; diffusers itself reads the file between."""
    standins.write(tmp_path / "full", {"full.safetensors": standins.compvis_full()})
    one, file, two = tmp_path / "one", tmp_path / "file.safetensors", tmp_path / "two"
    full = ["--model", "test_cleandift", "--dtype", "float32"]
    assert main([str(tmp_path / "full/full.safetensors"), *full, "--out", str(one)]) == 0
    assert main([str(one), "--to", "ldm", "--out", str(file)]) == 0
    assert "without VAE decoder and text encoder: --fill FILE" in capsys.readouterr().out
    assert main([str(file), "--out", str(two)]) == 0
    before, after = (checkpoints.open_checkpoint(folder) for folder in (one, two))
    assert before.names() == after.names() and before["timestep"] == after["timestep"] == standins.TIMESTEP
    for name in before.names():
        assert torch.equal(before[name], after[name]), name
    expected = timm.create_model(f"local-dir:{one}", pretrained=True, features_only=True, out_indices=range(11)).eval()
    with torch.no_grad():
        for found, wanted in zip(load(file, timestep=None)(X), expected(X), strict=True):
            torch.testing.assert_close(found, wanted)
    standins.unet(0).save_config(tmp_path / "config/unet")
    unet = UNet2DConditionModel.from_single_file(str(file), config=str(tmp_path / "config"), subfolder="unet")
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[f"unet.{name}"].float()), name


def test_fill_completes_a_file(tmp_path, known):
    """A truncated student takes the rest of a whole single file from the base model's."""
    base, out = single_file(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    student = timm.create_model("test_cleandift", features_only=True, out_indices=(4,))
    save_folder(student, tmp_path / "student", dtype=torch.float16)
    given = [str(tmp_path / "student"), "--model", "test_cleandift", "--to", "ldm", "--out", str(out)]
    with pytest.raises(SystemExit):
        main(given)
    assert main([*given, "--fill", base]) == 0
    written, filler = load_file(out), load_file(base)
    assert {n for n in filler if not n.startswith(("model_ema.", "betas"))} == set(written)
    assert torch.equal(
        written["model.diffusion_model.input_blocks.0.0.weight"], student.model.unet.conv_in.weight.half()
    )
    for name in ("model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.weight"):
        assert torch.equal(written[name], filler[name].half())
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert torch.equal(written[ids], filler[ids])  # whole numbers stay


def test_to_ldm_refuses(tmp_path, known, capsys, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--to", "ldm"])
        assert stop.value.code == 2 and message in capsys.readouterr().err

    out = ["--out", str(tmp_path / "out.safetensors"), "--model", "test_cleandift"]
    refused("is one file: give an output NAME.safetensors", str(known), *out[2:], "--out", str(tmp_path / "out"))
    refused("--timesteps has no meaning with --to ldm", str(known), *out, "--timestep", "3")
    tiny = timm.create_model("test_cleandift", latent_encoder="tiny", final_map="us10")
    save_folder(tiny, tmp_path / "tiny")
    refused("for which LDM has no keys: give --vae SOURCE", str(tmp_path / "tiny"), *out, "--fill", str(known))
    standins.publish(monkeypatch, "test_cleandift", text_encoder=str(known))
    refused("holds no VAE, and none is published for test_cleandift", str(known / "unet"), *out)
    assert main([str(known / "unet"), *out, "--to", "ldm", "--vae", str(known)]) == 0


@pytest.mark.parametrize(
    "family, keys",
    [
        ("Stable Diffusion XL", ["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]),
        ("Stable Diffusion XL", ["label_emb.0.0.weight", "input_blocks.8.1.norm.weight"]),
        ("Stable Diffusion 3", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]),
        ("FLUX", ["double_blocks.0.img_attn.proj.weight"]),
        ("ControlNet", ["control_model.input_blocks.0.0.weight"]),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, family, keys):
    state = dict.fromkeys(["input_blocks.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight", *keys])
    save_file({name: torch.zeros(1) for name in state}, tmp_path / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=f"model.safetensors is of {family}: the models here"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "gone", ["model.diffusion_model.output_blocks.4.1.proj_out.weight", "model.diffusion_model.input"]
)
def test_a_damaged_file_names_what_is_missing(tmp_path, known, gone):
    file = single_file(tmp_path / "model.safetensors", gone)
    with pytest.raises(checkpoints.CheckpointError, match="model.safetensors"):
        load(file)


def test_a_pickle_is_refused(tmp_path, known, hub):
    torch.save({"state_dict": rest()}, tmp_path / "v1-5-pruned.ckpt")
    hub.place("me/sd", {"v1-5-pruned.ckpt": (tmp_path / "v1-5-pruned.ckpt").read_bytes()})
    for place in (tmp_path / "v1-5-pruned.ckpt", "me/sd/v1-5-pruned.ckpt"):
        with pytest.raises(checkpoints.CheckpointError, match="pruned.ckpt is a pickle file.*refused. Convert it"):
            load(place)
    assert not list(hub.cache.rglob("*.ckpt"))
