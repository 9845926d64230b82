"""The typed recipe of a distillation: YAML files that inherit from one base, and overrides from the command line."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING as NO_FACTORY
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from .. import configs
from ..models.architectures import ARCHITECTURES, find_spec, model_of
from ..utils.atomic import is_file, is_text, set_aside, write_text
from ..utils.errors import InputError, MissingFileError, file_errors

_logger = logging.getLogger(__name__)


def _field(default: object, about: str) -> Any:
    """A field, with what `--fields` prints beside it."""
    given = dict(default_factory=default) if callable(default) else dict(default=default)
    return field(**given, metadata=dict(about=about))


@dataclass
class DataRecipe:
    path: str = _field(MISSING, "folder of images with captions, or .tar shards of img2dataset")
    more: list[str] | None = _field(None, "further folders or shards that are mixed in, not streamed")  # noqa: RUF009
    heldout: str | None = _field(None, "folder or shards for validation; default: every 20th (not of shards)")
    size: int | None = _field(None, "side in pixels, a multiple of the latents' stride; default: the model's own")
    crop: str = _field("center", "center or random, after the shorter side is resized to size")
    flip: bool = _field(True, "mirror half of the images")
    background: str = _field("white", "behind transparent images: white, or random (with random placement)")
    max_broken: int = _field(100, "images that may be unreadable before the run stops")
    shuffle_buffer: int = _field(256, "samples of shards to shuffle among")


@dataclass
class HeadsRecipe:
    depth: int = _field(3, "residual blocks per head; 0: no heads, features are compared as they are")
    conditioning: str = _field("film", "on the timestep: film (the paper's best) or adarms (the published weights)")
    gated: bool = _field(True, "gated MLPs in the blocks, as in the paper")
    weights: str | None = _field(None, "a CompVis full file or native file with heads to start from")


@dataclass
class LoraRecipe:
    rank: int = _field(0, "of the adapters on self-attention and feed-forward layers; 0: the whole student is trained")
    alpha: float | None = _field(None, "scale of the adapters; default: the rank")


@dataclass
class Recipe:
    model: str = _field(MISSING, "a cleandift_* model name: the student")
    teacher: str | None = _field(
        None, "the dift_* model name that it learns from; default: that of the same architecture"
    )  # fmt: skip
    teacher_weights: str | None = _field(
        None, "another teacher, your own fine-tuned SD: a path or OWNER/NAME[@REVISION][/PATH]"
    )  # fmt: skip
    student_weights: str | None = _field(
        None, "a student to continue from (its heads: heads.weights); default: the teacher's weights"
    )  # fmt: skip
    latent_encoder: str = _field(
        "default", "of the student: default (the VAE's, as the teacher's) or tiny (TAESD's form)"
    )  # fmt: skip
    latent_encoder_weights: str | None = _field(None, "source of that tiny encoder; default: where it is published")
    output_dir: str = _field(MISSING, "folder for everything that the run writes")
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    maps: dict[str, float] | None = _field(  # noqa: RUF009
        None, "weights of the maps in the loss, {us6: 1, us3: 0.5} or us6,us3; default: all, equally"
    )
    heads: HeadsRecipe = field(default_factory=HeadsRecipe)
    loss: str = _field("cosine", "cosine, l1 or l2")
    timestep_levels: int = _field(3, "noise levels per image and step, one from each of as many bins")
    timestep_range: list[int] = _field(lambda: [1, 999], "lowest and highest timestep of the noise, within 0..999")  # noqa: RUF009
    text: str = _field(
        "distilled", "who gets the captions: caption (both), empty (neither), distilled (only the teacher)"
    )  # fmt: skip
    batch_size: int = _field(8, "images of a batch, of each process")
    gradient_accumulation: int = _field(1, "batches a step")
    gradient_checkpointing: bool = _field(False, "recompute the student's activations: same result, less memory")
    mixed_precision: str = _field("auto", "no, bf16, fp16; auto: bf16 on GPUs that have it, else fp16; no on the CPU")
    cache_dir: str | None = _field(
        None, "folder for latents and prompt embeddings: later runs need no VAE and no text encoder"
    )  # fmt: skip
    max_steps: int = _field(400, "steps of the run")
    stop_after: int | None = _field(None, "stop this command after so many steps in all; start it again to continue")
    learning_rate: float = _field(2e-6, "peak rate of the student")
    heads_learning_rate: float | None = _field(None, "peak rate of the heads; default: learning_rate")
    warmup_steps: int = _field(400, "steps of linear warm-up to the peak rate")
    final_rate: float = _field(1.0, "part of the rate left at the end of a cosine; 1: constant after the warm-up")
    weight_decay: float = _field(0.0, "of AdamW")
    ema: float = _field(0.0, "decay of the weights' average that is exported; 0: the weights themselves")
    clip: float = _field(1.0, "largest norm of the gradient; 0: any")
    timestep: float | None = _field(None, "start of the student's learned timestep; default: the model's (SD: 261)")
    seed: int = _field(0, "of initial heads, order, crops, noise and timesteps")
    num_workers: int = _field(2, "processes that read images")
    deterministic: bool = _field(False, "torch's deterministic algorithms")
    max_skipped_steps: int = _field(5, "steps in a row whose loss is not finite before the run stops")
    checkpoint_every: int = _field(100, "steps between checkpoints")
    keep_checkpoints: int = _field(2, "number of the newest checkpoints that are kept")
    validate_every: int = _field(100, "steps between validations")
    sample_every: int = _field(100, "steps between figures of features; 0: none")
    log_every: int = _field(10, "steps between lines of log.jsonl")
    tensorboard: bool = _field(True, "also write tensorboard/")
    report_to: list[str] | None = _field(  # noqa: RUF009
        None, "further trackers of Accelerate, such as wandb, mlflow or trackio: [wandb,mlflow]"
    )
    resume: str = _field(
        "auto", "auto continues from output_dir's newest whole checkpoint; never refuses a folder that has one"
    )  # fmt: skip
    device: str = _field("auto", "auto, cpu or cuda")
    save_dtype: str = _field("float16", "of the exported weights: float16, bfloat16 or float32")
    push_to_hub: str | None = _field(None, "USER/REPO to publish the result in (also --push-to-hub)")


_LATER = {"report_to"}  # fields that the recipe.yaml of earlier versions has not
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
    "stop_after",
    "data.shuffle_buffer",
)
_NOT_NEGATIVE = (
    "clip",
    "final_rate",
    "heads.depth",
    "heads_learning_rate",
    "lora.rank",
    "num_workers",
    "sample_every",
    "seed",
    "warmup_steps",
    "weight_decay",
    "data.max_broken",
)


def find_recipe(name: str | Path, folder: Path = Path()) -> Path:
    """A YAML file, relative to a folder, or else a packaged one by its name ("cleandift_tiny").

    Raises:
        MissingFileError: there is neither.
    """
    path, packaged = folder / name, configs.names("finetune")
    if is_file(path):
        return path
    if (known := f"finetune/{str(name).removesuffix('.yaml')}") in packaged:
        return configs.find(known)
    listed = ", ".join(one.removeprefix("finetune/") for one in packaged)
    raise MissingFileError(f"recipe {path} does not exist; give a YAML file, or the name of a packaged one: {listed}")


def read_yaml(path: str | Path, above: Sequence[Path] = ()) -> DictConfig:
    """A YAML file over the one that its `base` field names, relative to it or packaged; `above`: the files that led to
    it."""
    path = find_recipe(path)
    if path.resolve() in above:
        raise InputError(f"recipe {path}: its base leads back to it; remove one base field")
    with file_errors(path):
        config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise InputError(f"recipe {path}: expected fields and values, as in {configs.FOLDER / 'finetune'}")
    base = config.pop("base", None)
    return _merge(read_yaml(find_recipe(str(base), path.parent), [*above, path.resolve()]), config) if base else config


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """Errors of OmegaConf and YAML become an InputError that names the recipe; of an unknown field, the nearest one."""
    try:
        yield
    except ConfigKeyError as error:
        unknown = str(error.full_key)
        near = get_close_matches(unknown, field_names(), 1) or get_close_matches(
            unknown.rpartition(".")[2], [name.rpartition(".")[2] for name in field_names()], 1
        )
        hint = f"did you mean {near[0]}? " if near else ""
        if unknown.lower().startswith("deepspeed"):
            hint = "DeepSpeed is not supported: launch with FSDP 2 (docs/finetune.md); "
        raise InputError(f"recipe {path}: there is no field {unknown}; {hint}--fields lists all") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        field_name = getattr(error, "full_key", None)
        told = " ".join(str(error).splitlines()[:1])
        raise InputError(f"recipe {path}: {f'{field_name}: ' if field_name else ''}{told}") from error
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"recipe {path}: {error}") from error


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """`above` over `below`. Maps are replaced, not joined, and "us6,us3" or a list gives equal weights. The teacher
    follows the model; report_to=wandb is a list of one."""
    if "maps" in above:
        names = above.maps
        if isinstance(names, str):
            names = names.replace(",", " ").split()
        if names is not None and not isinstance(names, DictConfig):
            above.maps = dict.fromkeys(names, 1.0)
        below.maps = None
    if isinstance(above.get("report_to"), str):
        above.report_to = above.report_to.replace(",", " ").split()
    if "model" in above and "teacher" not in above and "teacher" in below:
        below.teacher = None
    return OmegaConf.merge(below, above)


def _flat(config: DictConfig, path: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, value, default, what it is) of every field."""
    kind = OmegaConf.get_type(config)
    for found in fields(kind):
        name = f"{path}{found.name}"
        if "about" not in found.metadata:
            yield from _flat(config[found.name], f"{name}.")
            continue
        value = None if OmegaConf.is_missing(config, found.name) else config[found.name]
        default = found.default if found.default_factory is NO_FACTORY else found.default_factory()
        yield name, value, default, found.metadata["about"]


