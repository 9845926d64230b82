"""Timestep-conditioned projection heads: they map a clean feature to what the noisy teacher gives at timestep t.

CleanDIFT, arXiv 2412.03439, section 4.2 and supplement. Key names follow the published checkpoints (`time_emb`,
`time_in_proj`, `mapping`, `adapters.<map>.layers.<i>.{norm.linear,up_proj,down_proj}`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * scale over the last dimension, computed in float32."""
    wide = x.float()
    factor = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * factor * scale.float()).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale is 1 + linear(condition), zero at the start. x: ... x N x C, condition: ... x D."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(condition_width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.linear(condition).unsqueeze(-2))


class FiLM(nn.Module):
    """x * (1 + scale) + shift, without normalisation: the paper's main configuration."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(condition_width, 2 * width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.linear(condition).unsqueeze(-2).chunk(2, dim=-1)
        return x * (1 + scale) + shift


CONDITIONINGS = {"film": FiLM, "adarms": AdaRMSNorm}


class FeedForward(nn.Module):
    """Residual block: norm, SwiGLU (or SiLU) up-projection, zero-initialised down-projection."""

    def __init__(self, width: int, hidden: int, norm: nn.Module, gated: bool = True):
        super().__init__()
        self.norm = norm
        self.gated = gated
        self.up_proj = nn.Linear(width, hidden * (2 if gated else 1), bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        y = self.up_proj(self.norm(x, *condition))
        if self.gated:
            y, gate = y.chunk(2, dim=-1)
            y = y * F.silu(gate)
        else:
            y = F.silu(y)
        return x + self.down_proj(y)


class FourierFeatures(nn.Module):
    """Random Fourier features of a number: B -> B x width; the frequencies are a buffer, kept with the weights."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x[:, None] @ self.weight.T
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MappingNetwork(nn.Module):
    """RMSNorm, residual SwiGLU blocks, RMSNorm."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(FeedForward(width, hidden, RMSNorm(width)) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class Head(nn.Module):
    """Stacked residual blocks on one map, B x C x h x w; the identity at the start.

    With a condition B x D it returns the same shape, with B x I x D, for I timesteps of each image, B * I x C x h x w.
    """

    def __init__(self, channels: int, condition_width: int, depth: int, conditioning: str, gated: bool):
        super().__init__()
        norm = CONDITIONINGS[conditioning]
        self.layers = nn.ModuleList(
            FeedForward(channels, channels, norm(channels, condition_width), gated) for _ in range(depth)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # Positions as rows: free where x is channels_last, and then so is the result.
        tokens = x.flatten(2).transpose(1, 2)
        if condition.ndim == 3:
            tokens = tokens[:, None]  # the first block's input is the same at all timesteps
        for layer in self.layers:
            tokens = layer(tokens, condition)
        if tokens.ndim == 4:
            tokens = tokens.expand(-1, condition.shape[1], -1, -1).flatten(0, 1)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class ProjectionHeads(nn.Module):
    """One head per map, all conditioned on the timestep through one mapping network.

    Args:
        channels: map name -> channels.
        depth: residual blocks per head (paper: 3; 0 means no heads: the identity).
        conditioning: "film" (the paper's main configuration) or "adarms" (the published weights).
        gated: SwiGLU if true, plain SiLU otherwise.
        width, hidden, mapping_depth: of the mapping network (256, 768, 2).

    Raises:
        ValueError: unknown conditioning.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        depth: int = 3,
        conditioning: str = "film",
        gated: bool = True,
        width: int = 256,
        hidden: int = 768,
        mapping_depth: int = 2,
    ):
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}")
        self.time_emb = FourierFeatures(width)
        self.time_in_proj = nn.Linear(width, width, bias=False)
        self.mapping = MappingNetwork(width, hidden, mapping_depth)
        self.adapters = nn.ModuleDict({n: Head(c, width, depth, conditioning, gated) for n, c in channels.items()})

    def keep(self, names: Collection[str]) -> None:
        """Drops the heads of all other maps."""
        for name in set(self.adapters) - set(names):
            del self.adapters[name]

    def forward(self, maps: Mapping[str, Tensor], timestep: Tensor) -> dict[str, Tensor]:
        """Projects maps B x C x h x w to timesteps B, or to I timesteps each, B x I: B * I x C x h x w (0..999)."""
        features = self.time_emb(timestep.flatten().float() / 999)
        condition = self.mapping(self.time_in_proj(features.to(self.time_in_proj.weight.dtype)))
        condition = condition.unflatten(0, timestep.shape)
        return {name: self.adapters[name](x, condition) for name, x in maps.items()}
