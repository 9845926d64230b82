"""The figures of `cleandift demo`: point matches, PCA colours, and clean against noisy features of pairs of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.images import to_tensor
from ..features import correspondence
from ..features.extractor import Extractor, extract, list_maps, load_extractor, map_indices, resolve_device
from ..features.model_names import default_map, defaults_of, own_size, shown_maps, twin
from ..features.options import map_items
from . import figures
from .figures import Panel
from .pictures import SAMPLES, open_picture

POINTS = 4
BATCH = 8


@dataclass
class DemoPair:
    """Two pictures, the points to look for (P x 2, fractions of picture a), and what was found."""

    name: str
    a: Image.Image
    b: Image.Image
    points: torch.Tensor | None = None
    labels: Sequence[str] = ()  # what the points mark, if that is known
    maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # C x h x w of a and of b
    noisy: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.a.height, self.a.width), (self.b.height, self.b.width)

    def pixels(self) -> torch.Tensor:
        """Points in pixels of picture a, whole numbers being pixel centres."""
        size = torch.tensor([self.a.width, self.a.height])
        return torch.minimum((self.points * size - 0.5).clamp_min(0), size - 1)


def sample_pairs() -> list[DemoPair]:
    """The images that come with the package, with points that mean something."""
    listing = json.loads((SAMPLES / "pairs.json").read_text(encoding="utf-8"))["pairs"]
    return [
        DemoPair(item["a"].split("_")[0] + ("-photo" if "photo" in item["a"] else ""),
             open_picture(item["a"]).image, open_picture(item["b"]).image, torch.tensor(item["points"]), item["names"])
        for item in listing
    ]  # fmt: skip


def pairs_of(paths: Sequence[str], points: torch.Tensor | None = None) -> list[DemoPair]:
    """The first of some image files with each of the others.

    Args:
        points: P x 2, fractions of the first image's width and height.

    Raises:
        InputError, FileError: a file that is not an image, or too small.
    """
    first, *others = (open_picture(path).image for path in paths)
    stems = [Path(path).stem for path in paths]
    names = [f"{stems[0]}_{stem}" for stem in stems[1:]]
    names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names, 1)]
    return [DemoPair(name, first, other, points) for name, other in zip(names, others, strict=True)]


class Models(NamedTuple):
    """What computes the features of a demo."""

    clean: Extractor
    noisy: Extractor | None  # the noisy twin, if the model has one
    names: tuple[str, str]  # of both, for captions; "" for no twin
    shown: list[str]  # names of the maps to show
    matched: str  # and of the map to match points on


def load_models(
    model: str,
    maps: Sequence[str] = (),
    match_map: str | None = None,
    size: int | None = None,
    device: str = "auto",
    pretrained: bool = True,
    **create_kwargs,
) -> Models:
    """Loads a model, and its noisy twin if it has one.

    Args:
        model: any timm model, or "pixels".
        maps: to show, by name or index; none: up to three.
        match_map: to match points on; None: us6, or the middle one shown.
        size: side of the models' input in pixels; None: the model's own.
        create_kwargs: of the model, not of its twin.

    Raises:
        ModelError: an unknown model, map or device.
    """
    infos = list_maps(model)
    names = [info["name"] for info in infos]
    shown = [names[i] for i in map_indices(infos, map_items(maps))] if maps else shown_maps(model, names)
    matched = names[map_indices(infos, map_items([match_map]))[0]] if match_map else default_map(model, shown)
    wanted = list(dict.fromkeys([*shown, matched]))
    place, size = resolve_device(device), size or own_size(model)
    torch.manual_seed(0)
    clean = load_extractor(model, wanted, pretrained, place, size, **create_kwargs)
    noisy_name = None if ":" in model else twin(model)  # a folder's twin may lie nowhere here
    noisy = None
    if noisy_name:
        noisy = load_extractor(noisy_name, wanted, pretrained, place, size, ensemble_size=1)
    for extractor in (clean, noisy) if noisy else (clean,):
        extractor.optimize()
    timestep = defaults_of(noisy_name).timestep if noisy else 0
    captions = (model, f"{noisy_name}, t={timestep:.0f}, one noise" if noisy else "")
    return Models(clean, noisy, captions, shown, matched)


@torch.inference_mode()
def compute(pairs: Sequence[DemoPair], models: Models) -> None:
    """Computes the maps of all pairs, and chooses points where none are given."""
    clean, noisy = models.clean, models.noisy
    first, second = [pair.a for pair in pairs], [pair.b for pair in pairs]
    _attach([pair.maps for pair in pairs], *(extract(clean, pictures, BATCH) for pictures in (first, second)))
    if noisy:
        noisy.reseed(0)
        a = extract(noisy, first, BATCH)
        noisy.reseed(1)  # two pictures, two noises, as DIFT does
        _attach([pair.noisy for pair in pairs], a, extract(noisy, second, BATCH))
    for pair in pairs:
        if pair.points is None:
            pair.points = choose_points(pair.a, *pair.maps[models.matched])


def _attach(
    targets: list[dict[str, tuple[torch.Tensor, torch.Tensor]]], a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]
) -> None:
    for name in a:
        for target, maps in zip(targets, zip(a[name].cpu(), b[name].cpu(), strict=True), strict=True):
            target[name] = maps


def choose_points(image: Image.Image, source: torch.Tensor, target: torch.Tensor, count: int = POINTS) -> torch.Tensor:
    """Places worth looking for: up to `count` x 2, as fractions of the picture.

    They are cells of the source map that are mutual nearest neighbours with a cell of the target map and lie where the
    picture has detail, spread out by farthest-point selection.
    """
    height, width = source.shape[-2:]
    a, b = (F.normalize(m.float().flatten(1).T, dim=1) for m in (source, target))
    similarity = a @ b.T
    forward, backward = similarity.argmax(1), similarity.argmax(0)
    mutual = backward[forward] == torch.arange(len(a))
    grey = to_tensor(image).mean(0)[None, None]
    mean, squares = (F.adaptive_avg_pool2d(x, (height, width)).flatten() for x in (grey, grey**2))
    detail = (squares - mean**2).clamp_min(0).sqrt()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(x.flatten() + 0.5) / width, (y.flatten() + 0.5) / height], 1)
    inside = ((centres > 0.06) & (centres < 0.94)).all(1)
    for candidates in (mutual & inside & (detail >= detail.median()), mutual & inside, mutual, torch.ones_like(mutual)):
        if candidates.sum() >= min(count, len(a)):
            break
    remaining = candidates.nonzero()[:, 0]
    chosen = [int(remaining[detail[remaining].argmax()])]
    while len(chosen) < min(count, len(remaining)):
        distance = torch.cdist(centres[remaining], centres[chosen]).amin(1)
        chosen.append(int(remaining[distance.argmax()]))
    return centres[chosen]


def _match(pair: DemoPair, maps: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Matches in pixels of picture b, P x 2, and a heat map (0..1) per point."""
    found, scores = correspondence.match_points(*maps, pair.pixels(), *pair.sizes())
    return found, [correspondence.contrast(score) for score in scores]


