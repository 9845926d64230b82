"""The ways in which `benchmark.py inference` computes one map: what one writes without this package, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from cleandift_backbones import optimize
from cleandift_backbones.models.architectures import spec_of
from cleandift_backbones.models.dift import DIFT, seeded_noise
from cleandift_backbones.models.latents import build_latent_encoder
from cleandift_backbones.optimization.optimize import slow_16bit
from cleandift_backbones.utils.errors import InputError
from cleandift_backbones.utils.progress import tqdm


def with_new_parameters(module: nn.Module) -> nn.Module:
    """A copy whose weights lie in the same memory until they are converted: several ways fit where one would."""
    known = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo=known).eval()


class Weights:
    """A model's architecture with random weights of unit gain, drawn once for all ways.

    Args:
        model: timm name. name: of the map. device: where it runs.
    """

    def __init__(self, model: str, name: str, device: torch.device):
        self.arch, self.entrypoint, self.name, self.device = spec_of(model).arch, model, name, device
        infos = self.arch.denoiser.maps()
        if name not in [info.name for info in infos]:
            raise InputError(f"--map {name}: there are {', '.join(info.name for info in infos)}")
        self.module = next(info.module for info in infos if info.name == name)
        self.index = len(infos) - 1 - [info.name for info in infos].index(name)
        with torch.device("meta"):
            self.unet = UNet2DConditionModel(**self.arch.denoiser.config).eval()
            vae = dict(layers_per_block=2) | self.arch.vae
            levels = len(vae["block_out_channels"])
            self.vae = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **vae
            ).eval()
            self.model = timm.create_model(model, features_only=True, out_indices=(self.index,)).eval()
        self.vae.decoder = self.vae.post_quant_conv = None
        generator = torch.Generator().manual_seed(0)
        for module in (self.unet, self.vae):
            module.to_empty(device=device).requires_grad_(False)
            for key, p in tqdm(list(module.named_parameters()), desc="weights", leave=False):
                noise = torch.randn(min(p.numel(), 1 << 18), generator=generator)  # repeated: quick, and of equal cost
                noise = noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view(p.shape)
                gain = p[0].numel() ** -0.5 if p.ndim > 1 else 0.02
                p.copy_(noise * gain + (p.ndim == 1 and key.endswith("weight")))
        state = {f"unet.{n}": p for n, p in self.unet.state_dict().items()}
        state |= {f"vae.{n}": p for n, p in self.vae.state_dict().items()}
        length, width = self.arch.conditions.length, self.arch.conditions.width
        self.prompt = torch.randn(1, length, width, generator=generator).to(device)
        state |= dict(timestep=torch.tensor(261.0, device=device), prompt_embeds=self.prompt)
        backbone = self.model.model
        backbone.load_state_dict({key: state[key] for key in backbone.state_dict()}, assign=True)
        backbone.head.to(device)


# --- what one would write without this package ------------------------------------------------------------------


def whole(weights: Weights, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The whole UNet, the map read by a hook."""
    unet, found = with_new_parameters(weights.unet), {}  # with a hook of its own

    def hook(_module, _arguments, output):
        found["map"] = output if torch.is_tensor(output) else output[0]

    unet.get_submodule(weights.module).register_forward_hook(hook)
    unet_call = torch.compile(unet.forward) if compiled else unet
    scaling = weights.arch.vae.get("scaling_factor", 0.18215)

    def run(x: Tensor) -> Tensor:
        latents = weights.vae.encode(x).latent_dist.mean * scaling
        text = weights.prompt.expand(len(x), -1, -1)
        unet_call(latents, torch.full((len(x),), 261, device=x.device), text, return_dict=False)
        return found.pop("map")

    run.weights = (unet, weights.vae)
    return run


