"""Pictures of features, drawn with Pillow alone: points, heat maps, PCA colours, grids of labelled panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

POINT_COLOURS = ("#e11d48", "#2563eb", "#f59e0b", "#16a34a", "#9333ea", "#0891b2", "#ea580c", "#be185d")
INK, FAINT, PAPER = "#18181b", "#71717a", "#ffffff"
_SCALE = 2  # figures are drawn this much larger and shrunk at the end, for smooth circles
# anchors of a perceptual blue-green-yellow-red map (turbo), evenly spaced over 0..1
_HEAT = np.array(
    [(48, 18, 59), (70, 107, 227), (40, 187, 236), (49, 242, 153), (162, 252, 60), (237, 208, 58), (251, 128, 34),
     (210, 49, 5), (122, 4, 3)], float
)  # fmt: skip


@dataclass
class Mark:
    """A numbered point on a panel: x and y as fractions of the panel, a number (None for a plain ring), a colour."""

    x: float
    y: float
    number: int | None
    colour: str


@dataclass
class Panel:
    """A picture with marks and a caption above it."""

    image: Image.Image
    caption: str = ""
    marks: Sequence[Mark] = ()


def squared(panel: Panel) -> Panel:
    """The middle square of a panel, with those of its marks that lie in it."""
    width, height = panel.image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    moved = [replace(mark, x=(mark.x * width - left) / side, y=(mark.y * height - top) / side) for mark in panel.marks]
    marks = [mark for mark in moved if 0 <= mark.x <= 1 and 0 <= mark.y <= 1]
    return replace(panel, image=panel.image.crop((left, top, left + side, top + side)), marks=marks)


def mark_points(points: torch.Tensor, size: tuple[int, int], numbers: Sequence[int] | None = None) -> list[Mark]:
    """Marks for points P x 2 (x, y in pixels, whole numbers are pixel centres) of a picture of size (height, width)."""
    numbers = range(1, len(points) + 1) if numbers is None else numbers
    fractions = (points + 0.5) / torch.tensor([size[1], size[0]])
    return [
        Mark(*map(float, xy), n, POINT_COLOURS[(n - 1) % len(POINT_COLOURS)])
        for xy, n in zip(fractions.tolist(), numbers, strict=True)
    ]


def heat_colours(heat: torch.Tensor) -> Image.Image:
    """A heat map (H x W, 0..1) as an RGBA picture to lay over another, which shows through where the heat is low."""
    heat = heat.float().cpu().numpy()
    position = np.clip(heat, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    part = (position - low)[..., None]
    colours = _HEAT[low] * (1 - part) + _HEAT[low + 1] * part
    pixels = np.concatenate([colours, 255 * (0.25 + 0.6 * heat[..., None])], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


def faded(image: Image.Image) -> Image.Image:
    """A picture in pale grey, as a ground for colours."""
    grey = np.asarray(image.convert("L"), float)[..., None] * 0.6 + 255 * 0.4
    return Image.fromarray(np.repeat(grey.round().astype(np.uint8), 3, 2))


def heat_overlay(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """A heat map (H x W, 0..1) in colours over the greyed picture."""
    heat = F.interpolate(heat[None, None].float().cpu(), (image.height, image.width), mode="bilinear")[0, 0]
    ground = faded(image).convert("RGBA")
    return Image.alpha_composite(ground, heat_colours(heat)).convert("RGB")


def heat_panel(image: Image.Image, heat: torch.Tensor, mark: Mark, caption: str = "") -> Panel:
    """A heat map over its picture, with a ring where it is found."""
    return Panel(heat_overlay(image, heat), caption, [replace(mark, number=None)])


def smooth(small: Image.Image, like: Image.Image, longer: int = 512) -> Image.Image:
    """A map's few pixels stretched over the shape of a picture."""
    side = longer / max(like.size)
    size = (max(1, round(like.width * side)), max(1, round(like.height * side)))
    return small.resize(size, Image.Resampling.BICUBIC)


def principal_colours(
    maps: Sequence[torch.Tensor], like: Sequence[torch.Tensor] | None = None
) -> tuple[list[Image.Image], list[torch.Tensor]]:
    """The three strongest directions of some maps as red, green and blue, in one basis for all of them.

    Args:
        maps: C x h x w each.
        like: second return of an earlier call on the same pictures: colours are rotated to agree with it.

    Returns:
        Images of h x w pixels, and the whitened coordinates h x w x 3 per map.
    """
    vectors = torch.cat([F.normalize(m.detach().float().cpu().flatten(1).T, dim=1) for m in maps])
    vectors = vectors - vectors.mean(0)
    count = min(3, vectors.shape[1])
    directions = torch.linalg.eigh(vectors.T @ vectors)[1].flip(1)[:, :count]
    sign = torch.gather(directions, 0, directions.abs().argmax(0, keepdim=True)).sign()  # an eigenvector's is arbitrary
    coordinates = F.pad(vectors @ (directions * sign), (0, 3 - count))
    coordinates = coordinates / coordinates.std(0).clamp_min(1e-6)
    if like is not None:
        sizes = [m.shape[-2:] for m in maps]
        wanted = torch.cat([_resized(c, size).flatten(0, 1) for c, size in zip(like, sizes, strict=True)])
        u, _, v = torch.linalg.svd(coordinates.T @ wanted)
        coordinates = coordinates @ (u @ v)
    sizes = [m.shape[-2:] for m in maps]
    spread = [c.view(h, w, 3) for c, (h, w) in zip(coordinates.split([h * w for h, w in sizes]), sizes, strict=True)]
    return coordinate_colours(spread), spread


