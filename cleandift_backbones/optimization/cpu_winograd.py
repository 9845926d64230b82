"""3x3 convolutions in a quarter of the multiplications: Winograd's F(4x4, 3x3), for CPUs, in float32.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.3: a tile of 6 x 6
inputs gives 4 x 4 outputs, Y = A' [(G w G') * (B' d B)] A, with 36 products per channel pair in place of 144. Over all
tiles the 36 products are 36 matrix products, which is what a CPU does best. The same sums in another order: a layer
differs from the direct convolution by some 3e-6 of its output's norm. Weights take four times the memory.

In 16 bits it would be ten times as far off as the direct convolution, and traced it would be a loop without end: there
a layer computes the direct one, on the kernels that its transformed weights came from. In what `optimize` compiles it
is one step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_any_size_conv import convolve, is_step

_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
_B += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_G = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # times 24
_A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _rounds_products() -> bool:
    """Whether oneDNN may round float32's products on a CPU, as torch.set_float32_matmul_precision allows it."""
    own = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if own is None:
        return torch.get_float32_matmul_precision() != "highest"
    return own.fp32_precision in ("bf16", "tf32")


def _kernel(weight: Tensor) -> Tensor:
    """out x in x 3 x 3, from 36 x in x out: the convolution's own weight, to the last bits."""

    def back(u: Tensor) -> Tensor:  # a left inverse of G, in sums alone: no autocast or TF32 rounds it
        return torch.stack([4 * u[0], 3 * (u[2] - u[1]), u[5]]).transpose(0, 1)

    return back(back(weight.unflatten(0, (6, 6)))).permute(3, 2, 0, 1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """B x in x H x W -> B x out x H x W, in channels_last; directly where products would be rounded."""
    if _rounds_products():
        return F.conv2d(x, _kernel(weight), bias, padding=1)
    batch, channels, height, width = x.shape
    outs = len(bias)
    down, across = -(-height // 4), -(-width // 4)
    padded = x.new_empty(batch, 4 * down + 2, 4 * across + 2, channels)
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    for border in (padded[:, :1], padded[:, height + 1 :], padded[:, :, :1], padded[:, :, width + 1 :]):
        border.zero_()
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4)  # B x down x across x in x 6 x 6
    y = x.new_empty(batch, down, 4, across, 4, outs)
    # As many tiles at once as keep the products about square and their operands in the cache.
    step = max(1, max(64, channels // 2) // (batch * across))
    for start in range(0, down, step):
        part = tiles[:, start : start + step]
        rows = part.shape[1]
        part = part.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
        part = torch.bmm((into @ part).view(36, -1, channels), weight)
        part = (out_of @ part.view(36, -1)).view(4, 4, batch, rows, across, outs)
        torch.add(part.permute(2, 3, 0, 4, 1, 5), bias, out=y[:, start : start + step])
    y = y.view(batch, 4 * down, 4 * across, outs)[:, :height, :width]
    return y.contiguous().permute(0, 3, 1, 2)


_SCHEMA = "(Tensor x, Tensor weight, Tensor bias, Tensor into, Tensor out_of) -> Tensor"


@torch.library.custom_op("cleandift_backbones::winograd", mutates_args=(), schema=_SCHEMA)
def winograd(x: Tensor, weight: Tensor, bias: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """The same as a step of a graph, which is in channels_last always."""
    return _convolve(x, weight, bias, into, out_of).contiguous(memory_format=torch.channels_last)


@winograd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, len(bias)).permute(0, 3, 1, 2)


class WinogradConv(nn.Module):
    """Stands in for a `Conv2d` with 3 x 3 kernels, stride 1 and padding 1; its weight is 36 x in x out.

    Quick where there are many channels (128 and more) and many tiles; tensors in channels_last need no reordering.
    Moved to another dtype or device than float32 on a CPU it is a plain convolution from there on, by its own weight.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        weight = conv.weight.double()
        g = torch.tensor(_G, dtype=torch.float64, device=weight.device) / 24
        transformed = torch.einsum("ia,ocab,jb->ijco", g, weight, g).reshape(36, self.in_channels, self.out_channels)
        self.weight = nn.Parameter(transformed.to(conv.weight.dtype), requires_grad=False)
        self.bias = conv.bias
        b, a = (torch.tensor(rows, dtype=conv.weight.dtype, device=weight.device) for rows in (_B, _A))
        self.register_buffer("into", torch.kron(b, b), persistent=False)  # 36 x 36, of the inputs of a tile
        self.register_buffer("out_of", torch.kron(a, a), persistent=False)  # 16 x 36, to its outputs

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        return (
            type(conv) is nn.Conv2d
            and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
            and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
            and conv.bias is not None
        )

    def kernel(self) -> Tensor:
        """out x in x 3 x 3: the convolution's own weight, to the last bits."""
        return self.weight if self.weight.ndim == 4 else _kernel(self.weight)

    def _apply(self, fn, recurse=True):
        moved = fn(self.bias)
        if self.weight.ndim == 3 and (moved.dtype, moved.device.type) != (torch.float32, "cpu"):
            kernel = self.kernel().detach().contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(kernel, requires_grad=False)
            self.into = self.out_of = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """B x in x H x W -> B x out x H x W, in channels_last."""
        if self.weight.ndim == 4:
            return convolve(x, self.weight, self.bias, padding=(1, 1))
        step, traced = is_step(x), torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_autocast_enabled("cpu") or (traced and not step):
            return F.conv2d(x, self.kernel(), self.bias, padding=1)
        return (winograd if step else _convolve)(x, self.weight, self.bias, self.into, self.out_of)
