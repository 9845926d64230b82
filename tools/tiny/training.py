"""The loop of the small model's trainings, on Accelerate: a schedule by steps or by the clock, and a checkpoint.

All randomness of a step comes from (seed, step), see `utils.seeding`: a resumed run sees the batches and the noise that
an uninterrupted one would have seen, and no generator's state is kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cleandift_backbones.distill.checkpoint import check_same_run, read_checkpoint, write_checkpoint
from cleandift_backbones.distill.distributed import pack_optimizer, start_accelerator, unpack_optimizer
from cleandift_backbones.distill.loop import EMA, Signals, lr_factor
from cleandift_backbones.distill.tracking import Monitor
from cleandift_backbones.features.extractor import resolve_device
from cleandift_backbones.optimization.cpu_malloc import keep_freed_memory
from cleandift_backbones.utils.errors import DivergedError, FileTakenError, InputError, file_errors
from cleandift_backbones.utils.progress import tqdm
from cleandift_backbones.utils.seeding import mix_seed

CHECKPOINT = "checkpoint.safetensors"
CLIP, LOG_STEPS, SAVE_SECONDS = 1.0, 50, 120
_STARTED = time.monotonic()  # --stop-minutes counts what a command spends on reading images, too


def start(options: argparse.Namespace) -> Accelerator:
    """The device of a run, its precision and its seed.

    The precision is bf16 on GPUs and on processors that multiply in it (AVX512_BF16, AMX); elsewhere it gains nothing.

    Raises:
        ModelError: the device is not there.
    """
    device = resolve_device(options.device)
    if device.index:  # Accelerate takes the current one
        torch.cuda.set_device(device)
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    torch.manual_seed(mix_seed(options.seed, 0))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    return start_accelerator(device.type == "cpu", "bf16" if device.type == "cuda" or fast else "no")


class Loop:
    """One training in a folder: a rate that follows the schedule, the weights' average, checkpoint, log, limits.

    The schedule follows the larger of step / max_steps and time / max_minutes; time counts over all resumes, so that a
    run of a fixed time ends with its rate annealed.

    Args:
        options: of `arguments.add_run_arguments`.
        accelerator: of `start`.
        modules: what is trained, by name; they are on the device.
        settings: numbers and strings in which a resumed run must agree with the checkpoint (batch size, seed, ...).
        weight_decay: of AdamW.

    Raises:
        InputError: the folder's checkpoint is of other settings. CheckpointError: it is damaged.
        FileTakenError: there is one, and --resume is never.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        modules: dict[str, nn.Module],
        settings: dict,
        weight_decay: float,
    ):
        if options.max_steps is None and options.max_minutes is None:
            raise InputError("give --max-steps or --max-minutes: a schedule needs an end")
        self.options, self.accelerator, self.modules, self.settings = options, accelerator, modules, settings
        self.out, self.step, self.spent, self.exit_code = Path(options.out), 0, 0.0, 0
        self.named = {f"{key}/{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
        fused = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            list(self.named.values()), options.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = EMA(self.named, options.ema)
        with file_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / CHECKPOINT).is_file():
            self._load(self.out / CHECKPOINT)
        self.monitor = Monitor(accelerator, self.out, self.step)
        self.began = time.monotonic()

    def minutes(self) -> float:
        """Minutes of training, over all resumes."""
        return (self.spent + time.monotonic() - self.began) / 60

    def progress(self) -> float:
        """How much of the schedule is used up; 1 at the end."""
        by_steps = self.step / self.options.max_steps if self.options.max_steps else 0.0
        by_time = self.minutes() / self.options.max_minutes if self.options.max_minutes else 0.0
        return max(by_steps, by_time)

    def log(self, **values: object) -> None:
        """A line of the log beside those of the loss."""
        self.monitor.write(self.step, {"minutes": self.minutes()} | values)

    def run(
        self,
        loss_of: Callable[[int], tuple[Tensor, int, dict[str, Tensor]]],
        reports: Sequence[tuple[int, Callable[[], object]]] = (),
    ) -> bool:
        """Trains to the end of the schedule, or to a limit of this command or a signal (`exit_code` is then 128 + it).

        Args:
            loss_of: step -> (loss, images of its batch, further scalars for the log).
            reports: (interval in steps, what is called then, after the step).

        Returns:
            whether the end was reached; otherwise the checkpoint holds all that is needed to go on.

        Raises:
            DivergedError: the loss is not finite.
        """
        options, self.began = self.options, time.monotonic()
        total, saved = options.max_steps, self.began
        with (
            Signals() as signals,
            tqdm(total=total, initial=self.step, desc=self.out.name, unit="step", mininterval=1) as bar,
        ):
            while self.progress() < 1:
                self._train_step(loss_of)
                bar.update()
                if self.step % LOG_STEPS == 0:
                    self._flush(bar)
                for interval, report in reports:
                    if self.step % interval == 0:
                        report()
                reason = self._reason_to_stop(signals)
                if reason or self.step % options.save_steps == 0 or time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if reason:
                    bar.write(f"stopped by {reason} after step {self.step}: --resume auto goes on from {self.out}")
                    self.exit_code = signals.exit_code
                    return False
            self._flush(bar)
            self.save()
        return True

    def _train_step(self, loss_of: Callable) -> None:
        factor = lr_factor(self.step, self.progress(), self.options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * factor
        with self.accelerator.accumulate():
            loss, images, values = loss_of(self.step)
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.named.values(), CLIP)
            self.optimizer.step()
        self.ema.update(self.step)
        self.monitor.track(images, loss=loss, grad_norm=norm, **values)
        self.step += 1

    def _reason_to_stop(self, signals: Signals) -> str:
        options, spent = self.options, (time.monotonic() - _STARTED) / 60
        reasons = [signals.name] if signals.name else []
        if options.stop_minutes and spent >= options.stop_minutes:
            reasons.append(f"its limit of {options.stop_minutes} minutes")
        if options.stop_after and self.step >= options.stop_after and self.progress() < 1:
            reasons.append(f"its limit of {options.stop_after} steps")
        return " and ".join(reasons)

    def _flush(self, bar: tqdm) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        means = self.monitor.flush(self.step, minutes=self.minutes(), lr=lr)
        bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise DivergedError(f"{broken} not finite before step {self.step}: lower --lr; the last checkpoint stands")

    def save(self) -> None:
        """Everything that a resumed run needs, in one file, written aside and renamed."""
        tensors = pack_optimizer(self.optimizer.optimizer, self.named) | self.ema.pack()
        tensors |= {
            f"model/{key}/{n}": t for key, module in self.modules.items() for n, t in module.state_dict().items()
        }
        state = {"step": self.step, "spent": 60 * self.minutes(), "settings": self.settings}
        write_checkpoint(self.out / CHECKPOINT, tensors, state)

    def _load(self, path: Path) -> None:
        if self.options.resume == "never":
            raise FileTakenError(f"{path} exists: use --resume auto to go on, or another --out")
        found = read_checkpoint(path)
        if found is None:
            raise InputError(f"{path} is no checkpoint of a training: give another --out, or move it away")
        tensors, state = found
        check_same_run(self.out, state["settings"], self.settings)
        for key, module in self.modules.items():
            prefix = f"model/{key}/"
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.ema.unpack(tensors)
        unpack_optimizer(self.optimizer.optimizer, self.named, tensors)
        self.step, self.spent = state["step"], state["spent"]
