"""timm's feature_info of a model as one object: names, channels, strides, order of execution, defaults."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from timm.models._features import feature_take_indices

from ..utils.errors import InputError
from .architectures import Architecture, ModelSpec, spec_of
from .inputs import map_index
from .latent_maps import latent_maps, latent_stride


class FeatureInfo(list):
    """The maps that a model offers, as timm's list of dicts with name, num_chs, reduction and module.

    UNets: fine to coarse, index 0 = the finest, which is the reverse of the order of execution.

    Args:
        arch: of the model.
        pyramid: instead of all maps of the denoiser, one map per stride from 2 on (stages of the VAE, then the last map
            of each block), as segmentation_models_pytorch and detectors expect.
        latent_encoder: "default" or "tiny": whose stages these are.
    """

    def __init__(self, arch: Architecture, pyramid: bool = False, latent_encoder: str = "default"):
        self.arch, self.pyramid = arch, pyramid
        config, part = arch.encoder_config(latent_encoder), arch.denoiser.part
        #: the denoiser's maps, in the order of execution
        self.executed = arch.denoiser.maps()
        blocks = {info.name for info in self.executed if info.ends_block}
        stride = latent_stride(config)
        maps = [
            dict(name=m.name, num_chs=m.channels, reduction=m.stride * stride, module=f"{part}.{m.module}")
            for m in reversed(self.executed)
        ]
        if pyramid:
            stages = [{**info, "module": f"vae.{info['module']}"} for info in latent_maps(config)]
            maps = stages + [m for m in maps if m["name"] in blocks]
        super().__init__(maps)
        self._blocks = blocks

    @classmethod
    def of(cls, model: str | ModelSpec, latent_encoder: str = "default") -> FeatureInfo:
        """That of a registered model, by name with or without tag."""
        spec = spec_of(model) if isinstance(model, str) else model
        return cls(spec.arch, spec.pyramid, latent_encoder)

    def __reduce_ex__(self, protocol):  # a list's own would call __init__ with nothing
        return _restore, (list(self), self.__dict__.copy())

    @property
    def names(self) -> list[str]:
        return [info["name"] for info in self]

    def position(self, name: str) -> int:
        """Place of a denoiser's map in the order of execution; -1 for the VAE's stages, which run before."""
        return next((i for i, info in enumerate(self.executed) if info.name == name), -1)

    def take(self, indices: int | str | Sequence[int | str]) -> list[int]:
        """Absolute indices: an int n means the n coarsest, a sequence keeps its order.

        Args:
            indices: n, a map's name, or a sequence of indices and names, mixed as you like.

        Raises:
            InputError: out of range or unknown; names what there is.
        """
        try:
            if isinstance(indices, (int, np.integer)):
                plain: Any = operator.index(indices)
            else:
                items = [indices] if isinstance(indices, str) else list(indices)
                plain = [map_index(self.names, item) for item in items]
                if not items:
                    raise ValueError("no map is asked for")
                if None in plain:
                    raise ValueError(f"there is no map {items[plain.index(None)]!r}")
            return feature_take_indices(len(self), plain)[0]
        except (AssertionError, ValueError, TypeError) as error:  # out of range, none at all, not numbers
            listed = ", ".join(f"{i} = {name}" for i, name in enumerate(self.names))
            raise InputError(f"out_indices {indices!r}: {error}. This model has {listed}") from None

    def held(self, last_map: str | None) -> list[int]:
        """Indices of the maps of weights that are truncated after the map `last_map` (None: all).

        Raises:
            InputError: unknown map.
        """
        if last_map is None:
            return list(range(len(self)))
        if self.position(last_map) < 0:
            known = ", ".join(info.name for info in self.executed)
            raise InputError(f"unknown map held={last_map!r}: this network has {known}")
        return [i for i, name in enumerate(self.names) if self.position(name) <= self.position(last_map)]

    def default(self, last_map: str | None = None) -> tuple[int, ...]:
        """Indices that features_only gives where none are asked for; restricted to the maps up to `last_map`."""
        found, out = self.held(last_map), self.arch.defaults.out
        if not self.pyramid:
            wanted = set(out) if out else self._blocks
            return tuple([i for i in found if self[i]["name"] in wanted] or found)
        return tuple(found)

    def deepest(self, indices: Collection[int]) -> str:
        """Name of the denoiser's map among these that runs last.

        Raises:
            InputError: there is none, only stages of the VAE.
        """
        names = [self[i]["name"] for i in indices if self.position(self[i]["name"]) >= 0]
        if not names:
            raise InputError(f"features {list(indices)} are only maps of the VAE: ask for at least one map of the UNet")
        return max(names, key=self.position)


def _restore(items: list[Mapping], state: dict) -> FeatureInfo:
    info = FeatureInfo.__new__(FeatureInfo)
    list.extend(info, items)
    info.__dict__.update(state)
    return info
