"""The maps that a denoiser's config gives, in the order of execution. Builds nothing, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class MapInfo(NamedTuple):
    """Where a map is read and what it looks like: `stride` is relative to the latents."""

    name: str
    channels: int
    stride: int
    module: str

    @property
    def ends_block(self) -> bool:
        """Whether it is the last map of its block: what the paper evaluates, and what pyramids are made of."""
        return self.module.endswith(("upsamplers.0", "mid_block"))


def unet_maps(config: Mapping) -> tuple[MapInfo, ...]:
    """The maps of a UNet2DConditionModel config (needs `block_out_channels`), in execution order.

    Works for any number of levels: L levels of n + 1 layers give 2 + (L - 1) * (n + 1) maps (SD: 11).
    """
    widths = list(config["block_out_channels"])
    layers = config.get("layers_per_block", 2) + 1
    levels = len(widths)
    infos = [MapInfo("mid", widths[-1], 2 ** (levels - 1), "mid_block")]
    for i, width in enumerate(reversed(widths)):
        stride = 2 ** (levels - 1 - i)
        kind = "attentions" if config["up_block_types"][i].startswith("CrossAttn") else "resnets"
        last_block = i == levels - 1
        for j in range(1 if last_block else layers - 1):
            infos.append(MapInfo(f"us{len(infos)}", width, stride, f"up_blocks.{i}.{kind}.{j}"))
        if not last_block:
            infos.append(MapInfo(f"us{len(infos)}", width, stride // 2, f"up_blocks.{i}.upsamplers.0"))
    return tuple(infos)
