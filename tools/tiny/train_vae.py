#!/usr/bin/env python
"""Trains the small VAE (128 px -> 32 x 32 x 4 latents) that the small teacher's diffusion runs on.

Writes OUT/vae (a diffusers AutoencoderKL folder: EMA weights, latents of root mean square 1 / scaling_factor, which is
that of the architecture "tiny"), OUT/reconstructions.png (held-out pictures above their reconstructions) and
OUT/log.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL
    from torch import Tensor

    from cleandift_backbones.features.extractor import resolve_device
    from cleandift_backbones.models.architectures import ARCHITECTURES
    from cleandift_backbones.utils.atomic import replacing, save_png
    from cleandift_backbones.utils.errors import InputError, resource_errors
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.seeding import batch_indices, step_generator

    sys.path.insert(0, str(Path(__file__).parents[2]))  # for those who run this file by its path

    from tools.tiny.arguments import add_picture_arguments, add_run_arguments, picture_sets, whole_numbers
    from tools.tiny.emoji_folder import contact_sheet
    from tools.tiny.starting import start_from
    from tools.tiny.training import Loop, start

SCALING_FACTOR = ARCHITECTURES["tiny"].vae["scaling_factor"]
HELDOUT = 128  # pictures of a kind that the held-out figures are taken on
PREVIEW = 16  # pictures of a kind on the sheet


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_arguments(parser)
    add_run_arguments(parser, batch_size=32, lr=1e-3)
    add = parser.add_argument
    add("--start", help="checkpoint or folder whose VAE weights to start from, e.g. an earlier dift_tiny.safetensors")
    add("--widths", default="24,48,96", help="channels at strides 1, 2 and 4, each a multiple of 8 (default: 24,48,96)")
    add("--kl", type=float, default=3e-4, help="weight of the KL term, a mean over latent numbers (default: 3e-4)")
    add("--crop", type=int, default=64, help="train on random squares of this side; 0: whole pictures (default: 64)")
    add("--gradient", type=float, default=1.0, help="weight of the finite-difference term (default: 1)")
    options = parser.parse_args(arguments)
    if options.max_steps is None and options.max_minutes is None:
        options.max_minutes = 3.0 if resolve_device(options.device).type == "cuda" else 90.0
    return options


def build_vae(widths: list[int], size: int) -> AutoencoderKL:
    """An AutoencoderKL of stride 4 with 4 latent channels and no attention, so that it takes any size cheaply."""
    if len(widths) != 3 or any(width % 8 for width in widths):
        raise InputError(f"--widths {widths}: give three multiples of 8, such as 24,48,96")
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=size,
    )


def gradient_loss(difference: Tensor) -> Tensor:
    """Mean absolute finite differences of the error B x 3 x H x W at full and at half scale: it punishes lost edges."""
    total = difference.new_zeros(())
    for scaled in (difference, F.avg_pool2d(difference, 2)):
        total = total + scaled.diff(dim=-1).abs().mean() + scaled.diff(dim=-2).abs().mean()
    return total / 4


def vae_terms(vae: AutoencoderKL, pictures: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Reconstruction and KL terms of one batch, in fp32. `noise`: B x 4 x h x w standard normal numbers."""
    mean, logvar = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    latents = mean + noise * (0.5 * logvar).exp()
    difference = vae.decoder(vae.post_quant_conv(latents)).float() - pictures
    return {
        "l1": difference.abs().mean(),
        "gradient": gradient_loss(difference),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }


@torch.no_grad()
def evaluate(vae: AutoencoderKL, pictures: Tensor) -> tuple[dict[str, float | list], Tensor]:
    """Held-out figures with the posterior's mean, and the reconstructions of `pictures` in [-1, 1]."""
    moments, rebuilt = [], []
    for batch in pictures.split(32):
        posterior = vae.encode(batch).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std]).float().cpu())
        rebuilt.append(vae.decode(posterior.mean).sample.float())
    mean, std = torch.cat(moments, 1)
    rebuilt = torch.cat(rebuilt).clamp(-1, 1)
    error = (rebuilt - pictures) / 2
    figures = {
        "heldout_l1": float(error.abs().mean()),
        "heldout_psnr": float(-10 * error.square().mean((1, 2, 3)).log10().mean()),
        "latent_rms": float((mean.square() + std.square()).mean().sqrt()),
        "latent_mean": [round(v, 3) for v in mean.mean((0, 2, 3)).tolist()],
        "channel_std": [round(v, 3) for v in mean.std((0, 2, 3)).tolist()],
        "posterior_std": float(std.mean()),
    }
    return figures, rebuilt


