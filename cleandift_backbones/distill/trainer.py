"""Plumbing that every training script shares: schedule, EMA, checkpoints, signals.

A script reads as

    run = Run(out, {"unet": unet}, optimizer, settings=settings, ...)
    with run:
        for step in run:
            run.update(loss_of(step))
            run.track(images=batch, loss=loss)

All randomness of a step comes from `(seed, step)` (see `utils.seeding`), so a resumed run sees
the batches and the noise that an uninterrupted one would have seen, and no generator's state has to be kept.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.save import write_file
from ..optimization.cpu_malloc import keep_freed_memory
from ..utils.atomic import open_tensors, replacing
from ..utils.errors import DivergedError, FileTakenError, InputError, file_errors
from ..utils.progress import tqdm
from .distributed import pack_optimizer, unpack_optimizer
from .log import JsonLog

__all__ = [
    "EMA",
    "Run",
    "autocast",
    "lr_factor",
    "pick_device",
]

_STARTED = time.monotonic()  # a command's own time limit counts what it spends on reading pictures, too
CHECKPOINT = "checkpoint.safetensors"


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that torch cannot use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but torch sees no CUDA device: use --device cpu")
    return device


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, and on processors that multiply in it (AVX512_BF16, AMX); off elsewhere, where it gains nothing."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or fast)


def lr_factor(step: int, progress: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up over `warmup` steps times a cosine from 1 to `floor` over `progress` in [0, 1]."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return min(1.0, (step + 1) / max(warmup, 1)) * cosine


class EMA:
    """Exponential moving average of the trained parameters of several modules, kept in fp32.

    The decay grows as (1 + n) / (10 + n) with the number n of updates up to `decay`, so that the start is forgotten.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay}: give a number in [0, 1)")
        self.decay = decay
        named = ((f"{k}/{n}", p) for k, m in modules.items() for n, p in m.named_parameters())
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Takes the current parameters in; `count` is the number of updates before this one."""
        decay = min(self.decay, (1 + count) / (10 + count))
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the averaged parameters inside this context, and their own again after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.shadow)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(source[name])


class Run:
    """One training run in a folder: counts steps, sets the rate, keeps the EMA, saves, resumes, logs and stops in time.

    Iterate over it for the step numbers. The schedule follows the larger of step / max_steps and time / max_minutes;
    time counts over all resumes, so that a run of a fixed time ends annealed. `finished` tells whether the end was
    reached; otherwise (time limit of this command, SIGTERM, Ctrl-C) the checkpoint holds all that is needed to go on.

    Args:
        out: folder for checkpoint.safetensors and log.jsonl; created.
        modules: what is trained, by name.
        optimizer: over parameters of `modules`; its groups' rates are the peak rates.
        settings: numbers and strings in which a resumed run must agree with the checkpoint (batch size, seed, ...).
        max_steps, max_minutes: the end of the schedule; at least one.
        stop_minutes, stop_steps: save and stop this command after so long, from its start, or after so many steps.
        resume: "auto" goes on from the folder's checkpoint if there is one; "never" refuses a folder that has one.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        settings: dict,
        max_steps: int | None = None,
        max_minutes: float | None = None,
        stop_minutes: float | None = None,
        stop_steps: int | None = None,
        warmup: int = 200,
        floor: float = 0.05,
        ema_decay: float = 0.999,
        clip: float = 1.0,
        save_steps: int = 1000,
        save_minutes: float = 2.0,
        log_steps: int = 50,
        resume: str = "auto",
    ):
        if max_steps is None and max_minutes is None:
            raise InputError("give max_steps or max_minutes: a run needs an end")
        limits = dict(max_steps=max_steps, max_minutes=max_minutes, stop_minutes=stop_minutes, stop_steps=stop_steps)
        for name, value in limits.items():
            if value is not None and not value > 0:
                raise InputError(f"{name}={value} must be above 0")
        self.out, self.modules, self.optimizer, self.settings = Path(out), modules, optimizer, settings
        self.max_steps, self.max_minutes = max_steps, max_minutes
        self.stop_minutes, self.stop_steps = stop_minutes, stop_steps
        self.warmup, self.floor, self.clip = warmup, floor, clip
        self.save_steps, self.save_minutes, self.log_steps = save_steps, save_minutes, log_steps
        self.ema = EMA(modules, ema_decay)
        self.step, self.spent, self.finished = 0, 0.0, False
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self._sums: dict[str, Tensor] = {}
        self._tracked, self._images, self._signal = 0, 0, 0
        with file_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / CHECKPOINT
        if path.is_file():
            if resume != "auto":
                raise FileTakenError(f"{path} exists: use --resume auto to go on, or another --out")
            self._load(path)
        self.log = JsonLog(self.out / "log.jsonl", self.step)
        self._began = self._saved = self._flushed = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training, over all resumes."""
        return self.spent + time.monotonic() - self._began

    def progress(self) -> float:
        """How much of the schedule is used up; 1 at the end."""
        by_steps = self.step / self.max_steps if self.max_steps else 0.0
        by_time = self.elapsed() / (60 * self.max_minutes) if self.max_minutes else 0.0
        return max(by_steps, by_time)

    def __enter__(self) -> Run:
        """From here on SIGTERM and Ctrl-C end the loop after the current step with a checkpoint; a second is obeyed."""
        keep_freed_memory()

        def remember(number: int, _frame: object) -> None:
            self._signal = number
            signal.signal(number, self._handlers[number])

        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._handlers:
            signal.signal(number, remember)
        self._began = self._saved = self._flushed = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __iter__(self) -> Iterator[int]:
        with tqdm(total=self.max_steps, initial=self.step, desc=self.out.name, unit="step", mininterval=1) as self.bar:
            while self.progress() < 1:
                factor = lr_factor(self.step, self.progress(), self.warmup, self.floor)
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * factor
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step % self.log_steps == 0:
                    self.flush()
                spent = (time.monotonic() - _STARTED) / 60
                reasons = [signal.Signals(self._signal).name] if self._signal else []
                if self.stop_minutes and spent >= self.stop_minutes:
                    reasons.append(f"its limit of {self.stop_minutes} minutes")
                if self.stop_steps and self.step >= self.stop_steps and self.progress() < 1:
                    reasons.append(f"its limit of {self.stop_steps} steps")
                if reasons:
                    self.save()
                    reason = " and ".join(reasons)
                    self.bar.write(f"stopped by {reason} after step {self.step}: --resume auto goes on from {self.out}")
                    return
                late = time.monotonic() - self._saved > 60 * self.save_minutes
                if late or self.step % self.save_steps == 0:
                    self.save()
        self.flush()
        self.save()
        self.finished = True

    @property
    def exit_code(self) -> int:
        """What the script should end with: 0, or 128 + the number of the signal that stopped it."""
        return 128 + self._signal if self._signal else 0

    def update(self, loss: Tensor) -> None:
        """Gradient, clipping, optimizer step, EMA."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.ema.update(self.step)
        self._add("grad_norm", norm)

    def track(self, images: int, **values: Tensor) -> None:
        """Adds one step's scalars to the means that the next log line reports; nothing waits for the device here."""
        for name, value in values.items():
            self._add(name, value)
        self._tracked, self._images = self._tracked + 1, self._images + images

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def flush(self) -> None:
        """Writes a log line with the means since the last one. Raises FloatingPointError if one is not finite."""
        if not self._tracked:
            return
        means = {name: float(total) / self._tracked for name, total in self._sums.items()}
        now = time.monotonic()
        rate = self._images / max(now - self._flushed, 1e-9)
        self._sums, self._tracked, self._images, self._flushed = {}, 0, 0, now
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write(step=self.step, minutes=self.elapsed() / 60, lr=float(f"{lr:.4g}"), images_per_s=rate, **means)
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()} | {"img/s": f"{rate:.0f}"}, refresh=False)
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise DivergedError(f"{broken} not finite before step {self.step}: lower --lr; the last checkpoint stands")

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{k}/{n}": p for k, m in self.modules.items() for n, p in m.named_parameters()}

    def save(self) -> None:
        """Everything that a resumed run needs, in one file, written aside and renamed."""
        tensors = pack_optimizer(self.optimizer, self._named())
        tensors |= {f"model/{k}/{n}": t for k, m in self.modules.items() for n, t in m.state_dict().items()}
        tensors |= {f"ema/{name}": t for name, t in self.ema.shadow.items()}
        state = {"step": self.step, "spent": self.elapsed(), "settings": self.settings}
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        with replacing(self.out / CHECKPOINT) as aside:
            write_file(tensors, aside, {"state": json.dumps(state)})
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        with open_tensors(path) as file:
            if "state" not in (file.metadata() or {}):
                raise InputError(f"{path} is no checkpoint of this tool. Give another --out, or move it away")
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        changed = {k: (v, self.settings.get(k)) for k, v in state["settings"].items() if self.settings.get(k) != v}
        if changed:
            told = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
            raise InputError(f"{path} belongs to another run: {told}. Give the same options, or another --out")
        for key, module in self.modules.items():
            prefix = f"model/{key}/"
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, shadow in self.ema.shadow.items():
            shadow.copy_(tensors[f"ema/{name}"])
        unpack_optimizer(self.optimizer, self._named(), tensors)
        self.step, self.spent = state["step"], state["spent"]
