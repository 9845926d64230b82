"""DIFT, the noisy baseline (Tang et al. 2023, arXiv 2306.03881): the same parts under the same contract, fed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..utils.errors import InputError
from .architectures import Architecture
from .cleandift import CleanDIFT


@torch.library.custom_op("cleandift_backbones::seeded_noise", mutates_args=())
def seeded_noise(latents: Tensor, count: int, seed: int) -> Tensor:
    """count x C x h x w standard normal noise for latents B x C x h x w: a function of the shape and the seed alone.

    Drawn in float32 on the CPU, so that it is equal on every device, in every dtype and for every batch. An operator
    of its own, because torch.compile and torch.export cannot trace a generator.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *latents.shape[1:]), generator=generator)
    return noise.to(latents)


@seeded_noise.register_fake
def _(latents: Tensor, count: int, seed: int) -> Tensor:
    return latents.new_empty((count, *latents.shape[1:]))


def _integer(name: str, value: int, low: int, high: int) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value // 1
        or not low <= value <= high
    ):
        raise InputError(f"{name} must be an integer in {low}..{high}, got {value!r}")
    return int(value)


def _noise(steps: int, timestep: int, ensemble_size: int, noise_seed: int) -> tuple[int, int, int]:
    return (
        _integer("timestep", timestep, 0, steps - 1),
        _integer("ensemble_size", ensemble_size, 1, 2**20),
        _integer("noise_seed", noise_seed, 0, 2**63 - 1),
    )


class DIFT(CleanDIFT):
    """Maps of the untouched UNet on noised latents, averaged over an ensemble of noises.

    The image is encoded once; every image of a batch sees the same noises, so a map depends on nothing but its image,
    the timestep and the seed.

    Args:
        arch: its `schedule` says how noise is added.
        timestep: at which the noise is added, an integer 0..999; default: the architecture's.
        ensemble_size: number of noises averaged, at least 1; default: the architecture's. They run as one batch.
        noise_seed: seed of the noises.
        **kwargs: those of `CleanDIFT`.

    Raises:
        ValueError: timestep, ensemble_size or noise_seed out of range.
    """

    def __init__(
        self,
        arch: Architecture,
        timestep: int | None = None,
        ensemble_size: int | None = None,
        noise_seed: int = 0,
        **kwargs,
    ):
        if kwargs.get("projected_timestep") is not None:
            raise InputError(
                "projected_timestep is CleanDIFT's: a noisy model gives the features of its timestep itself"
            )
        timestep = arch.defaults.timestep if timestep is None else timestep
        ensemble_size = arch.defaults.ensemble_size if ensemble_size is None else ensemble_size
        noise = _noise(arch.schedule.steps, timestep, ensemble_size, noise_seed)
        super().__init__(arch, timestep=noise[0], **kwargs)
        self.set_noise(*noise)

    def set_noise(
        self, timestep: int | None = None, ensemble_size: int | None = None, noise_seed: int | None = None
    ) -> None:
        """Other noise from the next pass on: arguments as of the constructor, None leaves one as it is.

        Raises:
            ValueError: timestep, ensemble_size or noise_seed out of range.
        """
        timestep = self.timestep.item() if timestep is None else timestep
        ensemble_size = self.ensemble_size if ensemble_size is None else ensemble_size
        noise_seed = self.noise_seed if noise_seed is None else noise_seed
        schedule = self.arch.schedule
        step, self.ensemble_size, self.noise_seed = _noise(schedule.steps, timestep, ensemble_size, noise_seed)
        self.timestep = torch.tensor(float(step), dtype=torch.float32, device=self.timestep.device)
        self.signal, self.sigma = schedule.levels(step)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The noise level belongs to the timestep that was asked for: a checkpoint's own must not come between them.
        timestep = self.timestep.clone()  # loading copies in place
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.timestep = timestep

    def _denoiser_maps(
        self, latents: Tensor, conditions: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        count = self.ensemble_size
        noise = seeded_noise(latents.detach(), count, self.noise_seed)
        noisy = (self.signal * latents[:, None] + self.sigma * noise).flatten(0, 1)
        conditions = {
            name: one if one.shape[0] == 1 else one.repeat_interleave(count, dim=0) for name, one in conditions.items()
        }
        maps = self.denoiser(noisy, self.timestep, conditions, names)
        return {name: x.unflatten(0, (-1, count)).mean(dim=1) for name, x in maps.items()}
