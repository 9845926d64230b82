"""The distillation's training loop, on Hugging Face Accelerate: from a recipe to a native folder."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import get_int_from_env, set_seed
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from ..checkpoints import check_replaceable
from ..data.images import check_folder
from ..models.architectures import spec_of
from ..models.dift import DIFT
from ..models.latent_maps import latent_stride
from ..publish.training_data import training_data
from ..utils.errors import DivergedError, FileTakenError, InputError, file_errors, resource_errors
from ..utils.locks import hold
from ..utils.progress import tqdm
from ..utils.seeding import mix_seed, step_generator
from .checkpoint import Checkpoints, check_same_run
from .distiller import Distiller, stratified_timesteps
from .distributed import autocast, engine_of, half_of, make_accelerator, pack_optimizer, unpack_optimizer, whole
from .export import student_state, untrained_state, write_native
from .loop import EMA, Signals, lr_factor
from .lora import lora_state
from .recipe import Recipe, plain_fields, save_recipe
from .setup import (
    Encoders,
    Prompts,
    build_module,
    cache_latents,
    encode_batch,
    list_data,
    load_student_encoder,
    load_teacher,
    make_loader,
    parameter_groups,
    report_broken,
    trained_parameters,
    trained_state,
    validation_batch,
)
from .summary import data_warnings, footer, header
from .tracking import Monitor, choose_trackers, feature_sheet

_logger = logging.getLogger(__name__)


class Training:
    """One run. Reads from top to bottom: `run`, then what it calls."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.out, self.started = recipe, Path(recipe.output_dir), time.monotonic()
        check_replaceable(self.out / "native")  # not only when the training is over
        self.trackers = choose_trackers(recipe.tensorboard, recipe.report_to)
        self.accelerator = accelerator = make_accelerator(recipe)
        self._print([f"loading {recipe.teacher} and the list of images ..."])
        if accelerator.device.type == "cuda":  # TF32 in what stays float32; a setting of the whole process
            torch.set_float32_matmul_precision("high")
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        set_seed(mix_seed(recipe.seed, 1) % 2**32)
        side = spec_of(recipe.model).arch.image_size
        stride = latent_stride(spec_of(recipe.model).arch.vae)
        self.size = recipe.data.size or side
        if self.size % stride:
            raise InputError(f"data.size={self.size} is no multiple of the latents' stride {stride}")
        self.data = list_data(recipe, self.size)
        self.source: DIFT = load_teacher(recipe)
        self.module: Distiller = build_module(recipe, self.source)
        self.encoders = Encoders(self.source.vae, load_student_encoder(recipe))
        self.untrained = untrained_state(self.source, self.encoders.student)  # before a GPU, half precision, a cache
        device = accelerator.device
        self.prompts = Prompts(recipe.text, self.source.prompt_embeds.to(device), self.source.text_encoder)
        if recipe.cache_dir:
            cache_latents(recipe, self.data, self.source, self.encoders, self.prompts, accelerator)
            self._agree(len(self.data.pictures), "cache_dir", recipe.cache_dir)
            self.encoders = self.source.vae = None
        self.engine = engine_of(accelerator)
        self.source.to(device, memory_format=torch.channels_last)
        if self.encoders is not None:
            self.encoders.to(device, memory_format=torch.channels_last)
        flat = self.engine == "fsdp"  # it cuts weights into flat pieces
        self.module.to(device, memory_format=torch.contiguous_format if flat else torch.channels_last)
        half = half_of(accelerator)
        if half is not None:  # frozen: half of it is enough
            torch.nn.Module.to(self.module.teacher, half)  # diffusers' own warns of float32 modules that are not there
        self.validation = validation_batch(self.data, self.encoders, self.prompts, accelerator, recipe.batch_size)
        groups = parameter_groups(recipe, self.module)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=device.type == "cuda")
        self.peaks = [group["lr"] for group in groups]
        self.step, self.skipped = 0, 0
        self.broken: set[str] = set()
        self.checkpoints = Checkpoints(self.out / "checkpoints", recipe.keep_checkpoints)
        found = self._find()
        if self.engine == "fsdp":  # the frozen teacher stays in one piece, in its own precision
            accelerator.state.fsdp_plugin.ignored_modules = [self.module.teacher]
        self.wrapped, self.optimizer = accelerator.prepare(self.module, self.optimizer)
        if self.engine == "fsdp":
            register_fsdp_forward_method(self.module, "compare")
        self.parameters = trained_parameters(self.module)
        named = {f"distiller/{name}": parameter for name, parameter in self.parameters.items()}
        self.ema = EMA(named, recipe.ema) if recipe.ema else None
        if found is not None:
            self._resume(found)

    def _print(self, lines: list[str]) -> None:
        if self.accelerator.is_main_process:
            print(*lines, sep="\n", flush=True)

    # --- the loop ---

    def run(self) -> int:
        """Trains to the end, or until a signal; returns the exit code."""
        recipe, accelerator, main = self.recipe, self.accelerator, self.accelerator.is_main_process
        if main:
            with file_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                save_recipe(recipe, self.out / "recipe.yaml")
        self._print(header(self))
        if main:
            for sentence in data_warnings(self.data, recipe):
                _logger.warning(sentence)
        accelerator.wait_for_everyone()
        self.monitor = Monitor(accelerator, self.out, self.step, self.trackers, plain_fields(recipe))
        batches = make_loader(recipe, self.data, self.step * recipe.gradient_accumulation, accelerator)
        self.module.train()
        if self.step == 0:
            self.validate()
        bar = tqdm(total=recipe.max_steps, initial=self.step, desc=self.out.name, unit="step", disable=not main)
        with Signals() as signals, bar:
            while self.step < recipe.max_steps:
                self.train_step(batches)
                self.step += 1
                bar.update()
                done = self.step == recipe.max_steps
                if self.step % recipe.log_every == 0 or done:
                    means = self.monitor.flush(self.step, lr=self.optimizer.param_groups[0]["lr"])
                    shown = {k: f"{means[k]:.4g}" for k in ("loss", "images_per_s", "memory_gb") if k in means}
                    bar.set_postfix(shown, refresh=False)
                if self.step % recipe.validate_every == 0 or done:
                    self.validate()
                if recipe.sample_every and (self.step % recipe.sample_every == 0 or done):
                    self.sample()
                stopped = self._any(signals.number) or (recipe.stop_after or math.inf) <= self.step < recipe.max_steps
                if stopped or done or self.step % recipe.checkpoint_every == 0:
                    self.save()
                if stopped:
                    bar.write(f"stopped after step {self.step}: the same command goes on from {self.out}")
                    break
        self.monitor.close()
        if self.step == recipe.max_steps:
            self.export()
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return signals.exit_code

    def train_step(self, batches) -> None:
        """Gradients of `gradient_accumulation` batches and a step of the optimizer, or none if they are not finite."""
        recipe, accelerator = self.recipe, self.accelerator
        factor = lr_factor(self.step, self.step / recipe.max_steps, recipe.warmup_steps, recipe.final_rate)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        names, finite, count = [], True, recipe.gradient_accumulation
        for micro in range(count):
            (latents, *own), embeds, called, broken = encode_batch(
                next(batches), self.encoders, self.prompts, accelerator
            )
            names += called
            self._count_broken(broken)
            with accelerator.accumulate(self.wrapped), autocast(accelerator):
                loss, each = self.wrapped(latents, *self._draw(latents, micro), *self.prompts.split(embeds), *own)
                finite = finite and not self._any(not torch.isfinite(loss))
                if finite:
                    accelerator.backward(loss)  # divides it by their number
            self.monitor.track(len(latents), loss=loss, **{f"loss/{name}": value for name, value in each.items()})
        if finite:
            norm = torch.as_tensor(accelerator.clip_grad_norm_(self.parameters.values(), recipe.clip or math.inf))
            if accelerator.scaler is None:
                finite = bool(torch.isfinite(whole(norm)))
            else:  # float16: the scaler takes the step only if it is finite, and lowers its scale otherwise
                self.optimizer.step()
                finite = not accelerator.optimizer_step_was_skipped
        if finite:
            if accelerator.scaler is None:
                self.optimizer.step()
            self.skipped = 0
            if self.ema is not None:
                self.ema.update(self.step)
        else:
            self._skip(names)
        self.optimizer.zero_grad(set_to_none=True)

    def _draw(self, latents: Tensor, micro: int) -> tuple[Tensor, Tensor]:
        """Timesteps B x I and noise B x I x ... of this process's part of the joint batch, from seed and step alone."""
        recipe, accelerator = self.recipe, self.accelerator
        place = self.step * recipe.gradient_accumulation + micro
        generator = step_generator(torch.device("cpu"), recipe.seed, place, 5)
        joint = recipe.batch_size * accelerator.num_processes
        low, high = recipe.timestep_range
        timesteps = stratified_timesteps(joint, recipe.timestep_levels, generator, low, high)
        noise = torch.randn((joint, recipe.timestep_levels, *latents.shape[1:]), generator=generator)
        mine = slice(accelerator.process_index * recipe.batch_size, (accelerator.process_index + 1) * recipe.batch_size)
        return timesteps[mine].to(latents.device), noise[mine].to(latents.device)

    def _agree(self, number: int, field: str, folder: Path) -> None:
        """Raises ValueError where processes found different things in a folder: it is not one for all machines."""
        if self.accelerator.num_processes > 1:
            every = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).tolist()
            if len(set(every)) > 1:
                raise InputError(f"{field} {folder} is not the same on all machines: give a shared folder")

    def _any(self, flag: object) -> bool:
        """Whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        total = self.accelerator.reduce(torch.tensor(float(bool(flag)), device=self.accelerator.device), "sum")
        return bool(total > 0)

    def _count_broken(self, broken: list[str]) -> None:
        new = set(broken) - self.broken  # each is told and counted once, not once an epoch
        self.broken |= new
        report_broken(sorted(new), len(self.broken), self.recipe.data.max_broken)

    def _skip(self, names: list[str]) -> None:
        self.skipped += 1
        _logger.warning(f"step {self.step} is skipped: its loss or gradient is not finite")
        # A float16 scaler may need 16 steps to find its first scale.
        limit = max(self.recipe.max_skipped_steps, 20 * (self.accelerator.scaler is not None))
        if self.skipped >= limit:
            raise DivergedError(
                f"the loss was not finite in {self.skipped} steps in a row, up to step {self.step}. The last batch was "
                f"{', '.join(names)}. Look at these pictures, or lower learning_rate in a new output_dir; the last "
                "checkpoint stands"
            )

    # --- looking ---

    @contextmanager
    def averaged(self):
        """The exported weights in place: the average, if there is one."""
        self.module.eval()
        with self.ema.applied() if self.ema is not None else nullcontext(), torch.no_grad():
            yield
        self.module.train()

    def validate(self) -> None:
        """Loss on held-out pictures with fixed noise and timesteps; the same on every process, for shards."""
        _, (latents, *own), embeds = self.validation
        device, low_high, levels = self.accelerator.device, self.recipe.timestep_range, self.recipe.timestep_levels
        totals = []
        with self.averaged(), autocast(self.accelerator):
            for start in range(0, len(latents), self.recipe.batch_size):
                part = slice(start, start + self.recipe.batch_size)
                generator = step_generator(torch.device("cpu"), self.recipe.seed, start, 11)
                x = latents[part].to(device)
                timesteps = stratified_timesteps(len(x), levels, generator, *low_high).to(device)
                noise = torch.randn((len(x), levels, *x.shape[1:]), generator=generator).to(device)
                given = [*self.prompts.split(embeds[part].to(device)), *(y[part].to(device) for y in own)]
                loss, each = self.module(x, timesteps, noise, *given)
                totals.append({"validation": loss} | {f"validation/{k}": v for k, v in each.items()})
        means = {key: float(torch.stack([t[key] for t in totals]).mean()) for key in totals[0]}
        self.monitor.write(self.step, means | {"timestep": float(whole(self.module.timestep.detach()))})

    def sample(self) -> None:
        """A picture of features: the student on clean pictures, the teacher on clean and on noised ones."""
        images, latents, embeds = self.validation
        images, (latents, *own), embeds = images[:6], [x[:6] for x in latents], embeds[:6]
        defaults = spec_of(self.recipe.model).arch.defaults
        name = defaults.map if defaults.map in self.module.maps else next(iter(self.module.maps))
        latents, prompts = latents.to(device := self.accelerator.device), self.prompts.split(embeds.to(device))
        noise = torch.randn(latents.shape, generator=step_generator(torch.device("cpu"), self.recipe.seed, 3))
        with self.averaged(), autocast(self.accelerator):
            maps = self.module.compare(
                latents, noise.to(device), int(defaults.timestep), *prompts, name, *(x.to(device) for x in own)
            )
        noisy = f"teacher, t = {defaults.timestep:.0f}"
        titles = f"student, {name}, step {self.step}", "teacher on clean pictures", noisy
        if self.accelerator.is_main_process:
            rows = {title: list(x) for title, x in zip(titles, maps)}
            self.monitor.picture(self.step, feature_sheet(images, rows))

    # --- keeping ---

    def settings(self) -> dict:
        """What a resumed run must agree in."""
        free = {"output_dir", "device", "resume", "stop_after", "push_to_hub", "cache_dir", "tensorboard", "report_to"}
        free |= {"checkpoint_every", "validate_every", "log_every", "sample_every", "keep_checkpoints", "save_dtype"}
        free |= {"gradient_checkpointing", "max_skipped_steps"}
        if not self.data.streamed:  # the order of shards depends on the workers
            free.add("num_workers")
        if self.recipe.final_rate == 1:  # the rate does not depend on the end
            free.add("max_steps")
        kept = {k: v for k, v in json.loads(json.dumps(vars(self.recipe), default=vars)).items() if k not in free}
        del kept["data"]["max_broken"]
        return kept | {"processes": self.accelerator.num_processes, "samples": len(self.data.pictures)}

    def save(self) -> None:
        """A checkpoint of whole tensors, written by the first process; a full disk is survived."""
        tensors = {f"model/{name}": tensor for name, tensor in trained_state(self.module).items()}
        if self.ema is not None:
            tensors |= self.ema.pack()
        tensors |= pack_optimizer(self.optimizer.optimizer, self.parameters)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            state = {"step": self.step, "broken": sorted(self.broken), "settings": self.settings(), "scaler": scaler}
            self.checkpoints.save(self.step, tensors, state)
        self.accelerator.wait_for_everyone()

    def _find(self) -> tuple[dict[str, Tensor], dict] | None:
        """The newest whole checkpoint; its weights are taken before an engine makes copies or shards of them."""
        found = self.checkpoints.load()
        self._agree(0 if found is None else found[1]["step"], "output_dir", self.out)
        if found is None:
            return None
        if self.recipe.resume == "never":
            raise FileTakenError(
                f"{self.checkpoints.folder} holds a run: use resume=auto to go on, or another output_dir"
            )
        tensors, state = found
        check_same_run(self.out, state["settings"], self.settings())
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        self.module.load_state_dict(model, strict=False)
        return found

    def _resume(self, found: tuple[dict[str, Tensor], dict]) -> None:
        tensors, state = found
        if self.ema is not None:
            self.ema.unpack(tensors)
        unpack_optimizer(self.optimizer.optimizer, self.parameters, tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.broken = state["step"], set(state["broken"])

    def export(self) -> None:
        """The native folder, written by the first process, and pushed if the recipe says so."""
        data = f"{len(self.data.pictures)} {'shards' if self.data.streamed else 'pictures'}, {self.size} px"
        before = training_data(self.recipe.teacher)
        if before and not (self.recipe.teacher_weights or self.recipe.student_weights):
            data += f"; before that on {before}"
        with self.averaged():
            state = student_state(self.module)
            if self.accelerator.is_main_process:
                adapters = lora_state(self.module.student) if self.recipe.lora.rank else None
                write_native(self.recipe, self.untrained | state, adapters, data)
                kept = sum(path.stat().st_size for path in map(self.checkpoints.path, self.checkpoints.steps()))
                self._print(footer(self.recipe, state, time.monotonic() - self.started, kept))


def distill(recipe: Recipe) -> int:
    """Trains a student and writes output_dir/native. Everything that can be wrong is found before anything is written.

    Returns:
        exit code: 0, or 128 + the number of the signal that stopped the run (its checkpoint is saved).

    Raises:
        FolderInUseError: another run is writing to output_dir.
    """
    remedy = "set gradient_checkpointing=true, or in a new output_dir a lower batch_size or lora.rank=64"
    first = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0
    check_folder(recipe.output_dir)
    with (
        resource_errors(f"{remedy}; checkpoints written so far are kept"),
        hold(recipe.output_dir) if first else nullcontext(),
    ):
        return Training(recipe).run()
