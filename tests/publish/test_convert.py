"""tools/convert.py: every form of weights becomes a native folder with equal maps, and a UNet folder for diffusers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standins
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save

from cleandift_backbones.models.architectures import ARCHITECTURES, published
from cleandift_backbones.models.denoisers.unet import FeatureUNet
from cleandift_backbones.publish.card import save_folder
from tools.convert import main

ROOT = Path(__file__).parents[2]
TINY = ARCHITECTURES["tiny"]
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    UNet2DConditionModel(**TINY.denoiser.config).save_pretrained(folder / "unet")
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    AutoencoderKL(**TINY.vae, **blocks).save_pretrained(folder / "vae")
    DDIMScheduler(**TINY.schedule.config).save_pretrained(folder / "scheduler")
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(Path(published("dift_tiny")["text_encoder"]) / part, folder / part)
    return folder


@pytest.fixture
def parts(tmp_path):
    """Command-line arguments for the parts that a lone UNet lacks, as local files."""
    folder = standins.write(tmp_path / "mirror", standins.diffusers_files())
    (tmp_path / "vae.safetensors").write_bytes(standins.sd_vae())
    return ["--vae", str(tmp_path / "vae.safetensors"), "--text-encoder", str(folder)]


def load(folder, **kwargs):
    options = dict(features_only=True, out_indices=tuple(range(11)))
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **{**options, **kwargs}).eval()


def check(model, seed=0, timestep=standins.TIMESTEP, dtype=torch.float16, **tolerance):
    expected = standins.expected_maps(X, seed, timestep, dtype)
    with torch.no_grad():
        for info, found in zip(model.feature_info.get_dicts(), model(X)):
            torch.testing.assert_close(found, expected[info["name"]], **{**dict(rtol=1e-3, atol=1e-4), **tolerance})


ROUND = dict(rtol=0.05, atol=0.02)  # VAE and prompt in 16 bit too


def test_diffusers_folder_to_a_native_file(source, tmp_path):
    out = tmp_path / "native.safetensors"
    assert main([str(source), "--model", "dift_tiny", "--out", str(out), "--dtype", "float32", "--cut"]) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata()["model"] == "dift_tiny" and file.metadata()["format"] == "pt"
        names = list(file.keys())
    assert not [n for n in names if n.startswith(("vae.decoder", "unet.conv_out"))]
    model = timm.create_model(
        "cleandift_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(out)), features_only=True
    ).eval()
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(source / "vae").eval()
        latents = vae.encode(X).latent_dist.mode() * vae.config.scaling_factor
        unet = FeatureUNet.from_pretrained(source / "unet").eval()
        expected = unet(latents, 261, model.model.prompt_embeds, ["us9", "us6", "us3", "mid"])
        for a, b in zip(reversed(model(X)), expected.values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compvis_unet(tmp_path, parts, capsys):
    (tmp_path / "unet.safetensors").write_bytes(standins.compvis_unet())
    out = tmp_path / "native"
    assert main([str(tmp_path / "unet.safetensors"), "--out", str(out), "--timestep", "247.5", *parts]) == 0
    said = capsys.readouterr().out
    assert "found UNet in diffusers' layout with UNet (" in said and "of test_cleandift" in said
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    check(load(out), **ROUND)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "unet.conv_out.weight" in file.keys()  # noqa: SIM118
        assert {file.get_tensor(n).dtype for n in file.keys() if n != "timestep"} == {torch.float16}  # noqa: SIM118
        assert len(file.metadata()["sha256"]) == 64 and str(tmp_path) not in str(file.metadata())
    card = (out / "README.md").read_text()
    assert "Converted from unet.safetensors" in card and "license: apache-2.0" in card


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_compvis_full(tmp_path, parts, which):
    (tmp_path / "full.safetensors").write_bytes(standins.compvis_full())
    arguments = [str(tmp_path / "full.safetensors"), "--out", str(tmp_path / "native"), "--unet", which]
    arguments += ["--model", "test_cleandift"]  # which adds no noise to the teacher
    assert (
        main([*arguments, *parts[2:], "--dtype", "float32"] + (["--timestep", "7"] if which == "teacher" else [])) == 0
    )
    seed, timestep = (0, standins.TIMESTEP) if which == "student" else (1, 7)
    check(load(tmp_path / "native"), seed, timestep, **ROUND)


def test_a_repository_on_the_hub(hub, tmp_path):
    hub.place("me/sd", standins.diffusers_files())
    assert (
        main(["me/sd@main", "--out", str(tmp_path / "native"), "--timestep", "100", "--model", "test_cleandift"]) == 0
    )
    check(load(tmp_path / "native"), 1, 100, torch.float32)


def test_back_to_diffusers(tmp_path, parts):
    (tmp_path / "unet.safetensors").write_bytes(standins.compvis_unet())
    native, back, again = tmp_path / "native", tmp_path / "back", tmp_path / "again"
    main([str(tmp_path / "unet.safetensors"), "--out", str(native), "--timestep", "247.5", *parts])
    assert main([str(native), "--to", "diffusers", "--out", str(back), "--dtype", "float32"]) == 0
    unet, report = UNet2DConditionModel.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, standins.unet(0).state_dict()[name].half().float()), name
    features = FeatureUNet.from_pretrained(back).eval()
    with torch.no_grad():
        vae = standins.vae()
        latents = vae.encode(X).latent_dist.mode() * vae.config.scaling_factor
        maps = features(latents, standins.TIMESTEP, standins.empty_prompt())
    for name, expected in standins.expected_maps(X).items():
        torch.testing.assert_close(maps[name], expected, rtol=1e-3, atol=1e-4)
    # The timestep came along, so that the way back needs nothing but the VAE and the prompt.
    assert main([str(back), "--out", str(again), "--model", "test_cleandift", *parts]) == 0
    check(load(again), **ROUND)


def test_cut_weights_need_another_unet_for_diffusers(tmp_path, capsys):
    arguments = ["cleandift_tiny", "--to", "diffusers", "--out", str(tmp_path / "unet")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "was saved only as deep as its finest map. Give --fill SOURCE" in capsys.readouterr().err
    torch.manual_seed(0)
    UNet2DConditionModel(**TINY.denoiser.config).save_pretrained(tmp_path / "other")
    assert main([*arguments, "--fill", str(tmp_path / "other")]) == 0
    unet = FeatureUNet.from_pretrained(tmp_path / "unet").eval()
    model = timm.create_model("cleandift_tiny", pretrained=True, features_only=True, out_indices=(0,)).eval()
    with torch.no_grad():
        latents, _ = model.model.vae(X)
        found = unet(latents, model.model.timestep, model.model.prompt_embeds, ["us10"])["us10"]
        torch.testing.assert_close(found, model(X)[0], rtol=1e-3, atol=1e-3)


def test_shards(tmp_path, source):
    out = tmp_path / "native"
    assert main([str(source), "--model", "dift_tiny", "--out", str(out), "--max-shard-size", "10MB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 2 and not (out / "model.safetensors").exists()
    assert load(out, out_indices=(10,), timestep=10)(X)[0].shape == (1, 112, 2, 2)


def test_refusals(source, tmp_path, capsys):
    out = tmp_path / "native.safetensors"

    def refused(folder, message, *arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(folder), "--out", str(out), *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said, said
        assert not out.exists()

    refused(tmp_path, "holds no model.safetensors, diffusion_pytorch_model.safetensors, unet/ or vae/")
    refused(source, "another family (text of width 96)", "--model", "dift_sd15")
    refused(source, "timestep must lie in 0..999, got 5000", "--model", "dift_tiny", "--timestep", "5000")
    refused(source, "--vae has no meaning with --to diffusers", "--to", "diffusers", "--vae", "x")
    refused("nobody/nothing", "nobody/nothing does not exist, or is private")
    refused(tmp_path / "nowhere", "is neither a file or folder here nor OWNER/NAME")
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    config = json.loads((changed / "vae/config.json").read_text()) | {"scaling_factor": 0.5}
    (changed / "vae/config.json").write_text(json.dumps(config))
    refused(changed, "scaling_factor of its vae is 0.5, the model has", "--model", "dift_tiny")
    (tmp_path / "vae.safetensors").write_bytes(standins.sd_vae())
    refused(tmp_path / "vae.safetensors", "holds no UNet of a known architecture")
    (tmp_path / "other.safetensors").write_bytes(
        save({"conv_in.weight": torch.zeros(1), "down_blocks.0": torch.zeros(1)})
    )
    refused(tmp_path / "other.safetensors", "holds no UNet of a known architecture")
    refused(published("cleandift_tiny")["unet"], "holds no teacher", "--unet", "teacher")
    out.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main([str(source), "--model", "dift_tiny", "--out", str(out)])
    assert "exists: choose another --out, or give --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


def test_full_disk_leaves_nothing_behind(tmp_path, parts):
    """The operating system refuses to write more than 50 kB to a file."""
    (tmp_path / "unet.safetensors").write_bytes(standins.compvis_unet())
    (tmp_path / "out").mkdir()
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from tools.convert import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(tmp_path / "unet.safetensors"), "--timestep", "1", *parts, "--out", str(tmp_path / "out/native")]
    run = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "did not take a file of" in run.stderr and "Is the disk full?" in run.stderr, (
        run.stderr
    )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(num_classes=3, in_chans=1),
        dict(num_classes=2, final_map="us6", global_pool="max"),
        dict(final_map="us6"),  # pooled features of this map
    ],
)
def test_what_a_native_folder_says_is_kept(tmp_path, kwargs):
    torch.manual_seed(0)
    model = timm.create_model("test_cleandift", **kwargs).eval()
    save_folder(model, tmp_path / "one")
    assert main([str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    x = X[:, : model.in_chans]
    torch.testing.assert_close(timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).eval()(x), model(x))


def test_projection_heads_of_a_native_folder_are_kept(tmp_path):
    heads = dict(depth=1, conditioning="film", gated=True)
    torch.manual_seed(0)
    options = dict(features_only=True, out_indices=(0, 10), projected_timestep=200)
    model = timm.create_model("test_cleandift", heads=heads, **options).eval()
    save_folder(model, tmp_path / "one", arguments=dict(heads=heads))
    arguments = [str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--model", "test_cleandift"]
    assert main(arguments) == 0
    found = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True, **options).eval()
    with torch.no_grad():
        for one, other in zip(found(X), model(X), strict=True):
            torch.testing.assert_close(one, other)
    assert main([*arguments[:2], str(tmp_path / "without"), *arguments[3:], "--no-heads"]) == 0
    with safe_open(tmp_path / "without/model.safetensors", "pt") as file:
        assert not any(name.startswith("heads.") for name in file.keys())  # noqa: SIM118 (no mapping)
    options.pop("projected_timestep")
    found = timm.create_model(f"local-dir:{tmp_path / 'without'}", pretrained=True, **options).eval()
    assert found.model.heads is None


def test_arguments_of_dift_are_kept(tmp_path):
    model = timm.create_model(
        "dift_tiny", pretrained=True, final_map="us10", timestep=10, ensemble_size=2, noise_seed=3
    )
    save_folder(model, tmp_path / "one")
    assert main([str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    arguments = json.loads((tmp_path / "two/config.json").read_text())["model_args"]
    assert arguments == dict(final_map="us10", timestep=10, ensemble_size=2, noise_seed=3)


def test_of_a_full_file_on_the_hub_only_the_needed_half_is_read(hub, tmp_path):
    hub.place("me/full", {"full.safetensors": standins.compvis_full()})
    hub.place("mirror/sd", standins.diffusers_files())
    arguments = ["me/full/full.safetensors", "--text-encoder", "mirror/sd", "--out", str(tmp_path / "native")]
    assert main([*arguments, "--dtype", "float32"]) == 0
    check(load(tmp_path / "native"), **ROUND)
    assert hub.sent["full.safetensors"] < len(standins.compvis_full()) * 0.75


def test_overwrite_spares_what_is_not_ours(tmp_path, parts, capsys):
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    with pytest.raises(SystemExit):
        main([str(folder / "unet"), "--out", str(folder), "--overwrite", *parts])
    assert "holds other files" in capsys.readouterr().err and (folder / "vae/config.json").is_file()
