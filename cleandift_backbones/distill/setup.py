"""From a recipe to what is trained: teacher, student, heads, data, prompts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import checkpoints
from ..checkpoints.hub import fetch_checkpoint
from ..checkpoints.save import checksum
from ..data.batches import DecodeOptions, FolderBatches, TrainingBatch, plain_images
from ..data.captioned import DataSummary, peek, sources_of, spread, summarize
from ..data.shards import shards_of
from ..data.sources import ImageSource
from ..data.streaming import ShardBatches
from ..models.architectures import spec_of
from ..models.denoisers.base import Denoiser
from ..models.dift import DIFT
from ..models.last_map import check_reaches
from ..models.latent_encoders import load_latent_encoder
from ..models.learned import stored_timestep
from ..models.projection_heads import ProjectionHeads
from ..models.text import PromptEncoder, encoder_identity
from ..utils.atomic import exists
from ..utils.errors import InputError, missing_weights
from ..utils.guard import started
from ..utils.locks import hold
from ..utils.seeding import mix_seed
from .cache import CachedBatches, LatentCache
from .distiller import Distiller
from .distributed import autocast, half_of, whole
from .lora import add_lora
from .recipe import Recipe

_logger = logging.getLogger(__name__)
VALIDATION_PICTURES = 64


def load_teacher(recipe: Recipe) -> DIFT:
    """The frozen teacher with its VAE and empty prompt, from its published place or `teacher_weights`, in float32."""
    sources = dict(unet=recipe.teacher_weights) if recipe.teacher_weights else {}
    remedy = (
        "Give teacher_weights=FOLDER, a folder of Stable Diffusion in diffusers' form with unet, vae and text_encoder "
        "(hf download REPOSITORY --local-dir FOLDER, where there is a network)"
    )
    deepest = spec_of(recipe.teacher).arch.denoiser.maps()[-1].name
    with missing_weights(remedy):
        source = timm.create_model(recipe.teacher, pretrained=True, final_map=deepest, sources=sources)
    return source.requires_grad_(False).eval()


class Encoders(nn.Module):
    """Image encoders of a run: the teacher's, and a light one of the student if the recipe asks for it; both frozen."""

    def __init__(self, teacher: nn.Module, student: nn.Module | None):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.requires_grad_(False).eval()

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("latents",) if self.student is None else ("latents", "student_latents")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images B x 3 x H x W in [-1, 1] -> B x C x h x w latents, one of each kind."""
        return [self.teacher(images)[0]] + ([] if self.student is None else [self.student(images)[0]])


def load_student_encoder(recipe: Recipe) -> nn.Module | None:
    """The student's light encoder in float32, from `latent_encoder_weights` or where it is published, or None.

    Raises:
        RuntimeError: weights are unavailable. CheckpointError: of another kind.
    """
    if recipe.latent_encoder == "default":
        return None
    with missing_weights("Give latent_encoder_weights=PATH, a folder of an AutoencoderTiny in diffusers' form"):
        return load_latent_encoder(recipe.model, recipe.latent_encoder, recipe.latent_encoder_weights)


def build_module(recipe: Recipe, source: DIFT) -> Distiller:
    """Student (a copy of the teacher, as deep as the finest map in the loss), heads and loss.

    Raises:
        ValueError: unknown maps. CheckpointError: unfit weights of the student or the heads.
    """
    torch.manual_seed(mix_seed(recipe.seed, 0))  # of heads and adapters
    arch = spec_of(recipe.teacher).arch
    maps = dict(recipe.maps) if recipe.maps else dict.fromkeys(source.denoiser.map_names, 1.0)
    source.denoiser.check_maps(maps)
    last = max(maps, key=source.denoiser.map_names.index)
    with torch.device("meta"):
        student = arch.denoiser.build(last)
    teacher = source.denoiser.state_dict()
    student.load_state_dict({name: teacher[name].clone() for name in student.state_dict()}, assign=True)
    timestep = recipe.timestep
    if recipe.student_weights:
        timestep = _load_student(student, recipe.student_weights, timestep, recipe.latent_encoder)
    student.grad_checkpointing = recipe.gradient_checkpointing
    if recipe.lora.rank:
        add_lora(student, recipe.lora.rank, recipe.lora.alpha)
    channels = {info.name: info.channels for info in student.infos if info.name in maps}
    options = recipe.heads
    heads = ProjectionHeads(channels, options.depth, options.conditioning, options.gated) if options.depth else None
    if heads is not None and options.weights:
        weights = checkpoints.open_checkpoint(options.weights)
        state = {name: weights[f"heads.{name}"].float() for name in heads.state_dict() if f"heads.{name}" in weights}
        try:
            heads.load_state_dict(state)
        except RuntimeError as error:
            raise checkpoints.CheckpointError(
                f"{options.weights} ({weights.describe()}) does not fit: {error}"
            ) from error
    return Distiller(source.denoiser, student, arch.schedule.scheduler(), maps, heads, recipe.loss, timestep)


def _load_student(student: Denoiser, source: str, timestep: float, latent_encoder: str) -> float:
    """Gives a student the UNet of a checkpoint; returns its learned timestep, or the one given if it holds none.

    Raises:
        CheckpointError: unfit weights, also those of a student that learnt on a light encoder's latents where this run
            has the VAE's. The reverse is how a student comes to a light encoder.
    """
    weights = checkpoints.open_checkpoint(fetch_checkpoint(source))
    if latent_encoder == "default" and weights.latent_encoder() not in (None, "default"):
        kind = weights.latent_encoder()
        raise checkpoints.CheckpointError(
            f"student_weights={source} learnt on the latents of the {kind} encoder that it holds: give "
            f"latent_encoder={kind} too, or a student of the VAE's latents"
        )
    check_reaches(weights, student)
    expected = {f"unet.{name}": tensor for name, tensor in student.state_dict().items()}
    beside = {f"unet.{name}" for name in student.dropped_keys}
    state = checkpoints.fit(weights, expected, lambda name: not name.startswith("unet.") or name in beside)
    student.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in state.items()})
    stored = stored_timestep(weights)
    return timestep if stored is None else stored.item()


def parameter_groups(recipe: Recipe, module: Distiller) -> list[dict]:
    """Trained parameters with their peak rates: the student with its timestep, and the heads."""
    student = [p for p in module.student.parameters() if p.requires_grad]
    groups = [dict(params=[*student, module.timestep], lr=recipe.learning_rate)]
    if module.heads is not None:
        groups.append(
            dict(
                params=list(module.heads.parameters()),
                lr=recipe.learning_rate if recipe.heads_learning_rate is None else recipe.heads_learning_rate,
            )
        )
    return groups


class Prompts:
    """Prompt embeddings for teacher and student by the recipe's text mode.

    The text encoder is loaded for the first caption that is not empty, and stays.
    """

    def __init__(self, mode: str, empty: Tensor, source: str | None):
        if mode != "empty" and source is None:
            raise InputError(f"text={mode} needs a text encoder, and this model names none: use text=empty")
        self.mode, self.empty, self.source = mode, empty, source
        self.encoder: PromptEncoder | None = None

    def embed(self, captions: Sequence[str]) -> Tensor:
        """B x L x C; all empty where no text is used."""
        if self.mode == "empty":
            return self.empty.expand(len(captions), -1, -1)
        if self.encoder is None:
            self.encoder = PromptEncoder(self.source, device=self.empty.device)
        return self.encoder(captions).to(self.empty)

    def split(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(teacher's, student's) of a batch's embeddings."""
        if self.mode == "empty":
            return self.empty, self.empty
        return embeds, embeds if self.mode == "caption" else self.empty


