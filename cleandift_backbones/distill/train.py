"""The distillation's training loop, on Hugging Face Accelerate: from a recipe to a native folder."""

from __future__ import annotations

import json
import logging
import math
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from tqdm import tqdm

from .. import checkpoints, hub
from ..images import check_folder
from ..models import ARCHITECTURES
from ..noisy import DIFT
from .build import (
    Prompts,
    build_module,
    cache_latents,
    encode_batch,
    list_data,
    load_teacher,
    make_loader,
    parameter_groups,
    report_broken,
    trained_state,
    validation_batch,
)
from .checkpoint import Checkpoints, pack_optimizer, unpack_optimizer
from .lora import lora_state, merged_state
from .module import Distiller, stratified_timesteps
from .monitor import Monitor, feature_sheet
from .recipe import Recipe, save_recipe
from .trainer import EMA, lr_factor, mix_seed, step_generator

_logger = logging.getLogger(__name__)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """One process, or what `accelerate launch` started.

    Raises:
        ValueError: sharded training (FSDP, DeepSpeed), which the checkpoints do not know yet; no such device.
    """
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device must be auto, cpu or cuda, got {recipe.device!r}: choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device: use device=cpu")
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    precision = recipe.mixed_precision
    if precision == "auto":
        half = "no" if cpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = half
    # Accelerate keeps one state per process, and refuses a second run of another precision (in a notebook, say).
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in kinds:
        raise ValueError(f"{accelerator.distributed_type} is not supported: use one process or DDP (accelerate launch)")
    return accelerator


