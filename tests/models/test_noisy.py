"""DIFT against a plain loop over diffusers' own parts."""

import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDPMScheduler

import cleandift_backbones  # noqa: F401
from cleandift_backbones.models.architectures import ARCHITECTURES

TEST = ARCHITECTURES["test"]


def make(seed=0, arch="test", **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("test_dift" if arch == "test" else f"dift_{arch}", features_only=True, **kwargs).eval()


def images(batch=2, height=64, width=64, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_equals_a_plain_loop():
    """Encode with diffusers' VAE, add each noise with its scheduler, run the UNet per image and noise, average."""
    model = make(timestep=300, ensemble_size=3, noise_seed=5, out_indices=(4, 10))
    inner, x = model.model, images()
    vae = AutoencoderKL(
        **{**TEST.vae, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    ).eval()
    vae.load_state_dict(inner.vae.state_dict(), strict=False)
    scheduler = DDPMScheduler(**TEST.schedule.config)
    noises = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        totals = {"us6": 0, "mid": 0}
        for noise in noises:
            noisy = scheduler.add_noise(latents, noise[None].expand_as(latents), torch.tensor([300, 300]))
            maps = inner.unet(noisy, 300, inner.prompt_embeds, ["us6", "mid"])
            totals = {name: total + maps[name] for name, total in totals.items()}
        for found, total in zip(model(x), totals.values()):
            torch.testing.assert_close(found, total / 3, rtol=1e-4, atol=1e-5)


def test_reproducible_whatever_the_batch():
    first, second = make(ensemble_size=2), make(ensemble_size=2)
    x = images(3)
    with torch.no_grad():
        all_three = first(x)
        torch.manual_seed(99)  # the global generator plays no part
        for a, b in zip(all_three, second(x)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        for a, b in zip(all_three, second(x[2:])):
            torch.testing.assert_close(a[2:], b, rtol=1e-4, atol=1e-5)
        other = make(ensemble_size=2, noise_seed=1)
        assert not torch.allclose(other(x)[1], all_three[1])


def test_arguments_and_defaults():
    with torch.device("meta"):
        model = timm.create_model("dift_sd21")
    assert (float(model.signal) ** 2 + model.sigma**2) == pytest.approx(1)
    assert model.ensemble_size == 8 and model.noise_seed == 0
    alphas = DDPMScheduler(**ARCHITECTURES["sd21"].schedule.config).alphas_cumprod
    assert model.signal**2 == pytest.approx(alphas[261].item())
    assert make(timestep=0).model.sigma == pytest.approx((1 - alphas[0].item()) ** 0.5)
    assert make(timestep=7).model.timestep == 7


def test_image_is_encoded_once():
    model = make(ensemble_size=4, out_indices=(10,))
    seen = {"vae": [], "unet": []}
    model.model.vae.encoder.conv_in.register_forward_hook(lambda m, a, o: seen["vae"].append(len(o)))
    model.model.unet.conv_in.register_forward_hook(lambda m, a, o: seen["unet"].append(len(o)))
    model(images(2))
    assert seen == {"vae": [2], "unet": [8]}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(timestep=1000), "timestep must be an integer in 0..999, got 1000"),
        (dict(timestep=-1), "timestep"),
        (dict(timestep=2.5), "timestep must be an integer"),
        (dict(ensemble_size=0), "ensemble_size must be an integer in 1.*got 0"),
        (dict(noise_seed=-3), "noise_seed"),
        (dict(noise_seed=2**64), "noise_seed"),
        (dict(timestep=float("nan")), "timestep"),
        (dict(ensemble_size=True), "ensemble_size"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_gradient_prompts_and_export():
    model = make(ensemble_size=2, out_indices=(7,))
    x = images().requires_grad_()
    model(x)[0].square().sum().backward()
    assert x.grad.abs().sum() > 0
    model.model.set_prompt(torch.randn(2, 3, 6))
    both = model(x)[0]
    model.model.set_prompt(model.model.prompt_embeds[1:])
    torch.testing.assert_close(model(x)[0][1], both[1], rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach())[0], model(x.detach())[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.detach())[0], model(x.detach())[0])


def test_loading_keeps_timestep_and_noise_level_together():
    model, other = make(timestep=100), make(timestep=400, seed=1)
    model.load_state_dict(other.state_dict())
    assert model.model.timestep == 100 and model.model.signal != other.model.signal
    x = images()
    torch.testing.assert_close(model(x)[0], make(timestep=100, seed=1)(x)[0])


def test_other_noise_equals_another_model():
    """A built model takes another timestep, ensemble and seed: its maps are those of a model built so."""
    torch.manual_seed(0)
    first = timm.create_model("dift_tiny", pretrained=True, features_only=True, out_indices=(7,)).eval()
    again = timm.create_model(
        "dift_tiny", pretrained=True, features_only=True, out_indices=(7,), timestep=100, ensemble_size=2, noise_seed=3
    ).eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    first.model.set_noise(100, 2, 3)
    with torch.inference_mode():
        assert torch.equal(first(x)[0], again(x)[0])
    first.model.set_noise(ensemble_size=4)
    assert (first.model.timestep.item(), first.model.ensemble_size, first.model.noise_seed) == (100, 4, 3)
    for wrong in (dict(timestep=1000), dict(timestep=1.5), dict(ensemble_size=0), dict(noise_seed=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            first.model.set_noise(**wrong)
    assert (first.model.timestep.item(), first.model.ensemble_size, first.model.noise_seed) == (100, 4, 3)
