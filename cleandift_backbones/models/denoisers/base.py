"""What every denoiser offers, whatever its family: named maps, and only as much network as they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .maps import MapInfo


class Denoiser(Protocol):
    """A network that gives maps in place of predicted noise. Tensor names are those of diffusers' own class."""

    infos: tuple[MapInfo, ...]  # all maps of the architecture, in the order of execution, held or not
    last_map: str  # the network is truncated after this map
    dropped_keys: frozenset[str]  # tensor names that diffusers' class has beyond
    grad_checkpointing: bool

    @classmethod
    def build(cls, config: Mapping, last_map: str | None = None) -> Denoiser:
        """With random weights, only as deep as `last_map`."""

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the maps that are held, in the order of execution."""

    def check_maps(self, maps: Collection[str]) -> None:
        """Raises InputError for maps that do not exist or are not held."""

    def truncate(self, last_map: str) -> Denoiser:
        """Drops, in place, what runs after a map."""

    def layer_groups(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of tensor names, shallow to deep, for layer-wise learning rates."""

    def __call__(
        self, latents: Tensor, timestep: Tensor | float, conditions: Mapping[str, Tensor], maps: Collection[str] | None
    ) -> dict[str, Tensor]:
        """Name -> B x channels x ceil(h / stride) x ceil(w / stride)."""
