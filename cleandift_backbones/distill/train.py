"""The distillation's training loop: from a recipe to a native checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from .. import checkpoints
from ..images import check_folder
from ..models import ARCHITECTURES
from ..prompts import PromptEncoder
from .compose import compose_plain
from .data import Batches, is_transparent, list_pictures, load_image, read_rgba
from .heads import ProjectionHeads
from .module import Distiller, stratified_timesteps
from .recipe import Recipe, save_recipe
from .trainer import Run, autocast, mix_seed, pick_device, step_generator

VALIDATION_PICTURES = 64


class Prompts:
    """Prompt embeddings of captions, for teacher and student, by the recipe's text mode. Captions are encoded once."""

    def __init__(self, mode: str, empty: Tensor, source: str | None):
        self.mode, self.empty, self.known = mode, empty, {"": empty[0].cpu()}
        if mode != "empty" and source is None:
            raise ValueError(f"text={mode} needs a text encoder, and this model names none: use text=empty")
        self.encoder = PromptEncoder(source) if mode != "empty" else None

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(teacher's, student's) embeddings: B or 1 x L x C each."""
        if self.mode == "empty":
            return self.empty, self.empty
        new = sorted(set(captions) - self.known.keys())
        if new:
            self.known.update(zip(new, self.encoder(new)))
        embeds = torch.stack([self.known[caption] for caption in captions]).to(self.empty)
        return embeds, embeds if self.mode == "caption" else self.empty


def distill(recipe: Recipe) -> int:
    """Trains a student and writes `model.safetensors` and `recipe.yaml` to output_dir.

    Everything that can be wrong with the recipe, the data or the weights is found before anything is written.

    Returns:
        exit code: 0, or 128 + the number of the signal that stopped the run (its checkpoint is saved).
    """
    check_folder(recipe.output_dir)
    device = pick_device(recipe.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(mix_seed(recipe.seed, 0))
    overlay = dict(pretrained_cfg_overlay=dict(file=recipe.teacher_weights)) if recipe.teacher_weights else {}
    # The DIFT model is the carrier of the teacher's weights, its VAE and its empty prompt; noise is added here.
    source = timm.create_model(recipe.teacher, pretrained=True, final_map="us10", **overlay).requires_grad_(False)
    student = timm.create_model(recipe.model, final_map="us10")
    student.load_state_dict(source.state_dict())
    for model in (source, student):
        model.to(device, memory_format=torch.channels_last)
    size = recipe.data.size or student.pretrained_cfg["input_size"][-1]

    pictures = list_pictures(recipe.data.path)
    if recipe.data.heldout:
        heldout = list_pictures(recipe.data.heldout)
    else:
        heldout, pictures = pictures[::20], [p for i, p in enumerate(pictures) if i % 20] or pictures
    stride = max(1, len(heldout) // VALIDATION_PICTURES)
    heldout = heldout[::stride][:VALIDATION_PICTURES]
    prompts = Prompts(recipe.text, source.prompt_embeds, source.text_encoder)

    names = list(student.unet.map_names)
    maps = dict(recipe.maps) if recipe.maps else dict.fromkeys(names, 1.0)
    student.unet.check_maps(maps)
    channels = {info.name: info.channels for info in student.unet.infos if info.name in maps}
    heads = recipe.heads
    arch = ARCHITECTURES[recipe.teacher.removeprefix("dift_")]
    module = Distiller(
        source.unet,
        student.unet,
        DDPMScheduler(**arch["scheduler"]),
        maps,
        ProjectionHeads(channels, heads.depth, heads.conditioning, heads.gated) if heads.depth else None,
        recipe.loss,
        recipe.timestep,
    ).to(device)

    head_parameters = list(module.heads.parameters()) if module.heads else []
    groups = [dict(params=[*module.student.parameters(), module.timestep], lr=recipe.learning_rate)]
    if head_parameters:
        groups.append(dict(params=head_parameters, lr=recipe.heads_learning_rate or recipe.learning_rate))
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=device.type == "cuda")
    shown = _validation_images(heldout, size)
    out = Path(recipe.output_dir)
    trained = torch.nn.ModuleDict({"student": module.student} | ({"heads": module.heads} if module.heads else {}))
    trained.register_parameter("timestep", module.timestep)
    keep = ("model", "teacher", "maps", "loss", "timestep_levels", "timestep_range", "text", "batch_size", "seed")
    run = Run(
        out,
        {"distiller": trained},
        optimizer,
        settings={name: getattr(recipe, name) for name in keep} | {"pictures": len(pictures), "size": size},
        max_steps=recipe.max_steps,
        max_minutes=recipe.max_minutes,
        stop_steps=recipe.stop_after,
        warmup=recipe.warmup_steps,
        floor=recipe.final_rate,
        ema_decay=recipe.ema,
        clip=recipe.clip,
        save_steps=recipe.checkpoint_every,
        log_steps=recipe.log_every,
        resume=recipe.resume,
    )
    save_recipe(recipe, out / "recipe.yaml")
    batches = Batches(
        pictures, size, recipe.data.background, recipe.seed, recipe.batch_size, recipe.max_steps, run.step
    )
    loader = DataLoader(batches, batch_size=None, num_workers=recipe.num_workers, pin_memory=device.type == "cuda")

    def loss_of(images: Tensor, captions: list[str], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        teacher_prompt, student_prompt = prompts(captions)
        low, high = recipe.timestep_range
        timesteps = stratified_timesteps(len(images), recipe.timestep_levels, generator, low, high)
        with torch.no_grad():
            latents, _ = source.vae(images)
        noise = torch.randn((len(images), recipe.timestep_levels, *latents.shape[1:]), generator=generator)
        with autocast(device):
            return module(latents, timesteps.to(device), noise.to(device), teacher_prompt, student_prompt)

    @torch.no_grad()
    def validate(done: int) -> None:
        """Loss on held-out pictures with fixed noise and timesteps."""
        module.eval()
        with run.ema.applied():
            totals = []
            for start in range(0, len(shown), recipe.batch_size):
                part = slice(start, start + recipe.batch_size)
                generator = step_generator(torch.device("cpu"), recipe.seed, start, 11)
                loss, each = loss_of(shown[part], [caption for _, caption in heldout[part]], generator)
                totals.append({"validation": loss} | {f"validation_{k}": v for k, v in each.items()})
        means = {key: float(torch.stack([t[key] for t in totals]).mean()) for key in totals[0]}
        run.log.write(step=done, timestep=float(module.timestep), **means)
        module.train()

    module.train()
    if run.step == 0:
        validate(0)
    with run:
        for step, (images, captions, _) in zip(run, loader):
            loss, each = loss_of(images, list(captions), step_generator(torch.device("cpu"), recipe.seed, step, 5))
            run.update(loss)
            run.track(len(images), loss=loss, **each)
            if (step + 1) % recipe.validate_every == 0:
                validate(step + 1)
    if run.finished:
        with run.ema.applied():
            student.timestep.copy_(module.timestep.detach())
            path, dtype = out / checkpoints.NATIVE_NAME, getattr(torch, recipe.save_dtype)
            checkpoints.save_native(student.state_dict(), path, dict(recipe=method(recipe)), dtype)
        learned = float(module.timestep.detach())
        print(f"wrote {path} after {run.step} steps; learned timestep {learned:.2f}")
    return run.exit_code


def method(recipe: Recipe) -> str:
    """The recipe as JSON without what concerns one machine only: paths, device, workers."""
    fields = json.loads(json.dumps(vars(recipe), default=vars))
    for name in ("output_dir", "teacher_weights", "device", "num_workers", "resume"):
        fields.pop(name)
    fields["data"] = {name: value for name, value in fields["data"].items() if name not in ("path", "heldout")}
    return json.dumps(fields)


def _validation_images(pictures: list, size: int) -> Tensor:
    def read(path: Path) -> Tensor:
        return compose_plain(read_rgba(path, size)[None])[0] if is_transparent(path) else load_image(path, size)

    return torch.stack([read(path) for path, _ in pictures])