class Signals:
    """Remembers SIGINT and SIGTERM, so that the loop ends after the current step; a second one is obeyed at once."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> Signals:
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.handlers:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: object) -> None:
        self.number = number
        signal.signal(number, self.handlers[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Training:
    """One run. Reads from top to bottom: `run`, then what it calls."""

    def __init__(self, recipe: Recipe):
        check_folder(recipe.output_dir)
        self.recipe, self.out = recipe, Path(recipe.output_dir)
        self.accelerator = accelerator = make_accelerator(recipe)
        torch.set_float32_matmul_precision("high")
        if recipe.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        set_seed(mix_seed(recipe.seed, 1) % 2**32)
        side = timm.get_pretrained_cfg(recipe.model).input_size[-1]
        stride = 2 ** (len(ARCHITECTURES[recipe.model.split("_")[1]]["vae"]["block_out_channels"]) - 1)
        self.size = recipe.data.size or side
        if self.size % stride:
            raise ValueError(f"data.size={self.size} is no multiple of the latents' stride {stride}")
        self.data = list_data(recipe, self.size)
        self.source: DIFT = load_teacher(recipe)
        self.module: Distiller = build_module(recipe, self.source)
        device = accelerator.device
        self.prompts = Prompts(recipe.text, self.source.prompt_embeds.to(device), self.source.text_encoder)
        if recipe.cache_dir:
            cache_latents(recipe, self.data, self.source, self.prompts, accelerator)
            self.source.vae = None
        self.source.to(device, memory_format=torch.channels_last)
        self.module.to(device, memory_format=torch.channels_last)
        if accelerator.mixed_precision != "no":  # frozen: half of it is enough
            half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
            torch.nn.Module.to(self.module.teacher, half)  # diffusers' own warns of float32 modules that are not there
        self.validation = validation_batch(self.data, self.source, self.prompts, accelerator, recipe.batch_size)
        groups = parameter_groups(recipe, self.module)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=device.type == "cuda")
        self.peaks = [group["lr"] for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.ema = EMA({"distiller": self.module}, recipe.ema) if recipe.ema else None
        self.step, self.broken, self.skipped = 0, 0, 0
        self.checkpoints = Checkpoints(self.out / "checkpoints", recipe.keep_checkpoints)
        self._resume()
        self.wrapped, self.optimizer = accelerator.prepare(self.module, self.optimizer)

    # --- the loop ---

    def run(self) -> int:
        """Trains to the end, or until a signal; returns the exit code."""
        recipe, accelerator, main = self.recipe, self.accelerator, self.accelerator.is_main_process
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.out / "recipe.yaml")
        accelerator.wait_for_everyone()
        self.monitor = Monitor(self.out, self.step, recipe.tensorboard, main)
        batches = iter(make_loader(recipe, self.data, self.step * recipe.gradient_accumulation, accelerator))
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
        if self.step == recipe.max_steps and main:
            self.export()
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return 128 + signals.number if signals.number else 0

    def train_step(self, batches) -> None:
        """Gradients of `gradient_accumulation` batches and a step of the optimizer, or none if they are not finite."""
        recipe, accelerator = self.recipe, self.accelerator
        factor = lr_factor(self.step, self.step / recipe.max_steps, recipe.warmup_steps, recipe.final_rate)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        names, finite, count = [], True, recipe.gradient_accumulation
        for micro in range(count):
            latents, embeds, called, broken = encode_batch(next(batches), self.source, self.prompts, accelerator)
            names += called
            self._count_broken(broken)
            hold = nullcontext() if micro == count - 1 else accelerator.no_sync(self.wrapped)
            with hold:
                loss, each = self.wrapped(latents, *self._draw(latents, micro), *self.prompts.split(embeds))
                finite = finite and not self._any(not torch.isfinite(loss))
                if finite:
                    accelerator.backward(loss / count)
            self.monitor.track(len(latents), loss=loss, **{f"loss_map_{name}": value for name, value in each.items()})
        if finite:
            norm = accelerator.clip_grad_norm_(self.parameters, recipe.clip)
            finite = bool(torch.isfinite(norm)) or accelerator.scaler is not None  # a scaler skips by itself
        if finite:
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

    def _any(self, flag: object) -> bool:
        """Whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        total = self.accelerator.reduce(torch.tensor(float(bool(flag)), device=self.accelerator.device), "sum")
        return bool(total > 0)

    def _count_broken(self, broken: list[str]) -> None:
        self.broken += len(broken)
        report_broken(broken, self.broken, self.recipe.data.max_broken)

    def _skip(self, names: list[str]) -> None:
        self.skipped += 1
        _logger.warning(f"step {self.step} is skipped: its loss or gradient is not finite")
        if self.skipped >= self.recipe.max_skipped_steps:
            raise FloatingPointError(
                f"the loss was not finite in {self.skipped} steps in a row, up to step {self.step}. The last batch was "
                f"{', '.join(names)}. Lower learning_rate, or look at these pictures; the last checkpoint stands"
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
        """Loss on held-out pictures with fixed noise and timesteps, on the first process."""
        if not self.accelerator.is_main_process:
            return
        _, latents, embeds = self.validation
        device, low_high, levels = self.accelerator.device, self.recipe.timestep_range, self.recipe.timestep_levels
        totals = []
        with self.averaged(), self.accelerator.autocast():
            for start in range(0, len(latents), self.recipe.batch_size):
                part = slice(start, start + self.recipe.batch_size)
                generator = step_generator(torch.device("cpu"), self.recipe.seed, start, 11)
                x = latents[part].to(device)
                timesteps = stratified_timesteps(len(x), levels, generator, *low_high).to(device)
                noise = torch.randn((len(x), levels, *x.shape[1:]), generator=generator).to(device)
                loss, each = self.module(x, timesteps, noise, *self.prompts.split(embeds[part].to(device)))
                totals.append({"validation": loss} | {f"validation_map_{k}": v for k, v in each.items()})
        means = {key: float(torch.stack([t[key] for t in totals]).mean()) for key in totals[0]}
        self.monitor.write(self.step, timestep=float(self.module.timestep.detach()), **means)

    def sample(self) -> None:
        """A picture of features: the student on clean pictures, the teacher on clean and on noised ones."""
        if not self.accelerator.is_main_process:
            return
        images, latents, embeds = (x[:6] for x in self.validation)
        device, name = self.accelerator.device, "us6" if "us6" in self.module.maps else next(iter(self.module.maps))
        latents = latents.to(device)
        teacher, student = self.prompts.split(embeds.to(device))
        noise = torch.randn(latents.shape, generator=step_generator(torch.device("cpu"), self.recipe.seed, 3)).to(
            device
        )
        t = torch.full((len(latents),), 261, device=device)
        noisy = self.module.scheduler.add_noise(latents, noise, t)
        with self.averaged(), self.accelerator.autocast():
            rows = {
                f"student, {name}, step {self.step}": self.module.student(
                    latents, self.module.timestep, student, [name]
                ),
                "teacher on clean pictures": self.module.teacher(latents, t, teacher, [name]),
                "teacher, t = 261": self.module.teacher(noisy, t, teacher, [name]),
            }
        self.monitor.picture(self.step, feature_sheet(images, {k: list(v[name]) for k, v in rows.items()}))

    # --- keeping ---

    def settings(self) -> dict:
        """What a resumed run must agree in."""
        free = {
            "output_dir",
            "device",
            "num_workers",
            "resume",
            "stop_after",
            "push_to_hub",
            "cache_dir",
            "tensorboard",
        }
        free |= {"checkpoint_every", "validate_every", "log_every", "sample_every", "keep_checkpoints", "save_dtype"}
        kept = {k: v for k, v in json.loads(json.dumps(vars(self.recipe), default=vars)).items() if k not in free}
        return kept | {"processes": self.accelerator.num_processes, "samples": len(self.data.pictures)}

    def save(self) -> None:
        """A checkpoint, written by the first process; a full disk is survived."""
        if self.accelerator.is_main_process:
            tensors = {f"model/{name}": tensor for name, tensor in trained_state(self.module).items()}
            if self.ema is not None:
                tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.shadow.items()}
            packed, scalars = pack_optimizer(self.optimizer.optimizer)
            state = {"step": self.step, "broken": self.broken, "settings": self.settings(), "optimizer": scalars}
            self.checkpoints.save(self.step, tensors | packed, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = self.checkpoints.load()
        if found is None:
            return
        if self.recipe.resume == "never":
            raise FileExistsError(
                f"{self.checkpoints.folder} holds a run: use resume=auto to go on, or another output_dir"
            )
        tensors, state = found
        changed = {k: (v, self.settings().get(k)) for k, v in state["settings"].items() if self.settings().get(k) != v}
        if changed:
            told = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
            raise ValueError(f"{self.out} holds another run: {told}. Give the same recipe, or another output_dir")
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        self.module.load_state_dict(model, strict=False)
        if self.ema is not None:
            for name, shadow in self.ema.shadow.items():
                shadow.copy_(tensors[f"ema/{name}"])
        unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        self.step, self.broken = state["step"], state["broken"]

    def export(self) -> None:
        """The native folder: student, learned timestep, empty prompt, heads; card with the curve; or push it."""
        recipe = self.recipe
        with self.averaged():
            state = student_state(recipe, self.module)
            if recipe.lora.rank:
                checkpoints.save_native(lora_state(self.module.student), self.out / "lora.safetensors")
            learned = float(self.module.timestep.detach())
        folder = self.out / "native"
        card = hub.CardInfo(
            data=f"{len(self.data.pictures)} {'shards' if self.data.streamed else 'pictures'}, {self.size} px",
            recipe=json.loads(method(recipe)),
            results=final_losses(self.out / "log.jsonl"),
        )
        with torch.device("meta"):
            model = timm.create_model(recipe.model)
        dtype = getattr(torch, recipe.save_dtype)
        config = hub.timm_config(model)
        if self.module.heads is not None:
            config["model_args"]["heads"] = {k: v for k, v in vars(recipe.heads).items() if k != "weights"}
        metadata = {"model": recipe.model, "recipe": method(recipe)}
        checkpoints.save_folder(state, folder, config, hub.model_card(config, card), metadata, dtype)
        print(f"wrote {folder} after {self.step} steps; learned timestep {learned:.2f}")
        if recipe.push_to_hub:
            print(f"pushed to {hub.push_to_hub(folder, recipe.push_to_hub)}")


def student_state(recipe: Recipe, module: Distiller) -> dict[str, Tensor]:
    """The student as a native state dict, with the heads; what runs after its last map is the teacher's."""
    # A fresh teacher: the VAE may be gone, and the one in training may be in half precision.
    state = load_teacher(recipe).state_dict()
    unet = merged_state(module.student) if recipe.lora.rank else module.student.state_dict()
    state |= {f"unet.{name}": tensor.detach().cpu() for name, tensor in unet.items()}
    state["timestep"] = module.timestep.detach().cpu().float()
    if module.heads is not None:
        state |= {f"heads.{name}": tensor.detach().cpu() for name, tensor in module.heads.state_dict().items()}
    return state


def final_losses(log: Path) -> dict[str, str]:
    """First and last validation loss of a run's log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = [line["validation"] for line in lines if "validation" in line]
    return {"validation loss, before": f"{found[0]:.4f}", "validation loss, after": f"{found[-1]:.4f}"} if found else {}


def method(recipe: Recipe) -> str:
    """The recipe as JSON without what concerns one machine only: paths, device, workers."""
    fields = json.loads(json.dumps(vars(recipe), default=vars))
    for name in ("output_dir", "teacher_weights", "cache_dir", "device", "num_workers", "resume", "push_to_hub"):
        fields.pop(name)
    fields["data"] = {name: value for name, value in fields["data"].items() if name not in ("path", "heldout")}
    fields["heads"].pop("weights")
    return json.dumps(fields)


def distill(recipe: Recipe) -> int:
    """Trains a student and writes output_dir/native. Everything that can be wrong is found before anything is written.

    Returns:
        exit code: 0, or 128 + the number of the signal that stopped the run (its checkpoint is saved).
    """
    return Training(recipe).run()