@dataclass
class Data:
    """What a run trains and validates on; `summary` says it in numbers."""

    pictures: list[ImageSource] | list[str]
    heldout: list[ImageSource]
    options: DecodeOptions
    summary: DataSummary
    cache: LatentCache | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.pictures) and isinstance(self.pictures[0], str)


def list_data(recipe: Recipe, size: int) -> Data:
    """The pictures of a recipe: a folder of pictures, or shards, or several of these mixed.

    Shards alone are streamed; beside others they are read into memory. Every 20th picture is held out if `data.heldout`
    names none.

    Raises:
        InputError: none there; shards with a cache or without held-out pictures.
    """
    data, left_out = recipe.data, Counter()
    options = DecodeOptions(size, data.crop, data.flip, data.background)
    if not exists(data.path) and ".tar" not in data.path:
        raise InputError(f"no pictures in {data.path}: give data.path a folder of pictures, or of .tar shards")
    heldout = sources_of(data.heldout, VALIDATION_PICTURES) if data.heldout else []
    shards, places = shards_of(data.path), [data.path, *(data.more or ())]
    if shards and not data.more:
        if recipe.cache_dir or not heldout:
            need = "cache_dir needs a folder of pictures" if recipe.cache_dir else "shards need data.heldout"
            raise InputError(f"{need}: {data.path} holds .tar shards")
        return Data(shards, heldout, options, peek(shards, len(heldout)))
    pictures = [image for place in places for image in sources_of(place, None, recipe.output_dir, left_out)]
    if recipe.cache_dir and any(isinstance(picture.source, bytes) for picture in pictures):
        raise InputError(
            f"cache_dir needs folders of pictures: {', '.join(filter(shards_of, places))} holds .tar shards"
        )
    if not heldout:
        heldout, pictures = pictures[::20], [p for i, p in enumerate(pictures) if i % 20] or pictures
        heldout = spread(heldout, VALIDATION_PICTURES)
    return Data(pictures, heldout, options, summarize(pictures, len(heldout), left_out))


