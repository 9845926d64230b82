"""Transparent pictures in, training pictures out: placement, colours and backgrounds, batched on any device."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..utils.errors import InputError

__all__ = ["Compositor", "compose_plain", "rgba_tensor"]

# What a background is made of and how often (white sheets come on top of these).
KINDS = {"plain": 0.25, "linear": 0.15, "radial": 0.15, "noise": 0.25, "stripes": 0.1, "checks": 0.1}
OCTAVES = 3
TEXTURE = 32  # side of the random grid that the noise backgrounds are read from

_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Compositor:
    """Random, seeded training pictures from RGBA ones: `Compositor()(rgba, generator)`.

    Each picture of a batch is placed (scale, rotation, translation, flip), its colours are varied, and it is laid over
    a background of its own: plain, linear or radial gradient, noise of several octaves, stripes, checks, or white.

    Args:
        scale: smallest and largest side of the picture, in parts of the canvas.
        degrees: largest rotation to either side, in degrees.
        shift: largest translation beyond the free room that a smaller picture leaves, in parts of the canvas.
        flip: probability of a horizontal flip.
        jitter: strength of the colour changes; 0 leaves the colours alone, 1 is the training setting.
        white: probability of a plain white background.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.6, 1.05),
        degrees: float = 12.0,
        shift: float = 0.04,
        flip: float = 0.5,
        jitter: float = 1.0,
        white: float = 0.25,
    ):
        if not 0 < scale[0] <= scale[1]:
            raise InputError(f"scale={scale}: give two positive numbers, the smaller first")
        self.scale, self.degrees, self.shift = scale, degrees, shift
        self.flip, self.jitter, self.white = flip, jitter, white

    def draw(
        self, batch: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """All random numbers for `batch` pictures; `generator` lives on `device`, equal seeds give equal pictures."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand((batch, *shape), device=device, generator=generator) * (high - low) + low

        scale = uniform(*self.scale)
        room = self.shift + 0.8 * (1 - scale).clamp(min=0) / 2
        first = uniform(0, 1, 3)
        contrast = uniform(0.15, 1, 1)  # from hardly visible textures to loud ones
        edges = torch.tensor(list(KINDS.values()), device=device).cumsum(0)[:-1]
        return {
            "scale": scale,
            "angle": uniform(-1, 1) * math.radians(self.degrees),
            "shift": uniform(-2, 2, 2) * room[:, None],  # canvas coordinates run from -1 to 1
            "flip": uniform(0, 1) < self.flip,
            "brightness": 1 + self.jitter * uniform(-0.2, 0.15),
            "contrast": 1 + self.jitter * uniform(-0.2, 0.2),
            "saturation": 1 + self.jitter * uniform(-0.3, 0.3),
            "hue": self.jitter * uniform(-0.03, 0.03) * 2 * math.pi,
            "white": uniform(0, 1) < self.white,
            "kind": torch.bucketize(uniform(0, 1), edges),
            "first": first,
            "second": torch.lerp(first, uniform(0, 1, 3), contrast),
            "direction": uniform(0, 2 * math.pi),
            "centre": uniform(-0.7, 0.7, 2),
            "radius": uniform(0.7, 1.8),
            "frequency": uniform(math.log(1.5), math.log(9)).exp(),
            "sharpness": uniform(math.log(0.8), math.log(20)).exp(),
            "stretch": uniform(-0.8, 0.8).exp(),
            "roughness": uniform(0.3, 0.8),
            "texture": uniform(-1, 1, 1, TEXTURE, TEXTURE),
        }

    def render(self, rgba: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """The pictures that `draws` describes: uint8 B x 4 x S x S -> float32 B x 3 x S x S in [-1, 1]."""
        check_rgba(rgba)
        placed = F.grid_sample(
            premultiply(_jitter(rgba, draws)),
            _placement(draws, rgba.shape[-1]),
            padding_mode="zeros",
            align_corners=False,
        )
        picture = placed[:, :3] + (1 - placed[:, 3:]) * _background(draws, rgba.shape[-1])
        return picture.clamp(0, 1) * 2 - 1

    def __call__(self, rgba: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 RGBA with straight alpha, B x 4 x S x S -> float32 B x 3 x S x S in [-1, 1] on the same device."""
        check_rgba(rgba)
        return self.render(rgba, self.draw(len(rgba), rgba.device, generator))


def check_rgba(rgba: Tensor) -> None:
    """Raises ValueError unless `rgba` is uint8, B x 4 x S x S."""
    if rgba.dtype != torch.uint8 or rgba.ndim != 4 or rgba.shape[1] != 4 or rgba.shape[2] != rgba.shape[3]:
        raise InputError(f"pictures must be uint8 B x 4 x S x S (RGBA), got {rgba.dtype} {tuple(rgba.shape)}")


def premultiply(rgba: Tensor) -> Tensor:
    """Colours times alpha, so that interpolation leaves out the colours of invisible pixels: B x 4 x S x S, [0, 1]."""
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def compose_plain(rgba: Tensor, color: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Pictures on one plain colour, for evaluation: uint8 B x 4 x S x S -> float32 B x 3 x S x S in [-1, 1].

    `color` is red, green, blue in [0, 1]; white by default. Raises ValueError for anything else.
    """
    check_rgba(rgba)
    if len(color) != 3 or not all(0 <= c <= 1 for c in color):
        raise InputError(f"color={color}: give red, green and blue in [0, 1]")
    picture = premultiply(rgba.float() / 255)
    background = torch.tensor(color, device=rgba.device, dtype=picture.dtype).view(1, 3, 1, 1)
    return (picture[:, :3] + (1 - picture[:, 3:]) * background) * 2 - 1


def _column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def _jitter(rgba: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue of the visible pixels: uint8 -> float RGBA in [0, 1], straight alpha."""
    picture = rgba.float() / 255
    rgb, alpha = picture[:, :3], picture[:, 3:]
    # Saturation scales the chroma plane of YIQ and hue turns it: one 3 x 3 matrix per picture.
    to_yiq = _RGB_TO_YIQ.to(rgb.device)
    cos, sin = draws["hue"].cos() * draws["saturation"], draws["hue"].sin() * draws["saturation"]
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(_RGB_TO_YIQ).to(rgb.device) @ turn @ to_yiq
    rgb = torch.einsum("bij,bjhw->bihw", matrix, rgb)
    mean = (rgb * alpha).sum((1, 2, 3), keepdim=True) / (3 * alpha.sum((1, 2, 3), keepdim=True)).clamp(min=1)
    rgb = (rgb - mean) * draws["contrast"].view(-1, 1, 1, 1) + mean
    return torch.cat([(rgb * draws["brightness"].view(-1, 1, 1, 1)).clamp(0, 1), alpha], 1)


def _placement(draws: dict[str, Tensor], size: int) -> Tensor:
    """Sampling grid B x S x S x 2: for every canvas pixel the place in the picture that it shows."""
    cos, sin = draws["angle"].cos() / draws["scale"], draws["angle"].sin() / draws["scale"]
    flip = torch.where(draws["flip"], -1.0, 1.0)
    linear = torch.stack([torch.stack([cos * flip, sin * flip], 1), torch.stack([-sin, cos], 1)], 1)
    offset = -(linear @ draws["shift"][..., None])
    return F.affine_grid(torch.cat([linear, offset], 2), (len(cos), 4, size, size), align_corners=False)


def _background(draws: dict[str, Tensor], size: int) -> Tensor:
    """B x 3 x S x S in [0, 1]: two colours blended by a field that depends on the picture's kind."""
    axis = (torch.arange(size, device=draws["first"].device) + 0.5) * (2 / size) - 1
    x, y = axis.view(1, 1, -1) - _column(draws["centre"][:, 0]), axis.view(1, -1, 1) - _column(draws["centre"][:, 1])
    cos, sin = _column(draws["direction"].cos()), _column(draws["direction"].sin())
    u, v = cos * x + sin * y, cos * y - sin * x
    stretch, sharpness = _column(draws["stretch"]), _column(draws["sharpness"])
    wave_u = (u * math.pi * _column(draws["frequency"])).sin()
    wave_v = (v * math.pi * _column(draws["frequency"])).sin()
    fields = {
        "plain": torch.zeros_like(u),
        "linear": (u * 0.6 + 0.5).clamp(0, 1),
        "radial": ((u.square() + (v * stretch).square()).sqrt() / _column(draws["radius"])).clamp(0, 1),
        "noise": _noise(u, v * stretch, draws),
        "stripes": (wave_u * sharpness).tanh() * 0.5 + 0.5,
        "checks": (wave_u * wave_v * sharpness).tanh() * 0.5 + 0.5,
    }
    field = torch.zeros_like(u)
    for index, kind in enumerate(KINDS):
        field = torch.where(_column(draws["kind"] == index), fields[kind], field)
    first, second = draws["first"][..., None, None], draws["second"][..., None, None]
    return torch.where(draws["white"].view(-1, 1, 1, 1), 1.0, torch.lerp(first, second, field[:, None]))


def _noise(u: Tensor, v: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Smooth noise of several octaves in [0, 1], B x S x S, read from one random grid at growing scales."""
    total, weight, weights = torch.zeros_like(u), torch.ones_like(_column(draws["roughness"])), 0
    zoom = _column(draws["frequency"]) / TEXTURE
    for octave in range(OCTAVES):
        # The offset keeps the octaves from reading the same cells around the centre.
        grid = torch.stack([u * zoom + 0.37 * octave, v * zoom - 0.23 * octave], -1)
        sampled = F.grid_sample(draws["texture"], grid, padding_mode="reflection", align_corners=True)[:, 0]
        total, weights = total + weight * sampled, weights + weight
        weight, zoom = weight * _column(draws["roughness"]), zoom * 2
    return (total / weights * _column(draws["sharpness"]).clamp(max=4) + 0.5).clamp(0, 1)


def rgba_tensor(image: Image.Image, size: int | None) -> Tensor:
    """An RGBA image as uint8 4 x H x W, resized to size x size unless `size` is None."""
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
