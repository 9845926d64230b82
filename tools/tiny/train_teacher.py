#!/usr/bin/env python
"""Trains the small teacher: a Stable Diffusion of emoji and photographs, over the VAE of tools/tiny/train_vae.py.

Writes a diffusers folder (OUT/model_index.json, unet, vae, text_encoder, tokenizer, scheduler; EMA weights) that
StableDiffusionPipeline.from_pretrained loads, OUT/samples.png and OUT/log.jsonl. The UNet has the topology of SD 2.1:
four levels, two resnets a level down and three up, here with attention on the third level and in the middle only;
v-prediction on SD's noise schedule.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from diffusers.models.attention_processor import AttnProcessor
    from PIL import Image, ImageDraw
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    from cleandift_backbones.features.extractor import resolve_device
    from cleandift_backbones.utils.atomic import replacing, save_png
    from cleandift_backbones.utils.errors import InputError, MissingFileError, file_errors, resource_errors
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.seeding import step_generator

    sys.path.insert(0, str(Path(__file__).parents[2]))  # for those who run this file by its path

    from tools.tiny.arguments import add_picture_arguments, add_run_arguments, picture_sets, whole_numbers
    from tools.tiny.captions import LENGTH, STYLE_NAMES, Captions, build_tokenizer, caption
    from tools.tiny.emoji_folder import contact_sheet
    from tools.tiny.starting import start_from, start_text
    from tools.tiny.training import CHECKPOINT, Loop, start

CONTEXT = 96  # width of the prompt's embedding
COLUMNS = 5  # samples of a photograph's caption on the sheet
LIMIT = 15_900_000  # parameters that a feature file of at most 32 MB can hold in fp16
HELDOUT, TIMESTEPS = 256, (20, 100, 250, 500, 800)  # pictures of a kind, and noise levels, of the held-out loss


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_arguments(parser)
    add_run_arguments(parser, batch_size=32, lr=6e-4)
    add = parser.add_argument
    add("--start", help="checkpoint or folder whose UNet to start from, e.g. an earlier dift_tiny.safetensors")
    add("--start-text", help="folder with text_encoder and tokenizer to start from, e.g. an earlier teacher")
    add("--vae", required=True, help="the VAE's folder, made by tools/tiny/train_vae.py (its OUT/vae)")
    add(
        "--widths",
        default="48,80,112,112",
        help="channels of the four levels, multiples of 16 (default: 48,80,112,112)",
    )
    add(
        "--drop-caption",
        type=float,
        default=0.15,
        help="part of the captions that is replaced by the empty prompt; features are mostly taken with the empty "
        "prompt, and much of it lets the UNet find in the image what the caption would tell (default: 0.15)",
    )
    add("--export", action="store_true", help="train no further: write the folder from OUT's checkpoint as it stands")
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="replay the UNet's training pass as CUDA graphs: faster on a GPU",
    )
    add(
        "--min-snr",
        type=float,
        default=5.0,
        help="gamma of the min-SNR weights; 0 weighs all levels alike (default: 5)",
    )
    add("--guidance", type=float, default=4.0, help="guidance scale of the sample sheet (default: 4)")
    add("--sample-rows", type=int, default=12, help="texts on the sample sheet, a row each (default: 12)")
    options = parser.parse_args(arguments)
    if options.max_steps is None and options.max_minutes is None:
        options.max_minutes = 14.0 if resolve_device(options.device).type == "cuda" else 480.0
    return options


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        intermediate_size=4 * CONTEXT,
        projection_dim=CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(widths: list[int], size: int) -> UNet2DConditionModel:
    """SD 2.1's topology: attention on the third level and in the middle, linear projections, heads of 16 channels."""
    if len(widths) != 4 or any(width % 16 for width in widths):
        raise InputError(f"--widths {widths}: give four multiples of 16, such as 48,80,112,112")
    if size % 8:
        raise InputError(
            f"latents of {size} x {size}: the side must be a multiple of 8; resize the pictures with --size"
        )
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=[width // 16 for width in widths],  # diffusers reads this as the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=CONTEXT,
    )


