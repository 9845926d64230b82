"""The typed recipe of a distillation: YAML files that inherit from one base, and overrides from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError, MissingFileError
from ..models import ARCHITECTURES


@dataclass
class DataRecipe:
    path: str = MISSING  # folder of pictures with captions, or .tar shards of img2dataset
    heldout: str | None = None  # folder for validation; default: every 20th picture of path; shards need one
    size: int | None = None  # side in pixels, a multiple of the latents' stride; default: the model's own
    crop: str = "center"  # center or random, after the shorter side is resized to size
    flip: bool = True  # mirror half of the pictures
    background: str = "white"  # what shows through transparent pictures: white, or random (with random placement)
    max_broken: int = 100  # pictures that may be unreadable before the run stops
    shuffle_buffer: int = 256  # samples of shards to shuffle among


@dataclass
class HeadsRecipe:
    depth: int = 3  # residual blocks per head; 0: no heads, features are compared as they are
    conditioning: str = "film"  # film (the paper's best) or adarms (the published weights)
    gated: bool = True
    weights: str | None = None  # a CompVis full file or native file with heads to start from


@dataclass
class LoraRecipe:
    rank: int = 0  # of the adapters on self-attention and feed-forward layers; 0: the whole student is trained
    alpha: float | None = None  # their scale; default: the rank


@dataclass
class Recipe:
    model: str = MISSING  # a cleandift_* model name: the student
    teacher: str = MISSING  # the dift_* model name that it learns from
    teacher_weights: str | None = (
        None  # path or OWNER/NAME[@REVISION][/PATH] of another teacher: your own fine-tuned SD
    )
    student_weights: str | None = (
        None  # the same of a student to go on from (its heads: heads.weights); default: teacher
    )
    latent_encoder: str = "default"  # of the student: default (the VAE's, as the teacher's) or tiny (TAESD's form)
    latent_encoder_weights: str | None = None  # source of that light encoder; default: where it is published
    output_dir: str = MISSING
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    maps: dict[str, float] | None = None  # map name -> weight; default: all, equally
    heads: HeadsRecipe = field(default_factory=HeadsRecipe)
    loss: str = "cosine"  # cosine, l1 or l2
    timestep_levels: int = 3  # noise levels per picture and step, one from each of as many bins
    timestep_range: list[int] = field(default_factory=lambda: [1, 999])
    text: str = "distilled"  # caption (both get it), empty (neither), distilled (only the teacher)
    batch_size: int = 8  # of each process
    gradient_accumulation: int = 1  # batches a step
    gradient_checkpointing: bool = False  # recompute the student's activations: same result, less memory
    mixed_precision: str = "auto"  # no, bf16, fp16; auto: bf16 on GPUs that have it, else fp16; no on the CPU
    cache_dir: str | None = None  # keep latents and prompt embeddings there: later runs need no VAE, no text encoder
    max_steps: int = 400
    stop_after: int | None = None  # stop this command after so many steps in all; start it again to go on
    learning_rate: float = 2e-6
    heads_learning_rate: float | None = None  # default: learning_rate
    warmup_steps: int = 400
    final_rate: float = 1.0  # part of the rate left at the end of a cosine; 1: constant after the warm-up
    weight_decay: float = 0.0
    ema: float = 0.0  # decay of the weights' average that is exported; 0: the weights themselves
    clip: float = 1.0  # largest norm of the gradient; 0: any
    timestep: float = 261.0  # start of the student's learned timestep
    seed: int = 0
    num_workers: int = 2
    deterministic: bool = False  # torch's deterministic algorithms
    max_skipped_steps: int = 5  # steps in a row whose loss is not finite before the run stops
    checkpoint_every: int = 100
    keep_checkpoints: int = 2  # of the newest
    validate_every: int = 100
    sample_every: int = 100  # pictures of features; 0: none
    log_every: int = 10
    tensorboard: bool = True
    resume: str = "auto"  # auto goes on from output_dir's newest whole checkpoint; never refuses a folder that has one
    device: str = "auto"  # auto, cpu or cuda
    save_dtype: str = "float16"  # of the exported weights: float16, bfloat16 or float32
    push_to_hub: str | None = None  # USER/REPO to publish the result in (also --push-to-hub)


_CHOICES = {
    "loss": ("cosine", "l1", "l2"),
    "text": ("caption", "empty", "distilled"),
    "latent_encoder": ("default", "tiny"),
    "data.background": ("white", "random"),
    "data.crop": ("center", "random"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "heads.conditioning": ("film", "adarms"),
    "resume": ("auto", "never"),
    "save_dtype": ("float16", "bfloat16", "float32"),
}
_POSITIVE = (
    "timestep_levels",
    "batch_size",
    "gradient_accumulation",
    "keep_checkpoints",
    "max_skipped_steps",
    "max_steps",
    "learning_rate",
    "checkpoint_every",
    "validate_every",
    "log_every",
)


def read_yaml(path: str | Path) -> DictConfig:
    """A YAML file over the one that its `base` field names, relative to it."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"recipe {path} does not exist: see configs/finetune/")
    config = OmegaConf.load(path)
    base = config.pop("base", None)
    return OmegaConf.merge(read_yaml(path.parent / base), config) if base else config


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file, as in configs/finetune/.
        overrides: "field=value" or "group.field=value".

    Raises:
        ValueError: unknown field, wrong type, value out of range, or a field that has no default and was not given.
    """
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r} is not field=value, e.g. data.path=PICTURES")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise InputError(f"no value for {', '.join(sorted(missing))}: give e.g. {sorted(missing)[0]}=VALUE")
        if merged.mixed_precision == "False":  # YAML reads a bare `no` so
            merged.mixed_precision = "no"
        for name, allowed in _CHOICES.items():
            if OmegaConf.select(merged, name) not in allowed:
                value = OmegaConf.select(merged, name)
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in _POSITIVE:
            if not merged[name] > 0:
                raise InputError(f"{name} must be above 0, got {merged[name]}")
        span = list(merged.timestep_range)
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 999 or span[1] - span[0] + 1 < merged.timestep_levels:
            raise InputError(
                f"timestep_range must be two numbers of 0..999, in order, with room for timestep_levels, got {span}"
            )
        if merged.maps is not None and (not merged.maps or not all(weight > 0 for weight in merged.maps.values())):
            raise InputError(f"maps must give every map a weight above 0, got {dict(merged.maps)}")
        if merged.data.size is not None and merged.data.size < 64:
            raise InputError(f"data.size must be at least 64 pixels, got {merged.data.size}")
        if merged.clip < 0 or (merged.stop_after is not None and merged.stop_after <= 0):
            raise InputError(
                f"clip must be at least 0 (0: off) and stop_after above 0, got {merged.clip}, {merged.stop_after}"
            )
        if merged.heads.weights and not merged.heads.depth:
            raise InputError(f"heads.weights={merged.heads.weights} needs heads: heads.depth is 0")
        if merged.latent_encoder_weights and merged.latent_encoder == "default":
            raise InputError(f"latent_encoder_weights={merged.latent_encoder_weights} needs latent_encoder=tiny")
        for name in ("output_dir", "cache_dir", "data.path", "data.heldout", "heads.weights"):
            if OmegaConf.select(merged, name):
                OmegaConf.update(merged, name, os.path.expanduser(OmegaConf.select(merged, name)))
        if merged.lora.rank < 0 or merged.heads.depth < 0:
            raise InputError(
                f"lora.rank and heads.depth must be at least 0, got {merged.lora.rank}, {merged.heads.depth}"
            )
        student, _, architecture = merged.model.partition("_")
        if student != "cleandift" or merged.teacher != f"dift_{architecture}" or architecture not in ARCHITECTURES:
            names = ", ".join(f"cleandift_{a} with dift_{a}" for a in ARCHITECTURES if a != "test")
            raise InputError(f"model and teacher must be one of {names}; got {merged.model} with {merged.teacher}")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"recipe {path}: {str(error).splitlines()[0]}") from error


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the resolved recipe as YAML."""
    OmegaConf.save(OmegaConf.structured(recipe), path)
