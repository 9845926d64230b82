"""Distillation of a student that sees a light encoder's latents, while its teacher sees the VAE's."""

import json

import pytest
import timm
import torch
from diffusers import DDPMScheduler
from finetune_runs import arguments, equal, finetune, refused
from safetensors.torch import load_file, save_file

from cleandift_backbones.distill.distiller import Distiller
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.train import Training
from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.models.denoisers.unet import FeatureUNet
from cleandift_backbones.models.latents import LatentEncoder, TinyLatentEncoder
from tools.tiny.train_latent_encoder import main as train_encoder

LIGHT = "latent_encoder=tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A light encoder with random weights, unlike the shipped one."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("light") / "light.safetensors"
    save_file(TinyLatentEncoder(ARCHITECTURES["tiny"].vae_tiny).state_dict(), path)
    return path


def test_loss_of_two_latents():
    """The teacher noises the true latents, the student sees its own: written out plainly."""
    cfg = ARCHITECTURES["test"]
    torch.manual_seed(0)
    teacher, student = FeatureUNet.build(cfg.denoiser.config, "us6"), FeatureUNet.build(cfg.denoiser.config, "us6")
    scheduler = DDPMScheduler(**cfg.schedule.config)
    module = Distiller(teacher, student, scheduler, {"us6": 1.0}, None, "l2")
    true, own, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 1, 4, 8, 8)
    prompt, steps = torch.randn(1, 3, 6), torch.tensor([[5], [700]])
    loss, _ = module(true, steps, noise, prompt, prompt, own)
    target = teacher(scheduler.add_noise(true, noise[:, 0], steps[:, 0]), steps[:, 0], prompt, ["us6"])["us6"]
    torch.testing.assert_close(loss, (student(own, 261.0, prompt, ["us6"])["us6"] - target).square().mean())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    found = module.compare(true, noise[:, 0], 5, prompt, prompt, "us6", own)[0]
    torch.testing.assert_close(found, student(own, 261.0, prompt, ["us6"])["us6"])


def test_trains_exports_and_resumes(pictures, tmp_path, weights):
    options = [LIGHT, f"latent_encoder_weights={weights}", "sample_every=4"]
    state = finetune(pictures, tmp_path / "whole", *options)
    config = json.loads((tmp_path / "whole/native/config.json").read_text())
    assert config["model_args"]["latent_encoder"] == "tiny"
    assert str(weights) not in (tmp_path / "whole/native/README.md").read_text()
    light = load_file(weights)
    assert {n.removeprefix("vae.") for n in state if n.startswith("vae.")} == light.keys()
    assert all(torch.equal(state[f"vae.{name}"], tensor) for name, tensor in light.items())
    model = timm.create_model(f"local-dir:{tmp_path / 'whole/native'}", pretrained=True, features_only=True)
    assert model.model.vae.kind == "tiny"
    # Stopped and started again, it is the same run; with the VAE's latents, another.
    assert finetune_part(pictures, tmp_path / "parts", *options, "stop_after=2") == 2
    equal(state, finetune(pictures, tmp_path / "parts", *options))
    plain = finetune(pictures, tmp_path / "plain")
    assert not torch.equal(plain["unet.conv_in.weight"], state["unet.conv_in.weight"])


def finetune_part(pictures, out, *overrides):
    training = Training(load_recipe(arguments(pictures, out)[0], arguments(pictures, out, *overrides)[1:]))
    assert training.run() == 0
    return training.step


def test_cache_holds_both(pictures, tmp_path, weights, monkeypatch):
    light = [LIGHT, f"latent_encoder_weights={weights}", "max_steps=2"]
    cached = [*light, f"cache_dir={tmp_path / 'cache'}"]
    live = finetune(pictures, tmp_path / "live", *light)
    first = finetune(pictures, tmp_path / "first", *cached)
    equal(live, first, rtol=0.02, atol=2e-3)  # latents are kept in 16 bit

    def refuse(*args, **kwargs):
        raise AssertionError("used although everything is cached")

    for encoder in (LatentEncoder, TinyLatentEncoder):
        monkeypatch.setattr(encoder, "forward", refuse)
    equal(first, finetune(pictures, tmp_path / "second", *cached))
    # Neither another light encoder nor none is served from it.
    for number, other in enumerate((["max_steps=2"], [LIGHT, "max_steps=2"])):
        with pytest.raises(AssertionError, match="used although"):
            finetune(pictures, tmp_path / f"other{number}", *other, f"cache_dir={tmp_path / 'cache'}")


