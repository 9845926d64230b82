"""What training loops share: signals that end a run after a step, the rate's schedule, the weights' average."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..utils.errors import InputError
from .distributed import like, whole


class Signals:
    """Remembers SIGINT and SIGTERM, so that the loop ends after the current step; a second one takes effect at once."""

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

    @property
    def name(self) -> str:
        """SIGINT or SIGTERM; "" before any."""
        return signal.Signals(self.number).name if self.number else ""

    @property
    def exit_code(self) -> int:
        """What the command should end with: 0, or 128 + the number of the signal that stopped it."""
        return 128 + self.number if self.number else 0


def lr_factor(step: int, progress: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up over `warmup` steps times a cosine from 1 to `floor` over `progress` in [0, 1]."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return min(1.0, (step + 1) / max(warmup, 1)) * cosine


class EMA(EMAModel):
    """diffusers' exponential moving average of named parameters, with the numbers that earlier runs had.

    The decay after n updates is at most (1 + n) / (10 + n), in the first update too, where diffusers takes 0. A step is
    one `lerp`, which rounds differently where the decay is below a half.

    Raises:
        InputError: a decay outside [0, 1).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay}: give a number in [0, 1)")
        super().__init__(named.values(), decay)  # foreach copies know no shards of FSDP
        self.names, self.parameters = list(named), list(named.values())

    def get_decay(self, optimization_step: int) -> float:
        """The decay of update number `optimization_step`, from 1 on."""
        return min(self.decay, optimization_step / (9 + optimization_step))

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """See EMAModel."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """See EMAModel, whose copies lie on the CPU; these stay beside the parameters, as shards of FSDP must."""
        self.temp_stored_params = [parameter.detach().clone() for parameter in parameters]

    def update(self, count: int) -> None:
        """Takes the current parameters in; `count` is the number of updates before this one."""
        self.optimization_step = count
        self.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the averaged ones inside this context, and their own again after it."""
        if self.temp_stored_params is not None:  # inside such a context
            yield
            return
        self.store(self.parameters)
        try:
            self.copy_to(self.parameters)
            yield
        finally:
            self.restore(self.parameters)

    def pack(self) -> dict[str, Tensor]:
        """The average for a checkpoint, whole; every process must ask."""
        return {f"ema/{name}": whole(tensor) for name, tensor in zip(self.names, self.shadow_params)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `pack` gave, under this engine or another."""
        for name, tensor in zip(self.names, self.shadow_params):
            tensor.copy_(like(tensor, tensors[f"ema/{name}"]))