@torch.no_grad()
def rescale(vae: AutoencoderKL, factor: float) -> None:
    """Multiplies a VAE's latents by `factor` in front of its decoder, which draws the same: so all have one scale."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * math.log(factor)  # the logarithm of the variance
    vae.post_quant_conv.weight /= factor


def export(vae: AutoencoderKL, latent_rms: float, dtype: torch.dtype, folder: Path) -> None:
    """Writes `vae` as a diffusers folder, aside first; its latents get the scale that the architecture has."""
    vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
    rescale(vae, 1 / (latent_rms * SCALING_FACTOR))
    vae = vae.to(dtype)
    vae.register_to_config(scaling_factor=SCALING_FACTOR)
    with replacing(folder) as aside:
        vae.save_pretrained(aside)


@guard("the last checkpoint in --out is kept; the same command continues from it")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with hold(options.out):
        return train(options)


def train(options: argparse.Namespace) -> int:
    accelerator, out = start(options), Path(options.out)
    device = accelerator.device
    pictures = picture_sets(options).to(device)
    side = pictures.size
    if side % 4 or options.crop % 4 or not 0 <= options.crop <= side:
        raise InputError(
            f"--crop {options.crop} of pictures of {side} pixels: both must be multiples of 4, the crop no larger"
        )
    heldout = {kind: shown for kind, (shown, _) in pictures.heldout(HELDOUT, options.seed).items()}

    vae = build_vae(whole_numbers(options.widths, "--widths"), side)
    if options.start:
        start_from(vae, "vae", options.start)
    vae = vae.to(device, memory_format=torch.channels_last)
    count = sum(p.numel() for p in vae.encoder.parameters())
    print(f"{len(pictures)} pictures on {device}; the encoder has {count:,} parameters", flush=True)
    terms = torch.compile(vae_terms) if options.compile else vae_terms
    if options.compile:
        pictures.render = torch.compile(pictures.render)
    names = ("seed", "batch_size", "lr", "warmup", "widths", "kl", "gradient", "crop", "ema", "photo_share", "start")
    settings = {k: getattr(options, k) for k in names} | {"pictures": len(pictures), "size": side}
    loop = Loop(options, accelerator, {"vae": vae}, settings, weight_decay=1e-4)

    def report() -> float:
        found, rows, power = {}, [], 0.0
        for kind, shown in heldout.items():
            with loop.ema.applied():
                figures, rebuilt = evaluate(vae, shown)
            power += pictures.shares[kind] * figures["latent_rms"] ** 2
            found |= {f"{kind}_{name}": value for name, value in figures.items()}
            for first in range(0, min(PREVIEW, len(shown)), 8):
                rows += [shown[first : first + 8], rebuilt[first : first + 8]]
        loop.log(latent_rms=power**0.5, **found)
        save_png(contact_sheet(torch.cat(rows), min(8, len(rows[0]))), out / "reconstructions.png")
        print(f"step {loop.step}: {found}", flush=True)
        return power**0.5

    def loss_of(step: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        generator = step_generator(device, options.seed, step)
        images, _ = pictures.batch(step, options.batch_size, options.seed, generator)
        if options.crop:  # one place for the whole batch: the placement within the picture varies anyway
            top, left = batch_indices(step, 2, side - options.crop + 1, options.seed).tolist()
            images = images[..., top : top + options.crop, left : left + options.crop]
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(
            len(images), 4, *(length // 4 for length in images.shape[2:]), device=device, generator=generator
        )
        with accelerator.autocast():
            parts = terms(vae, images, noise)
        loss = parts["l1"] + options.gradient * parts["gradient"] + options.kl * parts["kl"]
        return loss, len(images), parts

    with resource_errors("lower --batch-size or --size"):
        finished = loop.run(loss_of, [(options.eval_steps, report)])
    if finished:
        dtype = torch.float16 if options.save_dtype == "fp16" else torch.float32
        with loop.ema.applied():
            export(vae, report(), dtype, out / "vae")
        print(f"wrote {out / 'vae'} after {loop.step} steps and {loop.minutes():.1f} minutes")
    return loop.exit_code


if __name__ == "__main__":
    sys.exit(main())