def test_starts_from_a_student(pictures, tmp_path):
    """And from its learned timestep; without heads and steps the student is unchanged."""
    finetune(pictures, tmp_path / "first", "max_steps=2", "learning_rate=0.01", "warmup_steps=1")
    native = tmp_path / "first/native"
    given = arguments(pictures, tmp_path / "second", LIGHT, f"student_weights={native}", f"heads.weights={native}")
    module = Training(load_recipe(given[0], given[1:])).module
    state = load_file(native / "model.safetensors")
    assert float(module.timestep.detach()) == state["timestep"] != 261
    assert all(torch.equal(tensor, state[f"unet.{name}"]) for name, tensor in module.student.state_dict().items())
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").unet.state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in module.teacher.state_dict().items())
    assert not torch.equal(teacher["conv_in.weight"], state["unet.conv_in.weight"])


def test_a_student_of_light_latents_is_refused_by_a_run_on_the_vaes(pictures, tmp_path, capsys):
    finetune(pictures, tmp_path / "light", LIGHT, "max_steps=1")
    native = tmp_path / "light/native"
    given = f"student_weights={native}"
    refused(pictures, tmp_path / "plain", capsys, "give latent_encoder=tiny too", given)
    Training(load_recipe(*_split(arguments(pictures, tmp_path / "again", LIGHT, given))))


def _split(given):
    return given[0], given[1:]


def test_what_is_refused(pictures, tmp_path, capsys, weights):
    out = tmp_path / "run"
    refused(pictures, out, capsys, "latent_encoder must be one of default, tiny, got 'taesd'", "latent_encoder=taesd")
    refused(pictures, out, capsys, "needs latent_encoder=tiny", f"latent_encoder_weights={weights}")
    vae = str(weights.parent.parent / "none.safetensors")
    refused(pictures, out, capsys, "none.safetensors", LIGHT, f"latent_encoder_weights={vae}")
    finetune(pictures, out, "max_steps=2")
    refused(pictures, out, capsys, "latent_encoder was default and is tiny", LIGHT, "max_steps=2")


# --- tools/tiny/train_latent_encoder.py ---


def test_encoder_training(pictures, tmp_path, capsys):
    given = ["--data", str(pictures), "--size", "64", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    given += ["--warmup", "2", "--ema", "0.5", "--save-steps", "10", "--eval-steps", "20", "--out"]
    assert train_encoder([*given, str(tmp_path / "whole"), "--max-steps", "40"]) == 0
    errors = [json.loads(line).get("heldout_mse") for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    errors = [error for error in errors if error is not None]
    assert errors[-1] < 0.7 * errors[0]
    model = timm.create_model(
        "cleandift_tiny", pretrained=True, latent_encoder="tiny", sources=dict(vae=str(tmp_path / "whole/encoder"))
    )
    made = load_file(tmp_path / "whole/encoder/diffusion_pytorch_model.safetensors")
    assert torch.equal(model.vae.encoder.layers[0].weight, made["encoder.layers.0.weight"])
    # From weights: the first figures are no worse than those it ended with.
    start = ["--start", str(tmp_path / "whole/encoder"), "--max-steps", "1", "--lr", "1e-9", "--eval-steps", "1"]
    assert train_encoder([*given, str(tmp_path / "more"), *start]) == 0
    (first, *_) = [json.loads(line) for line in (tmp_path / "more/log.jsonl").read_text().splitlines()]
    assert first["heldout_mse"] == pytest.approx(errors[-1], rel=1e-3)


def test_encoder_training_resumes(pictures, tmp_path, monkeypatch):
    given = ["--data", str(pictures), "--size", "64", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
    given += ["--max-steps", "4", "--save-steps", "2", "--warmup", "1", "--out"]
    assert train_encoder([*given, str(tmp_path / "whole")]) == 0
    from tools.tiny.training import Loop

    save = Loop.save

    def save_and_die(loop):
        save(loop)
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "save", save_and_die)
    with pytest.raises(SystemExit) as stop:
        train_encoder([*given, str(tmp_path / "parts")])
    assert stop.value.code == 130
    monkeypatch.setattr(Loop, "save", save)
    assert train_encoder([*given, str(tmp_path / "parts")]) == 0
    name = "encoder/diffusion_pytorch_model.safetensors"
    equal(load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name))
