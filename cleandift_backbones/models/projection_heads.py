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
from torch.autograd.function import once_differentiable

from ..utils.errors import InputError
from .precise_numbers import KeepsNumbers


def rms_factor(x: Tensor, eps: float = 1e-6) -> Tensor:
    """1 / rms(x) over the last dimension, in float32."""
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None, rms: bool) -> Tensor:
    """x / rms(x) * scale over the last dimension, computed in float32, if `rms`; else x * scale + shift."""
    if rms:
        return (x.float() * rms_factor(x) * scale.float()).to(x.dtype)
    return torch.addcmul(shift, x, scale)


class Norm(nn.Module):
    """What comes before a block's up-projection: `modulate` with a scale and a shift made from the condition."""

    rms = True

    def modulation(self, *condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, shift or None), both ... x 1 x C for a condition ... x D."""
        raise NotImplementedError

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        return modulate(x, *self.modulation(*condition), self.rms)


class RMSNorm(Norm):
    """RMS norm with a learned scale, and no condition. x: ... x C."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def modulation(self) -> tuple[Tensor, None]:
        return self.scale, None


class AdaRMSNorm(Norm):
    """RMS norm whose scale is 1 + linear(condition), zero at the start. x: ... x N x C, condition: ... x D."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(condition_width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def modulation(self, condition: Tensor) -> tuple[Tensor, None]:
        return 1 + self.linear(condition).unsqueeze(-2), None


class FiLM(Norm):
    """x * (1 + scale) + shift, without normalisation: the paper's main configuration."""

    rms = False

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(condition_width, 2 * width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.linear(condition).unsqueeze(-2).chunk(2, dim=-1)
        return 1 + scale, shift


CONDITIONINGS = {"film": FiLM, "adarms": AdaRMSNorm}


def _activate(y: Tensor, gated: bool) -> Tensor:
    """a * silu(g) of (a, g) = y, or silu(y)."""
    if not gated:
        return F.silu(y)
    a, g = y.chunk(2, dim=-1)
    return a * F.silu(g)


class _FusedBlock(torch.autograd.Function):
    """x + down(activate(up(modulate(x)))), keeping x and the up-projection's output for the backward pass.

    Autograd would keep twice as much, at every noise level and map; what it kept besides is elementwise and made again.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, up, down, rms: bool, gated: bool) -> Tensor:
        y = F.linear(modulate(x, scale, shift, rms), up)
        ctx.save_for_backward(x, scale, shift, up, down, y)
        ctx.rms, ctx.gated = rms, gated
        return x + F.linear(_activate(y, gated), down)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, up, down, y = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            narrow = grad.to(y.dtype)  # under autocast the products run in the forward pass's precision
            hidden, dy = narrow @ down.to(y.dtype), torch.empty_like(y)
            if ctx.gated:
                (a, g), (da, dg) = y.chunk(2, dim=-1), dy.chunk(2, dim=-1)
                gate = F.silu(g)
                torch.mul(hidden, gate, out=da)
                torch.ops.aten.silu_backward.grad_input(hidden.mul_(a), g, grad_input=dg)
                hidden = gate.mul_(a)
            else:
                torch.ops.aten.silu_backward.grad_input(hidden, y, grad_input=dy)
                hidden = F.silu(y)
            d_down = narrow.flatten(0, -2).T @ hidden.flatten(0, -2)
            z = modulate(x, scale, shift, ctx.rms).to(y.dtype)
            d_up = dy.flatten(0, -2).T @ z.flatten(0, -2)
            dz = dy @ up.to(y.dtype)
            d_shift = None if shift is None else dz.sum_to_size(shift.shape).to(shift.dtype)
            if ctx.rms:
                factor = rms_factor(x)
                unit, dz = x.float() * factor, dz.float()
                d_scale, du = dz * unit, dz * scale.float()
                dx = factor * (du - unit * (du * unit).mean(dim=-1, keepdim=True)) + grad
            else:
                d_scale, dx = dz * x, torch.addcmul(grad, dz, scale)
            d_scale = d_scale.sum_to_size(scale.shape).to(scale.dtype)
        dx = dx.sum_to_size(x.shape).to(x.dtype)
        return dx, d_scale, d_shift, d_up.to(up.dtype), d_down.to(down.dtype), None, None


class ResidualBlock(nn.Module):
    """Residual block: norm, SwiGLU (or SiLU) up-projection, zero-initialised down-projection."""

    def __init__(self, width: int, hidden: int, norm: Norm, gated: bool = True):
        super().__init__()
        self.norm = norm
        self.gated = gated
        self.up_proj = nn.Linear(width, hidden * (2 if gated else 1), bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compilers choose what to keep themselves
            weights = *self.norm.modulation(*condition), self.up_proj.weight, self.down_proj.weight
            return _FusedBlock.apply(x, *weights, self.norm.rms, self.gated)
        return x + self.down_proj(_activate(self.up_proj(self.norm(x, *condition)), self.gated))


class FourierFeatures(KeepsNumbers):
    """Random Fourier features of a number: B -> B x width; the frequencies are a buffer, kept with the weights."""

    numbers = ("weight",)

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x[:, None].float() * self.weight.T  # a matrix product would be 16 bit under autocast
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MappingNetwork(nn.Module):
    """RMSNorm, residual SwiGLU blocks, RMSNorm."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, RMSNorm(width)) for _ in range(depth))
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
            ResidualBlock(channels, channels, norm(channels, condition_width), gated) for _ in range(depth)
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
            raise InputError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}")
        self.time_emb = FourierFeatures(width)
        self.time_in_proj = nn.Linear(width, width, bias=False)
        self.mapping = MappingNetwork(width, hidden, mapping_depth)
        self.adapters = nn.ModuleDict({n: Head(c, width, depth, conditioning, gated) for n, c in channels.items()})

    def keep(self, names: Collection[str]) -> None:
        """Drops the heads of all other maps."""
        for name in set(self.adapters) - set(names):
            del self.adapters[name]

    def condition(self, timestep: Tensor) -> Tensor:
        """Condition of every norm for timesteps of any shape, 0..999: ... -> ... x width."""
        features = self.time_emb(timestep.flatten().float() / 999)
        condition = self.mapping(self.time_in_proj(features.to(self.time_in_proj.weight.dtype)))
        return condition.unflatten(0, timestep.shape)

    def forward(self, maps: Mapping[str, Tensor], timestep: Tensor) -> dict[str, Tensor]:
        """Projects maps B x C x h x w to timesteps B, or to I timesteps each, B x I: B * I x C x h x w (0..999)."""
        condition = self.condition(timestep)
        return {name: self.adapters[name](x, condition) for name, x in maps.items()}