def feature_parameters(vae: AutoencoderKL, unet: UNet2DConditionModel) -> int:
    """Parameters that a feature extractor down to the finest map keeps: the encoder, and the UNet up to that map."""
    unused = [unet.conv_norm_out, unet.conv_out, *unet.up_blocks[-1].resnets[1:]]
    kept, dropped = (
        sum(parameter.numel() for module in modules for parameter in module.parameters())
        for modules in ((vae.encoder, vae.quant_conv, unet), unused)
    )
    return kept - dropped


def build_scheduler() -> DDIMScheduler:
    """SD 2.1's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        rescale_betas_zero_snr=False,
    )


def diffusion_terms(
    unet: nn.Module, alphas: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Weighted and plain mean squared error of the predicted velocity, per picture (both B, fp32).

    `alphas`: the schedule's cumulative products. The velocity is sqrt(a) * noise - sqrt(1 - a) * latents (Salimans and
    Ho 2022); min-SNR (Hang et al. 2023) weighs it by min(SNR, gamma) / (SNR + 1), and gamma 0 by 1.
    """
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    predicted = unet(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]
    error = (predicted.float() - velocity).square().mean((1, 2, 3))
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    weights = snr.clamp(max=gamma) / (snr + 1) if gamma else torch.ones_like(snr)
    return error * weights, error


def graphed(unet: UNet2DConditionModel, batch: int, side: int, device: torch.device) -> nn.Module:
    """The UNet's training pass as CUDA graphs for one batch size: without the time that launching its kernels takes."""

    class Pass(nn.Module):  # a module of its own, so that sampling and evaluation keep the plain UNet
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            return self.unet(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]

    noisy = torch.randn(batch, 4, side, side, device=device)
    context = torch.randn(batch, LENGTH, CONTEXT, device=device, requires_grad=True)
    # Autocast's cache of casted weights must not outlive a captured pass.
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        run = torch.cuda.make_graphed_callables(Pass(), (noisy, torch.zeros(batch, device=device).long(), context))
    return lambda noisy, timesteps, encoder_hidden_states, return_dict: (run(noisy, timesteps, encoder_hidden_states),)


def draw_samples(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, guidance: float, batch: int = 60
) -> Tensor:
    """Pictures B x 3 x H x W in [-1, 1], drawn with 25 steps of DPM-Solver++; picture i has noise seed + i."""
    device = pipeline.unet.device
    generators = [torch.Generator("cpu").manual_seed(seed + number) for number in range(len(prompts))]
    scheduler, pipeline.scheduler = (
        pipeline.scheduler,
        DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config),
    )
    pictures = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        drawn = pipeline(
            prompts[part], num_inference_steps=25, guidance_scale=guidance, generator=generators[part], output_type="pt"
        )
        pictures.append(drawn.images.float().to(device) * 2 - 1)
    pipeline.scheduler = scheduler
    return torch.cat(pictures)


