"""How noise is added at a timestep: the table of a DDPM schedule, or the line of flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..utils.errors import InputError

#: Stable Diffusion's schedule. The prediction type does not matter for adding noise.
STABLE_DIFFUSION = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@dataclass(frozen=True)
class Schedule:
    """noisy latents = signal * latents + sigma * noise.

    Attributes:
        kind: "ddpm": signal = sqrt(a), sigma = sqrt(1 - a) with a = `alphas_cumprod[timestep]` of diffusers'
            DDPMScheduler (Ho et al. 2020); "flow": signal = 1 - timestep / 1000, sigma = timestep / 1000 (rectified
            flow, Liu et al. 2022, as Stable Diffusion 3 and Flux use it).
        config: arguments of DDPMScheduler; unused by "flow".
    """

    kind: str = "ddpm"
    config: Mapping[str, Any] = field(default_factory=lambda: dict(STABLE_DIFFUSION))

    def __post_init__(self):
        if self.kind not in ("ddpm", "flow"):
            raise InputError(f"schedule {self.kind!r}: choose 'ddpm' or 'flow'")

    @property
    def steps(self) -> int:
        """Timesteps are 0..steps - 1."""
        return self.config["num_train_timesteps"] if self.kind == "ddpm" else 1000

    def levels(self, timestep: int) -> tuple[float, float]:
        """(signal, sigma) at a timestep."""
        if self.kind == "flow":
            return 1 - timestep / 1000, timestep / 1000
        alpha = _alphas(tuple(sorted(self.config.items())))[timestep]
        return alpha**0.5, (1 - alpha) ** 0.5

    def scheduler(self):
        """diffusers' DDPMScheduler, for training.

        Raises:
            InputError: a schedule of another kind.
        """
        from diffusers import DDPMScheduler

        if self.kind != "ddpm":
            raise InputError(f"training needs a DDPM schedule, and this one is {self.kind!r}")
        return DDPMScheduler(**self.config)


@lru_cache
def _alphas(config: tuple[tuple[str, Any], ...]) -> list[float]:
    import torch
    from diffusers import DDPMScheduler

    with torch.device("cpu"):  # a model laid out on the meta device still needs the schedule's numbers
        return DDPMScheduler(**dict(config)).alphas_cumprod.tolist()