def coordinate_colours(coordinates: Sequence[torch.Tensor]) -> list[Image.Image]:
    """Coordinates h x w x 3 as colours, on one scale for all of them: images of h x w pixels."""
    together = torch.cat([c.flatten(0, 1) for c in coordinates])
    low, high = (torch.quantile(together, q, dim=0) for q in (0.02, 0.98))
    scaled = [((c - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for c in coordinates]
    return [Image.fromarray((c * 255).round().byte().numpy()) for c in scaled]


def _resized(coordinates: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    moved = coordinates.permute(2, 0, 1)[None]
    return F.interpolate(moved, tuple(size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no font needs to be installed."""
    return ImageFont.load_default(size)


def _fitted(text: str, width: float, size: int) -> tuple[str, ImageFont.ImageFont]:
    """A text and a font in which it fits a width: smaller first, then shortened."""
    for smaller in range(size, max(size - 8, 1), -1):
        if font(smaller).getlength(text) <= width:
            return text, font(smaller)
    while len(text) > 1 and font(smaller).getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", font(smaller)


def _draw_panel(canvas: Image.Image, panel: Panel, box: tuple[int, int, int, int]) -> None:
    """Picture into box (left, top, width, height), with a hairline around it and its marks."""
    left, top, width, height = box
    draw = ImageDraw.Draw(canvas)
    canvas.paste(panel.image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
    draw.rectangle((left, top, left + width - 1, top + height - 1), outline="#d4d4d8", width=_SCALE)
    radius = round(height * 0.036 + 3 * _SCALE)
    for mark in panel.marks:
        x, y = left + mark.x * width, top + mark.y * height
        circle = (x - radius, y - radius, x + radius, y + radius)
        if mark.number is None:
            draw.ellipse([c + d for c, d in zip(circle, (-2, -2, 2, 2), strict=True)], outline=INK, width=5 * _SCALE)
            draw.ellipse(circle, outline=PAPER, width=3 * _SCALE)
        else:
            draw.ellipse(circle, fill=mark.colour, outline=PAPER, width=round(1.5 * _SCALE))
            draw.text((x, y), str(mark.number), fill=PAPER, font=font(round(radius * 1.25)), anchor="mm")


def grid(
    rows: Sequence[Sequence[Panel | None]],
    title: str = "",
    labels: Sequence[str] = (),
    height: int = 220,
    note: str = "",
) -> Image.Image:
    """Rows of panels of one height as one figure; widths follow the pictures, columns are as wide as their widest.

    Args:
        rows: panels, left to right; None leaves a gap.
        title, note: lines above and below.
        labels: a line of text above each row.
        height: of each picture, in pixels of the finished figure.
    """
    s, side = _SCALE, height * _SCALE
    margin, gap, caption, line = 20 * s, 12 * s, 20 * s, 26 * s
    columns = max(len(row) for row in rows)
    aspect = [
        max((row[c].image.width / row[c].image.height for row in rows if c < len(row) and row[c]), default=1)
        for c in range(columns)
    ]
    widths = [round(side * min(a, 2)) for a in aspect]
    captioned = [caption if any(p and p.caption for p in row) else 0 for row in rows]
    labelled = [line if i < len(labels) and labels[i] else 0 for i in range(len(rows))]
    top = margin + (36 * s if title else 0)
    total = (
        top + sum(captioned) + sum(labelled) + len(rows) * side + (len(rows) - 1) * gap + margin + (line if note else 0)
    )
    canvas = Image.new("RGB", (2 * margin + sum(widths) + (columns - 1) * gap, total), PAPER)
    draw = ImageDraw.Draw(canvas)
    room = canvas.width - 2 * margin
    if title:
        text, face = _fitted(title, room, 19 * s)
        draw.text((margin, margin + 10 * s), text, fill=INK, font=face, anchor="lm")
    y = top
    for row, has_caption, has_label, i in zip(rows, captioned, labelled, range(len(rows)), strict=True):
        if has_label:
            text, face = _fitted(labels[i], room, 14 * s)
            draw.text((margin, y + has_label // 2), text, fill=INK, font=face, anchor="lm")
            y += has_label
        x = margin
        for panel, width in zip(row, widths, strict=False):
            if panel:
                text, face = _fitted(panel.caption, width, 13 * s)
                draw.text((x, y + has_caption // 2), text, fill=FAINT, font=face, anchor="lm")
                w = min(width, round(side * panel.image.width / panel.image.height))
                h = min(side, round(w * panel.image.height / panel.image.width))
                _draw_panel(canvas, panel, (x + (width - w) // 2, y + has_caption + (side - h) // 2, w, h))
            x += width + gap
        y += has_caption + side + gap
    if note:
        text, face = _fitted(note, room, 12 * s)
        draw.text((margin, canvas.height - margin), text, fill=FAINT, font=face, anchor="ls")
    return canvas.reduce(s)