def changed_settings(before: Mapping, now: Mapping) -> dict[str, tuple]:
    """Dotted name -> (before, now) of what differs between the settings of two runs.

    A field of recipes that the earlier run did not know has its default there, so that its checkpoints stay of use.
    """
    defaults = {name: default for name, _, default, _ in _flat(OmegaConf.structured(Recipe))}
    before, now = _dotted(before), _dotted(now)
    found = {name: (before.get(name, defaults.get(name)), now.get(name)) for name in before.keys() | now.keys()}
    return {name: values for name, values in sorted(found.items()) if values[0] != values[1]}


def _dotted(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def plain_fields(recipe: Recipe) -> dict[str, int | float | str]:
    """Dotted name -> number or text of every field that has a value, as trackers show them."""
    values = {name: value for name, value, *_ in _flat(OmegaConf.structured(recipe)) if value is not None}
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in values.items()}


def field_names() -> list[str]:
    """Every field as it is given on the command line, e.g. "max_steps", "data.path"."""
    return [name for name, *_ in _flat(OmegaConf.structured(Recipe))]


def describe_fields(path: str | Path) -> str:
    """A line for every field: its value in a recipe, what it is, and its default where the recipe has another value."""
    with _errors_of(path):
        merged = _merge(OmegaConf.structured(Recipe), read_yaml(path))
    lines = []
    for name, value, default, about in _flat(merged):
        other = "" if default in (value, None, MISSING) else f" (default: {_shown(default)})"
        lines.append((f"{name}={_shown(value)}", f"{about}{other}"))
    width = min(40, max(len(given) for given, _ in lines))
    return "\n".join(f"{given:{width}}  # {about}" for given, about in lines)


