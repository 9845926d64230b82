"""Points of pictures, found again in all the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..features import correspondence
from ..features.model_names import default_map
from ..utils.errors import InputError
from . import figures
from .features import FeatureProvider, Spec
from .figures import Mark, Panel
from .memory import Entry
from .pictures import Picture, open_pictures
from .results import Result, model_arguments, one_thread

Point = tuple[int, float, float]  # number of the picture; x and y as fractions of its width and height


@dataclass(eq=False)
class Match(Result):
    """Where points were found.

    Attributes:
        pictures, spec, map, points: what was asked.
        mutual_only: whether figures show only matches that are mutual.
        found: P x N x 2, of point p in picture n, as fractions of its width and height.
        scores: P x N, cosine similarity there.
        mutual: P x N, whether the point found leads back to the same cell of the map or one beside it.
        similarity: per picture P x H x W, cosine similarity of every place to point p.
    """

    function = "match"
    pictures: list[Picture]
    spec: Spec
    map: str
    points: list[Point]
    mutual_only: bool
    found: torch.Tensor
    scores: torch.Tensor
    mutual: torch.Tensor
    similarity: list[torch.Tensor]

    def arguments(self) -> dict:
        mutual = dict(mutual_only=True) if self.mutual_only else {}
        return dict(points=self.points) | model_arguments(self.spec) | dict(map=self.map) | mutual

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"similarity.{n}": s for n, s in enumerate(self.similarity)}
        return dict(points=torch.tensor(self.points).view(-1, 3), found=self.found, scores=self.scores,
                    mutual=self.mutual) | named  # fmt: skip

    def shown(self, point: int, picture: int) -> bool:
        """Whether a match is to be drawn."""
        return self.points[point][0] != picture and (not self.mutual_only or bool(self.mutual[point, picture]))

    def marks(self, picture: int) -> list[Mark]:
        """The points of a picture, and those found in it."""
        marks = []
        for p, (source, x, y) in enumerate(self.points):
            colour = figures.POINT_COLOURS[p % len(figures.POINT_COLOURS)]
            if source == picture:
                marks.append(Mark(x, y, p + 1, colour))
            elif self.shown(p, picture):
                marks.append(Mark(*self.found[p, picture].tolist(), p + 1, colour))
        return marks

    def heat(self, point: int, picture: int) -> torch.Tensor:
        """Similarity to a point, H x W, stretched to 0..1 over all pictures but the point's own: a picture that has
        nothing like it stays cold."""
        others = [s[point] for n, s in enumerate(self.similarity) if n != self.points[point][0]]
        low, high = min(s.amin() for s in others), max(s.amax() for s in others)
        return ((self.similarity[picture][point] - low) / (high - low).clamp_min(correspondence.EPS)).clamp(0, 1)

    def heat_panel(self, point: int, picture: int, caption: str = "") -> Panel:
        image = self.pictures[picture].image
        if self.points[point][0] == picture:
            return Panel(image, caption, [mark for mark in self.marks(picture) if mark.number == point + 1])
        panel = figures.heat_panel(image, self.heat(point, picture), Mark(0, 0, None, ""), caption)
        mark = Mark(*self.found[point, picture].tolist(), None, "")
        panel.marks = [mark] if self.shown(point, picture) else []
        return panel

    def figure(self) -> Image.Image:
        rows = [[Panel(p.image, p.name, self.marks(n)) for n, p in enumerate(self.pictures)]]
        for p in range(len(self.points)):
            rows.append([self.heat_panel(p, n) for n in range(len(self.pictures))])
        labels = ["points and their best matches", *(f"similarity to point {p + 1}" for p in range(len(self.points)))]
        return figures.grid(rows, title(self.spec, self.map), labels)


def title(spec: Spec, map_name: str = "") -> str:
    """What features a figure shows."""
    parts = [spec.model]
    if spec.timestep is not None:
        parts.append(f"t={spec.timestep}, {spec.ensemble_size} noise{'s' if spec.ensemble_size > 1 else ''}")
    if spec.prompt:
        parts.append(f"prompt {spec.prompt!r}")
    return ", ".join([*parts, f"map {map_name}"] if map_name else parts)


def match(
    pictures: Sequence[str | os.PathLike | bytes | Picture],
    points: Sequence[Point],
    model: str = "cleandift_tiny",
    map: str | None = None,
    prompt: str = "",
    timestep: int | None = None,
    ensemble_size: int | None = None,
    mutual_only: bool = False,
    device: str = "cpu",
    features: FeatureProvider | None = None,
) -> Match:
    """Finds points of pictures in all the others.

    Maps are upsampled bilinearly to pictures of 256 pixels on the longer side; the place with the largest cosine
    similarity to the point's vector is the match (DIFT, section 4).

    Args:
        pictures: files, names of samples, bytes, or Pictures.
        points: (number of the picture, x, y), x and y as fractions of its width and height.
        model, map: any timm model, and one of its maps (default: `default_map`).
        prompt: text that all pictures are conditioned on.
        timestep, ensemble_size: of dift_* models.
        mutual_only: figures show only mutual nearest neighbours.
        device: where to compute: cpu, cuda, ... or auto.
        features: where features come from, and stay; None: computed for this call, on `device`.

    Raises:
        ImageError, ModelError: pictures, models or maps that are unavailable. ValueError: a point outside its picture.
    """
    opened = open_pictures(pictures)
    spec = Spec(model, prompt, timestep, ensemble_size).settled()
    features = features or FeatureProvider(device=device)
    entries = features.compute(spec, opened)
    return features.stamp(match_entries(opened, entries, spec, map or default_map(model), points, mutual_only))


@one_thread()
def match_entries(
    pictures: Sequence[Picture], entries: Sequence[Entry], spec: Spec, map: str, points: Sequence[Point],
    mutual_only: bool = False,
) -> Match:  # fmt: skip
    """The same from features that are there already."""
    points = [check_point(point, pictures) for point in (() if points is None else points)]
    maps = [map_of(entry, map, spec) for entry in entries]
    count = len(points)
    found, scores = torch.zeros(count, len(maps), 2), torch.zeros(count, len(maps))
    mutual = torch.zeros(count, len(maps), dtype=torch.bool)
    sizes = [picture.working_size for picture in pictures]
    norms = [correspondence.upsampled_norm(m[None], size) for m, size in zip(maps, sizes)] if points else []
    similarity = [torch.zeros(count, *size) for size in sizes]

    def search(source: int, target: int, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = correspondence.read_points(maps[source][None], pixels[None], sizes[source])
        there = correspondence.score_maps(vectors, maps[target][None], sizes[target], norms[target])[0]
        return correspondence.peaks(there), there.clamp(-1, 1)  # rounding may go beyond

    for source in sorted({point[0] for point in points}):
        rows = [p for p, point in enumerate(points) if point[0] == source]
        pixels = pictures[source].pixels(torch.tensor([points[p][1:] for p in rows]))
        cell = torch.tensor([sizes[source][1] / maps[source].shape[2], sizes[source][0] / maps[source].shape[1]])
        for target, picture in enumerate(pictures):
            there, similar = search(source, target, pixels)
            back, _ = search(target, source, there)
            found[rows, target] = picture.fractions(there)
            scores[rows, target] = similar.flatten(1).amax(1)
            mutual[rows, target] = ((back - pixels.round()).abs() <= cell).all(1)
            similarity[target][rows] = similar
    return Match(list(pictures), spec, map, points, mutual_only, found, scores, mutual, similarity)


def check_point(point: Point, pictures: Sequence[Picture]) -> Point:
    """Raises ValueError for a point outside its picture, of no picture, or of another form."""
    try:
        place, x, y = (float(value) for value in point)
        number = int(place)
        if number != place:
            raise ValueError
    except (TypeError, ValueError, OverflowError):  # also of NaN and infinity
        raise InputError(
            f"point {point} is not (picture, x, y): a whole number that counts pictures from 0, and fractions from 0 "
            "to 1 of its width and height"
        ) from None
    if not 0 <= number < len(pictures):
        raise InputError(f"point {point}: there is no picture {number}; count from 0 to {len(pictures) - 1}")
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"point {point} lies outside {pictures[number].name}; give fractions from 0 to 1")
    return number, x, y


def map_of(entry: Entry, map: str, spec: Spec) -> torch.Tensor:
    """A map by name. Raises ValueError if the model has none of that name."""
    if map not in entry.maps:
        raise InputError(f"{spec.model} has no map {map!r}; choose one of {', '.join(entry.maps)}")
    return entry.maps[map]