def dift(weights: Weights, noises: int = 8) -> Callable[[Tensor], Tensor]:
    """DIFT's own way: each noise has its own copy of the image, encoded anew; the UNet ends after the map's block."""

    class Stop(Exception):
        pass

    settings = DIFT(replace(spec_of("test_cleandift").arch, schedule=weights.arch.schedule))
    scaling = weights.arch.vae.get("scaling_factor", 0.18215)
    block = weights.module if weights.name == "mid" else ".".join(weights.module.split(".")[:2])
    found = {}

    def keep(_module, _arguments, output):
        found["map"] = output if torch.is_tensor(output) else output[0]

    def stop(_module, _arguments, _output):
        raise Stop

    def run(x: Tensor) -> Tensor:
        images = x.repeat_interleave(noises, dim=0)
        latents = weights.vae.encode(images).latent_dist.mean * scaling
        noise = seeded_noise(latents, noises, 0).repeat(len(x), 1, 1, 1)
        latents = settings.signal * latents + settings.sigma * noise
        unet = weights.unet
        handles = [unet.get_submodule(weights.module).register_forward_hook(keep)]
        handles.append(unet.get_submodule(block).register_forward_hook(stop))
        with suppress(Stop):
            unet(latents, 261, weights.prompt.expand(len(latents), -1, -1))
        for handle in handles:
            handle.remove()
        return found.pop("map").unflatten(0, (len(x), noises)).mean(dim=1)

    run.weights = (weights.unet, weights.vae)
    return run


# --- this package -------------------------------------------------------------------------------------------------


def light_model(weights: Weights) -> nn.Module:
    """The model with a light latent encoder, of random weights as timm.create_model draws them."""
    model = timm.create_model(
        weights.entrypoint, features_only=True, out_indices=(weights.index,), latent_encoder="tiny", device="meta"
    ).eval()
    given = {n: t for n, t in weights.model.model.state_dict().items() if not n.startswith("vae.")}
    model.model.load_state_dict(given, strict=False, assign=True)
    torch.manual_seed(0)
    model.model.vae = build_latent_encoder(weights.arch.vae_tiny).to(weights.device).requires_grad_(False)
    model.model.head.to(weights.device)
    return model.eval()


def ours(weights: Weights, light: bool = False, **options) -> Callable[[Tensor], Tensor]:
    """Ours after `optimize(**options)`; without options as timm.create_model gives it."""
    model = with_new_parameters(light_model(weights) if light else weights.model)
    if options:
        optimize(model, **options)

    def run(x: Tensor) -> Tensor:
        return model(x)[0]

    run.weights = (model,)
    return run


class Way(NamedTuple):
    """What builds it from `Weights`; the dtype that it multiplies in; whether its map is the plain model's."""

    build: Callable[[Weights], Callable[[Tensor], Tensor]]
    dtype: torch.dtype = torch.float32
    same_map: bool = True
    compiled: bool = False


WAYS = {
    "whole": Way(whole),
    "whole-compile": Way(partial(whole, compiled=True), compiled=True),
    "dift": Way(dift, same_map=False),
    "timm": Way(ours),
    "optimized": Way(partial(ours, fold=True)),
    "direct": Way(partial(ours, winograd=False)),
    "bf16": Way(partial(ours, dtype=torch.bfloat16), torch.bfloat16),
    "fp16": Way(partial(ours, dtype=torch.float16), torch.float16),
    "light": Way(partial(ours, light=True, fold=True), same_map=False),  # a random encoder has maps of its own
    "light-bf16": Way(partial(ours, light=True, dtype=torch.bfloat16), torch.bfloat16, same_map=False),
    "compile": Way(partial(ours, compile=True), compiled=True),
    "compile-bf16": Way(partial(ours, compile=True, dtype=torch.bfloat16), torch.bfloat16, compiled=True),
    "graphs-bf16": Way(partial(ours, compile="reduce-overhead", dtype=torch.bfloat16), torch.bfloat16, compiled=True),
}


def default_ways(device: torch.device) -> list[str]:
    """All on a GPU; on a CPU those without compile, and 16 bit only where the CPU has instructions for it."""
    if device.type == "cuda":
        return list(WAYS)
    return [name for name, way in WAYS.items() if not way.compiled and not slow_16bit(way.dtype, device)]
