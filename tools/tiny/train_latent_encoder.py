#!/usr/bin/env python
"""Trains a light encoder (diffusers' AutoencoderTiny form) to give the latents of a model's VAE.

    python tools/tiny/train_latent_encoder.py --data emoji/train --heldout emoji/heldout --out runs/light
    python tools/tiny/train_latent_encoder.py --model cleandift_sd21 --start madebyollin/taesd --data web \\
        --out runs/taesd --size 512 --lr 1e-4

Writes OUT/encoder (weights and config under diffusers' names; EMA), which `sources=dict(vae="OUT/encoder")` with
`latent_encoder="tiny"` loads, and OUT/log.jsonl. Errors are in the UNet's scale, where latents have variance 1;
"explained" is the part of the variance of held-out latents that is not error. Ctrl-C saves; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing, started

with importing(__name__):
    import timm
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from cleandift_backbones.checkpoints import DIFFUSERS_NAME
    from cleandift_backbones.checkpoints.save import write_file
    from cleandift_backbones.data.batches import DecodeOptions, FolderBatches, decode_batch
    from cleandift_backbones.data.sources import list_training_sources
    from cleandift_backbones.models.architectures import spec_of
    from cleandift_backbones.models.latent_encoders import load_latent_encoder
    from cleandift_backbones.models.latents import TinyLatentEncoder
    from cleandift_backbones.utils.atomic import replacing
    from cleandift_backbones.utils.errors import InputError, missing_weights, resource_errors
    from cleandift_backbones.utils.locks import hold

    sys.path.insert(0, str(Path(__file__).parents[2]))  # for those who run this file by its path

    from tools.tiny.arguments import add_run_arguments
    from tools.tiny.training import Loop, start

HELDOUT = 128  # pictures that the held-out figures are taken on
BATCHES = 10**9  # of a run that ends by the clock


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, batch_size=8, lr=2e-3)
    add = parser.add_argument
    add("--data", required=True, help="folder of pictures, at any depth")
    add("--heldout", help="folder of pictures for the held-out figures (default: every 20th of --data)")
    add("--model", default="cleandift_tiny", help="whose VAE is imitated (default: cleandift_tiny)")
    add("--vae", help="source of that VAE: path or OWNER/NAME[/PATH] on the Hub (default: where it is published)")
    add("--start", help="source of a light encoder to start from, e.g. madebyollin/taesd (default: random weights)")
    add("--crop", choices=("center", "random"), default="random", help="what is cut out of a picture (default: random)")
    add(
        "--background",
        choices=("white", "random"),
        default="white",
        help="behind transparent pictures (default: white)",
    )
    add(
        "--num-workers",
        type=int,
        choices=range(65),
        metavar="N",
        default=2,
        help="processes that read pictures (default: 2)",
    )
    options = parser.parse_args(arguments)
    if options.max_steps is None and options.max_minutes is None:
        options.max_minutes = 30.0
    return options


@torch.no_grad()
def evaluate(light: nn.Module, heldout: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    """Held-out error of the light latents, images and their true latents on the CPU."""
    device = next(light.parameters()).device
    guess = torch.cat([light(x.to(device))[0].float().cpu() for x in heldout.split(batch_size)])
    error = (guess - targets).square().mean()
    return {
        "heldout_mse": float(error),
        "heldout_explained": float(1 - error / targets.var()),
        "heldout_cosine": float(F.cosine_similarity(guess, targets, dim=1).mean()),
    }


def export(light: TinyLatentEncoder, config: dict, dtype: torch.dtype, folder: Path, metadata: dict[str, str]) -> None:
    """Writes weights and config under diffusers' names, aside first. (AutoencoderTiny itself wants a decoder, too.)"""
    state = {
        name: tensor.to(dtype, memory_format=torch.contiguous_format) for name, tensor in light.state_dict().items()
    }
    with replacing(folder) as aside:
        aside.mkdir()
        write_file(state, aside / DIFFUSERS_NAME, metadata)
        (aside / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", **config}, indent=2) + "\n")


@guard("the last checkpoint in --out is kept; the same command continues from it")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with hold(options.out):
        return train(options)


def train(options: argparse.Namespace) -> int:
    accelerator, out = start(options), Path(options.out)
    device = accelerator.device
    config = spec_of(options.model).arch.encoder_config("tiny")
    with missing_weights("Give --vae FOLDER, a VAE in diffusers' form"):
        vae = load_latent_encoder(options.model, source=options.vae)
    with missing_weights("Give --start FOLDER, an AutoencoderTiny in diffusers' form, or leave it out"):
        light = (
            load_latent_encoder(options.model, "tiny", options.start) if options.start else TinyLatentEncoder(config)
        )
    size = options.size or timm.get_pretrained_cfg(options.model).input_size[-1]
    if size % vae.stride:
        raise InputError(f"--size {size} is no multiple of the latents' stride {vae.stride}")
    vae = vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    light = light.to(device, memory_format=torch.channels_last)

    pictures = list_training_sources(options.data, without=out)
    held = list_training_sources(options.heldout) if options.heldout else pictures[::20]
    if not options.heldout:
        pictures = [picture for i, picture in enumerate(pictures) if i % 20] or pictures
    held = held[:: max(1, len(held) // HELDOUT)][:HELDOUT]
    decoding = DecodeOptions(size, options.crop, background=options.background)
    heldout = decode_batch(held, decoding, options.seed, 13, 0).images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return vae(images)[0].float()

    targets = torch.cat([encode(x.to(device)).cpu() for x in heldout.split(options.batch_size)])
    count = sum(p.numel() for p in light.parameters())
    print(f"{len(pictures)} pictures on {device}; the light encoder has {count:,} parameters", flush=True)
    forward = torch.compile(light) if options.compile else light
    agreed = ("seed", "batch_size", "lr", "warmup", "model", "crop", "background", "ema")
    settings = {k: getattr(options, k) for k in agreed} | {"pictures": len(pictures), "size": size}
    loop = Loop(options, accelerator, {"light": light}, settings, weight_decay=1e-4)
    batches = FolderBatches(
        pictures, decoding, options.seed, options.batch_size, options.max_steps or BATCHES, loop.step
    )
    loader = started(DataLoader(batches, batch_size=None, num_workers=options.num_workers))

    def report() -> dict[str, float]:
        with loop.ema.applied():
            figures = evaluate(light, heldout, targets, options.batch_size)
        loop.log(**figures)
        print(f"step {loop.step}: {figures}", flush=True)
        return figures

    def loss_of(step: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        images = next(loader).images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            guess, _ = forward(images)
        return F.mse_loss(guess.float(), encode(images)), len(images), {}

    with resource_errors("lower --batch-size, --size or --num-workers"):
        finished = loop.run(loss_of, [(options.eval_steps, report)])
    if finished:
        figures = report()
        metadata = {"model": options.model, "explained": f"{figures['heldout_explained']:.4f}"}
        with loop.ema.applied():
            dtype = torch.float16 if options.save_dtype == "fp16" else torch.float32
            export(light, config, dtype, out / "encoder", metadata)
        print(f"wrote {out / 'encoder'} after {loop.step} steps and {loop.minutes():.1f} minutes")
    return loop.exit_code


if __name__ == "__main__":
    sys.exit(main())