def _shown(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file, or the name of a packaged one, see `find_recipe`.
        overrides: "field=value" or "group.field=value".

    Raises:
        InputError: unknown field, wrong type, value out of range, fields that exclude each other, or a field that was
            not given and has no default.
        MissingFileError: the file, or the one that it is based on, does not exist.
    """
    given = OmegaConf.create()
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r} is not field=value, e.g. data.path=IMAGES")
        if not is_text(override):
            raise InputError(f"override {override!r} holds bytes that are no UTF-8; rename the file or folder")
        try:
            given.merge_with_dotlist([override])
        except (OmegaConfBaseException, YAMLError) as error:
            raise InputError(
                f"override {override!r} is not YAML ({str(error).splitlines()[0]}); quote it, e.g. 'maps={{us6: 1}}'"
            ) from error
    with _errors_of(path):
        merged = _merge(OmegaConf.structured(Recipe), _merge(read_yaml(path), given))
        missing = OmegaConf.missing_keys(merged)
        if missing:
            first, *_ = names = sorted(missing)
            raise InputError(f"no value for {', '.join(names)}: give e.g. {first}=VALUE")
        if merged.mixed_precision == "False":  # YAML reads a bare `no` so
            merged.mixed_precision = "no"
        if merged.teacher is None:
            merged.teacher = _teacher_of(merged.model)
        spec = find_spec(merged.model)
        if merged.timestep is None and spec is not None:
            merged.timestep = float(spec.arch.defaults.timestep)
        if merged.data.more:
            merged.data.more = [os.path.expanduser(place) for place in merged.data.more]
        for name in ("output_dir", "cache_dir", "data.path", "data.heldout", "heads.weights"):
            if OmegaConf.select(merged, name):
                OmegaConf.update(merged, name, os.path.expanduser(OmegaConf.select(merged, name)))
        _check(merged)
        return OmegaConf.to_object(merged)


def _teacher_of(model: str) -> str:
    """The noisy model of the same architecture, with the same tag."""
    spec = find_spec(model)
    teacher, dot, tag = spec and model_of(spec.arch, "noisy"), *model.partition(".")[1:]
    return f"{teacher}{dot}{tag}" if teacher else "no teacher"


def _check(merged: DictConfig) -> None:
    """Raises InputError for values out of range, and for fields that exclude each other."""
    for name, allowed in _CHOICES.items():
        if OmegaConf.select(merged, name) not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {OmegaConf.select(merged, name)!r}")
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = OmegaConf.select(merged, name)
        if value is not None and not (value > 0 or (value == 0 and name in _NOT_NEGATIVE)):
            raise InputError(f"{name} must be {'at least' if name in _NOT_NEGATIVE else 'above'} 0, got {value}")
    for part in (merged, merged.heads, merged.lora, merged.maps or {}):
        for name, value in part.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
    if merged.timestep is not None and not 0 <= merged.timestep <= 999:
        raise InputError(f"timestep must be in 0..999, got {merged.timestep}")
    span = list(merged.timestep_range)
    if len(span) != 2 or not 0 <= span[0] < span[1] <= 999 or span[1] - span[0] + 1 < merged.timestep_levels:
        raise InputError(
            f"timestep_range must be two numbers of 0..999, in order, with room for timestep_levels, got {span}"
        )
    if merged.maps is not None and (not merged.maps or not all(weight > 0 for weight in merged.maps.values())):
        raise InputError(f"maps must give every map a weight above 0, got {dict(merged.maps)}")
    if merged.data.size is not None and merged.data.size < 64:
        raise InputError(f"data.size must be at least 64 pixels, got {merged.data.size}")
    if merged.heads.weights and not merged.heads.depth:
        raise InputError(f"heads.weights={merged.heads.weights} needs heads: heads.depth is 0")
    if merged.latent_encoder_weights and merged.latent_encoder == "default":
        raise InputError(f"latent_encoder_weights={merged.latent_encoder_weights} needs latent_encoder=tiny")
    student, teacher = find_spec(merged.model), find_spec(merged.teacher)
    tag = merged.teacher.partition(".")[2]
    known = student and teacher and (not tag or teacher.weights(tag) is not None)
    if not known or student.noisy or student.pyramid or not teacher.noisy or teacher.arch is not student.arch:
        pairs = ((model_of(arch, "clean"), model_of(arch, "noisy")) for arch in ARCHITECTURES.values() if arch.listed)
        names = ", ".join(" with ".join(pair) for pair in pairs)
        raise InputError(f"model and teacher must be one of {names}; got {merged.model} with {merged.teacher}")
    several = dict(crop="center", background="white")  # with other values an image has another view in each epoch
    found = [(name, merged.data[name], one) for name, one in several.items() if merged.data[name] != one]
    if merged.cache_dir and found:
        told = " and ".join(f"data.{name} is {value}" for name, value, _ in found)
        remedy = " ".join(f"data.{name}={one}" for name, _, one in found)
        raise InputError(
            f"cache_dir keeps one view of each image, but {told} in this recipe: add {remedy}, or leave out cache_dir"
        )


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the resolved recipe as YAML. Another file there, such as one written by hand, becomes NAME.other."""
    path = Path(path)
    if path.is_file() and not _is_resolved(path):
        _logger.warning(f"{path} was not written by a run: kept as {set_aside(path, 'other').name}")
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def _is_resolved(path: Path) -> bool:
    """Whether a recipe has all fields and no comments: what a run writes."""
    try:
        text = path.read_text(encoding="utf-8")
        found = OmegaConf.create(text)
    except Exception:  # OmegaConf passes on whatever its parser raises
        return False
    return "#" not in text and {field.name for field in fields(Recipe)} ^ set(found) <= _LATER