def cache_latents(
    recipe: Recipe, data: Data, source: DIFT, encoders: Encoders, prompts: Prompts, accelerator: Accelerator
) -> None:
    """Fills the recipe's cache on the first process while the others wait; leaves out what cannot be read.

    Raises:
        InputError: more broken pictures than `data.max_broken`.
    """
    identity = dict(
        teacher=recipe.teacher,
        vae=checksum(encoders.teacher.state_dict()),
        text=recipe.text,
        text_encoder=encoder_identity(source.text_encoder) if recipe.text != "empty" else "",
        precision=str(half_of(accelerator)),
        size=data.options.size,
    )
    if encoders.student is not None:
        identity["student_vae"] = checksum(encoders.student.state_dict())
    data.cache = LatentCache(recipe.cache_dir, identity, encoders.kinds)
    everything = [*data.pictures, *data.heldout]
    if accelerator.is_main_process and data.cache.missing(everything):
        encoders.to(accelerator.device)

        @torch.no_grad()
        def encode(images: Tensor) -> list[Tensor]:
            with autocast(accelerator):
                return encoders(images.to(accelerator.device))

        # Runs may share a cache: the second one waits, and finds everything there.
        with hold(recipe.cache_dir, "latents", math.inf, _logger.warning):
            broken = data.cache.fill(everything, data.options, encode, prompts.embed)
        report_broken(broken, len(broken), recipe.data.max_broken)
    accelerator.wait_for_everyone()
    lost = {picture.name for picture in data.cache.missing(everything)}
    data.pictures = [picture for picture in data.pictures if picture.name not in lost]
    data.heldout = [picture for picture in data.heldout if picture.name not in lost]
    if not data.pictures or not data.heldout:
        raise InputError(f"none of the pictures in {recipe.data.path} can be read")


def report_broken(broken: Collection[str], total: int, limit: int) -> None:
    """Warns of pictures that could not be read. Raises ValueError if they are more than the limit in all."""
    for reason in broken:
        _logger.warning(f"skipped: {reason}")
    if total > limit:
        raise InputError(
            f"{total} pictures could not be read, the last: {reason}. That is more than data.max_broken={limit}: "
            "repair the data, or raise it"
        )


def make_loader(recipe: Recipe, data: Data, start: int, accelerator: Accelerator) -> Iterator:
    """Batches of this process from number `start` on (gradient_accumulation batches a step).

    Signals reach a launcher's whole process group: the workers serve until the main process has saved.
    """
    place = dict(start=start, rank=accelerator.process_index, world=accelerator.num_processes)
    batches = recipe.max_steps * recipe.gradient_accumulation
    if data.cache is not None:
        dataset = CachedBatches(
            data.cache, data.pictures, data.options.flip, recipe.seed, recipe.batch_size, batches, **place
        )
    elif data.streamed:
        dataset = ShardBatches(
            data.pictures, data.options, recipe.seed, recipe.batch_size, buffer=recipe.data.shuffle_buffer, **place
        )
    else:
        dataset = FolderBatches(data.pictures, data.options, recipe.seed, recipe.batch_size, batches, **place)
    cuda = accelerator.device.type == "cuda"
    return started(DataLoader(dataset, batch_size=None, num_workers=recipe.num_workers, pin_memory=cuda))


def encode_batch(
    batch: TrainingBatch | tuple, encoders: Encoders | None, prompts: Prompts, accelerator: Accelerator
) -> tuple[list[Tensor], Tensor, list[str], list[str]]:
    """A batch as (latents of each kind, prompt embeddings, names, broken), on the device; of pictures or the cache."""
    device = accelerator.device
    if not isinstance(batch, TrainingBatch):
        latents, embeds, names = batch
        return [x.to(device).float() for x in latents], embeds.to(device).float(), list(names), []
    images = batch.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(accelerator):
        latents = encoders(images)
    return [x.float() for x in latents], prompts.embed(batch.captions), batch.names, batch.broken


def validation_batch(
    data: Data, encoders: Encoders | None, prompts: Prompts, accelerator: Accelerator, batch_size: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(images, latents of each kind, prompt embeddings) of the held-out pictures, on the CPU."""
    images, kept = plain_images(data.heldout, data.options)
    if data.cache is not None:
        held = [checkpoints.open_weights(data.cache.path(picture)) for picture in kept]
        latents = [torch.stack([h.get_tensor(kind)[0] for h in held]).float() for kind in data.cache.kinds]
        return images, latents, torch.stack([h.get_tensor("prompt") for h in held]).float()
    parts = []
    for start in range(0, len(kept), batch_size):
        part = slice(start, start + batch_size)
        batch = TrainingBatch(images[part], [p.caption for p in kept[part]], [p.name for p in kept[part]], [])
        latents, embeds, *_ = encode_batch(batch, encoders, prompts, accelerator)
        parts.append(([x.cpu() for x in latents], embeds.cpu()))
    latents = [torch.cat(x) for x in zip(*(p[0] for p in parts))]
    return images, latents, torch.cat([p[1] for p in parts])


def trained_parameters(module: Distiller) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def trained_state(module: Distiller) -> dict[str, Tensor]:
    """What a checkpoint holds: everything trained, whole, and the heads' fixed frequencies."""
    trained = trained_parameters(module)
    state = module.state_dict()
    return {name: whole(t) for name, t in state.items() if name in trained or name.startswith("heads.")}