def draw(pairs: Sequence[DemoPair], models: Models) -> Iterator[tuple[str, Image.Image]]:
    """File names and figures, one by one, of pairs that are computed."""
    shown, matched, models = models.shown, models.matched, models.names
    for pair in pairs:
        yield f"matches_{pair.name}.png", _draw_matches(pair, models[0], matched)
    for pair in pairs:
        yield f"pca_{pair.name}.png", _draw_pca(pair, models[0], shown)
    if models[1]:
        for pair in pairs:
            yield f"clean_vs_noisy_{pair.name}.png", _draw_comparison(pair, models, matched)
    yield "overview.png", _draw_overview(pairs[:3], models, matched)


def _marked(pair: DemoPair) -> Panel:
    return Panel(pair.a, "points", figures.mark_points(pair.pixels(), pair.sizes()[0]))


def _heat_panel(pair: DemoPair, found: torch.Tensor, heats: Sequence[torch.Tensor], number: int, caption: str) -> Panel:
    mark = figures.mark_points(found[number : number + 1], pair.sizes()[1], [number + 1])[0]
    return figures.heat_panel(pair.b, heats[number], mark, caption)


def _draw_matches(pair: DemoPair, model: str, matched: str) -> Image.Image:
    found, heats = _match(pair, pair.maps[matched])
    panels = [_marked(pair), Panel(pair.b, "best matches", figures.mark_points(found, pair.sizes()[1]))]
    panels += [_heat_panel(pair, found, heats, i, f"similarity to point {i + 1}") for i in range(len(heats))]
    note = "   ".join(f"{number} {label}" for number, label in enumerate(pair.labels, 1))
    return figures.grid([panels], f"{pair.name}: {model}, map {matched}", note=note)


def _draw_pca(pair: DemoPair, model: str, shown: Sequence[str]) -> Image.Image:
    rows = [[Panel(pair.a, "picture")], [Panel(pair.b)]]
    for name in shown:
        maps = pair.maps[name]
        images, _ = figures.principal_colours(maps)
        for row, image, picture in zip(rows, images, (pair.a, pair.b), strict=True):
            channels, height, width = maps[0].shape
            caption = f"{name}: {channels} x {height} x {width}" if row is rows[0] else ""
            row.append(Panel(figures.smooth(image, picture), caption))
    return figures.grid(rows, f"{pair.name}: {model}, three main directions of both pictures' features")


def _draw_comparison(pair: DemoPair, models: tuple[str, str], matched: str) -> Image.Image:
    rows, coordinates = [], None
    for maps in (pair.maps[matched], pair.noisy[matched]):
        found, heats = _match(pair, maps)
        (a, b), coordinates = figures.principal_colours(maps, coordinates)
        rows.append([
            _marked(pair),
            Panel(pair.b, "best matches", figures.mark_points(found, pair.sizes()[1])),
            _heat_panel(pair, found, heats, 0, "similarity to point 1"),
            Panel(figures.smooth(a, pair.a), "PCA"),
            Panel(figures.smooth(b, pair.b), "PCA"),
        ])  # fmt: skip
    labels = [f"clean: {models[0]}, map {matched}", f"noisy: {models[1]}"]
    return figures.grid(rows, f"{pair.name}: clean and noisy features", labels, height=200)


def _draw_overview(pairs: Sequence[DemoPair], models: tuple[str, str], matched: str) -> Image.Image:
    rows = []
    for number, pair in enumerate(pairs):
        found, heats = _match(pair, pair.maps[matched])
        (a, b), coordinates = figures.principal_colours(pair.maps[matched])
        row = [
            _marked(pair),
            Panel(pair.b, "found again", figures.mark_points(found, pair.sizes()[1])),
            _heat_panel(pair, found, heats, 0, "similarity to 1"),
            Panel(figures.smooth(a, pair.a), "features (PCA)"),
            Panel(figures.smooth(b, pair.b), "features (PCA)"),
        ]
        if pair.noisy:
            images, _ = figures.principal_colours(pair.noisy[matched], coordinates)
            row.append(Panel(figures.smooth(images[1], pair.b), "with noise"))
        rows.append([figures.squared(panel if number == 0 else replace(panel, caption="")) for panel in row])
    return figures.grid(rows, height=180)