def choose_rows(train: list[dict], heldout: list[dict], styles: list[str], count: int) -> list[tuple[str, list[str]]]:
    """(label, prompts) of the sheet's rows, always the same: training texts, held-out ones, the empty prompt.

    A row of an emoji is its concept in all styles, one of photographs the same caption COLUMNS times.
    """
    kinds = {bool(entry["style"]) for entry in train}
    each, rows = max(1, count // (2 * len(kinds))), []
    for name, entries in (("train", train), ("held out", heldout)):
        for drawn in sorted(kinds, reverse=True):
            texts = {entry["text"] for entry in entries if bool(entry["style"]) == drawn}
            texts = sorted(texts, key=lambda text: (len(text.split()) > 3, text)) if drawn else sorted(texts)
            for text in sorted(random.Random(0).sample(texts, min(each, len(texts)))):
                prompts = [caption(text, style) for style in styles] if drawn else [text] * COLUMNS
                rows.append((f"{name}: {text}" + f" ({', '.join(styles)})" * drawn, prompts))
    return [*rows, ("empty prompt", [""] * COLUMNS)]


def sample_sheet(
    pipeline: StableDiffusionPipeline, rows: list[tuple[str, list[str]]], seed: int, guidance: float
) -> Image.Image:
    """A labelled sheet of `choose_rows`."""
    columns = max(len(prompts) for _, prompts in rows)
    drawn = draw_samples(pipeline, [prompt for _, prompts in rows for prompt in prompts], seed, guidance)
    blank = torch.ones_like(drawn[:1])
    parts = drawn.split([len(prompts) for _, prompts in rows])
    sheet = contact_sheet(
        torch.cat([torch.cat([part, *[blank] * (columns - len(part))]) for part in parts]), columns, 14
    )
    height = (sheet.height - 14) // len(rows)
    for number, (label, _) in enumerate(rows):
        ImageDraw.Draw(sheet).text((14, number * height + 1), label[:100], fill=0)
    return sheet


def export(pipeline: StableDiffusionPipeline, dtype: torch.dtype, out: Path) -> None:
    """Writes the pipeline's folder aside and moves its parts to `out`, the index last."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    for name, part in parts.items():
        # The text encoder is small and stays in fp32: transformers loads it as it is, diffusers in fp32 unless told.
        part.to("cpu", memory_format=torch.contiguous_format).to(torch.float32 if name == "text_encoder" else dtype)
    with tempfile.TemporaryDirectory(prefix=".model.", dir=out) as temporary:
        folder = Path(temporary)
        build_pipeline(**parts, tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler).save_pretrained(folder)
        # transformers 5 renamed the class but reads the old name, which is the only one that older versions know.
        for path, old in (
            (folder / "model_index.json", "tokenizer"),
            (folder / "tokenizer/tokenizer_config.json", "tokenizer_class"),
        ):
            table = json.loads(path.read_text())
            new = "PreTrainedTokenizerFast"
            table[old] = ["transformers", new] if old == "tokenizer" else new
            path.write_text(json.dumps(table, indent=2) + "\n")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "model_index.json"):
            with replacing(out / path.name) as aside:
                os.replace(path, aside)


def build_pipeline(**parts: object) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@guard("the last checkpoint in --out is kept; the same command continues from it")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with hold(options.out):
        return train(options)


def train(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if options.export and not (out / CHECKPOINT).is_file():
        raise MissingFileError(f"--export: {out} holds no checkpoint to write the folder from; train first")
    accelerator = start(options)
    device = accelerator.device
    if options.cuda_graph and device.type != "cuda":
        raise InputError(f"--cuda-graph needs a GPU, and the device is {device}: leave it out")
    if not (Path(options.vae) / "config.json").is_file():
        raise MissingFileError(
            f"{options.vae} is no VAE folder (no config.json): run tools/tiny/train_vae.py and pass its OUT/vae"
        )
    torch.backends.cudnn.benchmark = True
    with file_errors(options.vae):
        vae = AutoencoderKL.from_pretrained(options.vae, torch_dtype=torch.float32).requires_grad_(False).eval()
    vae = vae.to(device, memory_format=torch.channels_last)
    pictures = picture_sets(options).to(device)
    entries, heldout_entries, latent_side = pictures.entries, pictures.heldout_entries, pictures.size // 4

    tokenizer = build_tokenizer([caption(entry["text"], entry["style"]) for entry in entries])
    captions = Captions(tokenizer, entries, device)
    text_encoder = build_text_encoder(tokenizer)
    if options.start_text:
        start_text(text_encoder, tokenizer, options.start_text)
    unet = build_unet(whole_numbers(options.widths, "--widths"), latent_side)
    if options.start:
        start_from(unet, "unet", options.start)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a step is 15 % faster without PyTorch's fused attention
    text_encoder, unet = text_encoder.to(device), unet.to(device, memory_format=torch.channels_last)
    scheduler = build_scheduler()
    pipeline = build_pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
    kept = feature_parameters(vae, unet)
    print(
        f"{len(pictures)} pictures on {device}; {len(tokenizer)} words; {kept:,} of {LIMIT:,} feature parameters",
        flush=True,
    )
    if kept > LIMIT:
        raise InputError(f"{kept:,} feature parameters are more than {LIMIT:,} (32 MB in fp16): use narrower --widths")

    maybe = torch.compile if options.compile else lambda function: function
    forward, pictures.render, encoder = maybe(unet), maybe(pictures.render), maybe(vae.encoder)
    if options.cuda_graph:
        forward = graphed(unet, options.batch_size, latent_side, device)
    alphas = scheduler.alphas_cumprod.to(device)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        moments = vae.quant_conv(encoder(pictures))
        return moments.float().chunk(2, 1)[0] * vae.config.scaling_factor

    heldout, heldout_captions = {}, Captions(tokenizer, heldout_entries, device)
    for kind, (images, index) in pictures.heldout(HELDOUT, options.seed).items():
        with torch.no_grad():
            latents = torch.cat([encode(batch) for batch in images.split(options.batch_size)])
        noise = torch.randn(latents.shape, device=device, generator=step_generator(device, options.seed, 1, 3))
        heldout[kind] = latents, noise, heldout_captions.sample(index.to(device), None, 0, 0, 0, 0)

    names = ("seed", "batch_size", "lr", "warmup", "widths", "min_snr", "ema", "photo_share", "start", "drop_caption")
    settings = {k: getattr(options, k) for k in names} | {"pictures": len(pictures), "size": pictures.size}
    modules = {"unet": unet, "text_encoder": text_encoder}
    loop = Loop(options, accelerator, modules, settings, weight_decay=0.01)

    @torch.no_grad()
    def evaluate() -> None:
        losses = {}
        with loop.ema.applied(), accelerator.autocast():
            for kind, (latents, noise, ids) in heldout.items():
                context = torch.cat([text_encoder(part)[0] for part in ids.split(options.batch_size)])
                for timestep in TIMESTEPS:
                    parts = zip(*(x.split(options.batch_size) for x in (latents, noise, context)), strict=True)
                    errors = [
                        diffusion_terms(unet, alphas, z, e, torch.full((len(z),), timestep, device=device), c, 0)[1]
                        for z, e, c in parts
                    ]
                    losses[f"{kind}_t{timestep}"] = float(torch.cat(errors).mean())
        losses["heldout"] = sum(losses.values()) / len(losses)
        loop.log(**losses)
        print(f"step {loop.step}: { ({k: round(v, 4) for k, v in losses.items()}) }", flush=True)

    names = list(STYLE_NAMES)
    styles = sorted({e["style"] for e in entries if e["style"]}, key=lambda s: names.index(s) if s in names else 99)
    rows = choose_rows(entries, heldout_entries, styles, options.sample_rows)

    def sample() -> None:
        text_encoder.eval()
        with loop.ema.applied():
            sheet = sample_sheet(pipeline, rows, options.seed, options.guidance)
        save_png(sheet, out / "samples.png")
        text_encoder.train()

    def loss_of(step: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        generator = step_generator(device, options.seed, step)
        with torch.no_grad(), accelerator.autocast():
            images, index = pictures.batch(step, options.batch_size, options.seed, generator)
            latents = encode(images)
        noise = torch.randn(latents.shape, device=device, generator=generator)
        timesteps = torch.randint(1000, (len(index),), device=device, generator=generator)
        with accelerator.autocast():
            context = text_encoder(captions.sample(index, generator, whole=options.drop_caption))[0]
            weighted, plain = diffusion_terms(forward, alphas, latents, noise, timesteps, context, options.min_snr)
        return weighted.mean(), len(index), {"mse": plain.mean()}

    reports = [(options.eval_steps, evaluate), (options.sample_steps, sample)]
    with resource_errors("lower --batch-size or --size"):
        finished = options.export or loop.run(loss_of, reports)
    if finished:
        evaluate()
        sample()
        with loop.ema.applied(), file_errors(out):
            export(pipeline, torch.float16 if options.save_dtype == "fp16" else torch.float32, out)
        print(f"wrote {out} after {loop.step} steps and {loop.minutes():.1f} minutes")
    return loop.exit_code


if __name__ == "__main__":
    sys.exit(main())
