"""Convolutions for graphs of torch.compile that hold for all image sizes, on a CPU in float32.

torch computes a single image's convolution with up to 20,480 input numbers by its own loops, and a larger one's by
oneDNN, whose outputs lie in another memory format (`use_mkldnn` in torch's Convolution.cpp). So each layer of a graph
holds for one side of that bound, and a model of sixty layers is compiled anew for many ranges of sizes. As steps that
the compiler does not look into, with outputs always in channels_last, layers hold for all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_one_graph = False


def in_one_graph(function: Callable, *arguments):
    """Calls it; while torch.compile traces this call, convolutions are steps as above."""
    global _one_graph
    _one_graph = True
    try:
        return function(*arguments)
    finally:
        _one_graph = False


def is_step(x: Tensor) -> bool:
    """Whether a convolution of x is a step of a graph for all sizes: others compile and export plain convolutions."""
    traced = _one_graph and torch.compiler.is_compiling()
    return traced and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1
) -> Tensor:
    """torch.nn.functional.conv2d, or such a step."""
    compute = convolution if is_step(x) else F.conv2d
    return compute(x, weight, bias, stride, padding, dilation, groups)


class AnySizeConv(nn.Conv2d):
    """A Conv2d for graphs that hold for all image sizes."""

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"


@torch.library.custom_op("cleandift_backbones::convolution", mutates_args=(), schema=_SCHEMA)
def convolution(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    """torch.nn.functional.conv2d with outputs in channels_last."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous(memory_format=torch.channels_last)


@convolution.register_fake
def _(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    height, width = ((side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in sides)
    return x.new_empty(x.shape[0], height, width, weight.shape[0]).permute(0, 3, 1, 2)
