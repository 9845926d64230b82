"""The same pictures through a clean model and its noisy twin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from PIL import Image

from ..features.extractor import ModelError
from ..features.model_names import default_map, twin
from . import figures
from .features import FeatureProvider, Spec
from .figures import Panel
from .matches import Match, Point, map_of, match_entries, title
from .memory import Entry
from .pictures import Picture, open_pictures
from .results import Result, one_thread


@dataclass(eq=False)
class Directions:
    """Main directions of some maps: per picture h x w x 3, and as an RGB image of its working size."""

    coordinates: list[torch.Tensor]
    images: list[Image.Image]


@dataclass(eq=False)
class Side:
    """One of the two.

    Attributes:
        match: where the points were found.
        directions: of the map; the noisy side's are turned so that colours agree.
        seconds: that computing a picture's features took, when it was first wanted: the median over the pictures.
    """

    match: Match
    directions: Directions
    seconds: float


@dataclass(eq=False)
class Comparison(Result):
    """Clean against noisy features."""

    function = "compare"
    pictures: list[Picture]
    clean: Side
    noisy: Side

    def arguments(self) -> dict:
        spec, noise = self.clean.match.spec, self.noisy.match.spec
        given = dict(points=self.clean.match.points, model=spec.model, map=self.clean.match.map)
        given |= dict(timestep=noise.timestep, ensemble_size=noise.ensemble_size)
        return given | (dict(prompt=spec.prompt) if spec.prompt else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {}
        for name, side in (("clean", self.clean), ("noisy", self.noisy)):
            named |= {f"{name}.{key}": x for key, x in side.match.tensors().items() if key != "points"}
            named |= {f"{name}.pca.{n}": c for n, c in enumerate(side.directions.coordinates)}
        return named | dict(points=self.clean.match.tensors()["points"])

    def figure(self) -> Image.Image:
        rows, labels = [], []
        for name, side in (("clean", self.clean), ("noisy", self.noisy)):
            labels += [f"{name}: {title(side.match.spec, side.match.map)}", "", *[""] * len(side.match.points)]
            rows.append([Panel(p.image, "", side.match.marks(n)) for n, p in enumerate(self.pictures)])
            rows += [[side.match.heat_panel(p, n) for n in range(len(self.pictures))]
                     for p in range(len(side.match.points))]  # fmt: skip
            rows.append([Panel(image) for image in side.directions.images])
        return figures.grid(rows, "Clean and noisy features: matches, similarity, main directions", labels, height=180)


def compare(
    pictures: Sequence[str | os.PathLike | bytes | Picture],
    points: Sequence[Point] = (),
    model: str = "cleandift_tiny",
    map: str | None = None,
    timestep: int | None = None,
    ensemble_size: int | None = None,
    prompt: str = "",
    device: str = "cpu",
    features: FeatureProvider | None = None,
) -> Comparison:
    """Runs pictures through a cleandift_* model and through the dift_* model with the same parts.

    Args:
        pictures, points, map, prompt, device, features: see `match`.
        model: a cleandift_* model.
        timestep, ensemble_size: of the noisy one: 0..999, and the number of noises averaged (default: the model's).

    Raises:
        ImageError, ModelError: pictures, models or maps that are unavailable. ValueError: a point outside its picture.
    """
    opened = open_pictures(pictures)
    specs = two_specs(model, prompt, timestep, ensemble_size)
    features = features or FeatureProvider(device=device)
    clean, noisy = (features.compute(spec, opened) for spec in specs)
    return features.stamp(compare_entries(opened, clean, noisy, specs, map or default_map(model), points))


def two_specs(model: str, prompt: str, timestep: int | None, ensemble_size: int | None) -> tuple[Spec, Spec]:
    """What the two sides are computed by. Raises ModelError for a model without a noisy twin."""
    noisy = twin(model)
    if noisy is None:
        raise ModelError(f"{model} has no noisy twin to be compared with; choose a cleandift_* model")
    return Spec(model, prompt), Spec(noisy, prompt, timestep, ensemble_size).settled()


@one_thread()
def main_directions(
    pictures: Sequence[Picture], clean: Sequence[Entry], noisy: Sequence[Entry], specs: tuple[Spec, Spec], map: str
) -> tuple[Directions, Directions]:
    """PCA of both sides, the noisy side's turned so that colours agree."""
    both, like = [], None
    for entries, spec in zip((clean, noisy), specs, strict=True):
        small, coordinates = figures.principal_colours([map_of(entry, map, spec) for entry in entries], like)
        like = coordinates if like is None else like
        images = [figures.smooth(s, p.image, max(p.working_size)) for s, p in zip(small, pictures)]
        both.append(Directions(coordinates, images))
    return tuple(both)


def compare_entries(
    pictures: Sequence[Picture], clean: Sequence[Entry], noisy: Sequence[Entry], specs: tuple[Spec, Spec], map: str,
    points: Sequence[Point] = (), directions: tuple[Directions, Directions] | None = None,
) -> Comparison:  # fmt: skip
    """The same from features that are there already; `directions` if they are, too."""
    directions = directions or main_directions(pictures, clean, noisy, specs, map)
    sides = []
    for entries, spec, own in zip((clean, noisy), specs, directions, strict=True):
        found = match_entries(pictures, entries, spec, map, points)
        sides.append(Side(found, own, median(entry.seconds for entry in entries)))
    return Comparison(list(pictures), *sides)
