"""What maps show: their main directions as colours, segments by k-means, foreground by the first component."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..features.model_names import map_names, shown_maps
from ..utils.errors import InputError, needs
from . import figures
from .features import FeatureProvider, Spec, Watch
from .figures import Panel
from .matches import map_of, title
from .memory import Entry
from .pictures import Picture, open_pictures
from .results import Result, model_arguments, one_thread

SHOWS = ("pca", "segments", "foreground")
MOST_CLUSTERS = 12
_SEGMENTS = np.array(
    [(225, 29, 72), (37, 99, 235), (245, 158, 11), (22, 163, 74), (147, 51, 234), (8, 145, 178), (234, 88, 12),
     (190, 24, 93), (101, 163, 13), (79, 70, 229), (120, 113, 108), (15, 118, 110)], np.uint8
)  # fmt: skip


@dataclass(eq=False)
class Maps(Result):
    """Maps made visible.

    Attributes:
        pictures, spec, maps, show, shared, clusters: what was asked.
        values: {map: per picture h x w (x 3)}: "pca" whitened coordinates, float; "segments" labels, uint8;
            "foreground" the first component, float, positive in the foreground.
        images: {map: per picture an RGB image of the picture's working size}.
    """

    function = "maps"
    pictures: list[Picture]
    spec: Spec
    maps: list[str]
    show: str
    shared: bool
    clusters: int
    values: dict[str, list[torch.Tensor]]
    images: dict[str, list[Image.Image]]

    def arguments(self) -> dict:
        given = dict(maps=self.maps) | model_arguments(self.spec) | dict(show=self.show)
        if self.show == "segments":
            given["clusters"] = self.clusters
        return given if self.shared else given | dict(shared=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.show}.{m}.{n}": x for m, values in self.values.items() for n, x in enumerate(values)}

    def figure(self) -> Image.Image:
        rows = []
        for n, picture in enumerate(self.pictures):
            row = [Panel(picture.image, "picture" if n == 0 else "")]
            for m in self.maps:
                height, width = self.values[m][n].shape[:2]
                row.append(Panel(self.images[m][n], f"{m}: {height} x {width}" if n == 0 else ""))
            rows.append(row)
        return figures.grid(rows, f"{title(self.spec)}: {self.caption()}", height=180)

    def caption(self) -> str:
        """What is shown, in words."""
        basis = "one basis for all pictures" if self.shared else "a basis for each picture"
        what = {
            "pca": "three main directions as red, green, blue",
            "segments": f"{self.clusters} clusters (k-means)",
            "foreground": "foreground by the first component",
        }
        return f"{what[self.show]}, {basis}"


def maps(
    pictures: Sequence[str | os.PathLike | bytes | Picture],
    maps: Sequence[str] | None = None,
    model: str = "cleandift_tiny",
    show: str = "pca",
    shared: bool = True,
    clusters: int = 6,
    prompt: str = "",
    timestep: int | None = None,
    ensemble_size: int | None = None,
    device: str = "cpu",
    features: FeatureProvider | None = None,
) -> Maps:
    """Makes maps visible. Vectors are normalised to length 1 first.

    Args:
        pictures: files, names of samples, bytes, or Pictures.
        maps, model: names of maps (default: `shown_maps`) of any timm model.
        show: "pca": the three main directions as red, green and blue; "segments": k-means clusters; "foreground": where
            the first component lies on the side that the picture's border does not, split in two by Otsu's criterion.
        shared: one basis (or one set of clusters) for all pictures; otherwise one each.
        clusters: for "segments", 2 to 12.
        prompt, timestep, ensemble_size, device, features: see `match`.

    Raises:
        ImageError, ModelError: pictures, models or maps that are unavailable. ValueError: show or clusters unknown.
    """
    opened = open_pictures(pictures)
    spec = Spec(model, prompt, timestep, ensemble_size).settled()
    features = features or FeatureProvider(device=device)
    entries = features.compute(spec, opened)
    maps = shown_maps(model, map_names(model)) if maps is None else maps
    return features.stamp(map_entries(opened, entries, spec, maps, show, shared, clusters))


@one_thread()
def map_entries(
    pictures: Sequence[Picture], entries: Sequence[Entry], spec: Spec, maps: Sequence[str], show: str = "pca",
    shared: bool = True, clusters: int = 6, watch: Watch | None = None,
) -> Maps:  # fmt: skip
    """The same from features that are there already; `watch` as of `FeatureProvider.compute`."""
    if show not in SHOWS:
        raise InputError(f"show {show!r} is unknown; choose one of {', '.join(SHOWS)}")
    if not 2 <= clusters <= MOST_CLUSTERS:
        raise InputError(f"clusters must lie in 2..{MOST_CLUSTERS}, got {clusters}")
    values, images, before = {}, {}, None
    for number, name in enumerate(maps):
        if watch:
            watch(number / len(maps), f"drawing {name}")
        own = [map_of(entry, name, spec) for entry in entries]
        values[name] = []
        for group in [own] if shared else [[m] for m in own]:
            if show == "pca":
                values[name] += figures.principal_colours(group)[1]
            elif show == "segments":
                values[name] += segments(group, clusters)
            else:
                values[name] += foreground(group)
        if show == "pca":
            small = _colours(values[name], shared)
            images[name] = [figures.smooth(s, p.image, max(p.working_size)) for s, p in zip(small, pictures)]
        elif show == "segments":
            if before is not None:
                values[name] = alike(values[name], before, shared)
            before = values[name]
            images[name] = [_segmented(p, labels) for p, labels in zip(pictures, values[name])]
        else:
            images[name] = [_cut_out(p, component) for p, component in zip(pictures, values[name])]
    return Maps(list(pictures), spec, list(maps), show, shared, int(clusters), values, images)


def _unit(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([F.normalize(m.float().flatten(1).T, dim=1) for m in maps])


def _split(values: torch.Tensor, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    sizes = [m.shape[-2:] for m in maps]
    return [part.view(size) for part, size in zip(values.split([h * w for h, w in sizes]), sizes)]


def segments(maps: Sequence[torch.Tensor], clusters: int) -> list[torch.Tensor]:
    """k-means over the unit vectors of some maps C x h x w, seeded: labels h x w, uint8, 0 the most frequent."""
    with needs("demo"):
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

    vectors = _unit(maps).numpy()
    count = min(clusters, len(np.unique(vectors, axis=0)))
    with threadpool_limits(1), warnings.catch_warnings():  # sums in another order could turn a close decision
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters than asked for, in a plain picture
        labels = KMeans(count, n_init=2, random_state=0).fit(vectors).labels_
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    return _split(torch.from_numpy(np.argsort(order)[labels].astype(np.uint8)), maps)


def alike(labels: Sequence[torch.Tensor], other: Sequence[torch.Tensor], shared: bool) -> list[torch.Tensor]:
    """Labels renamed so that they agree best with others, of maps of other sizes, of the same pictures."""
    with needs("demo"):
        from scipy.optimize import linear_sum_assignment

    groups = [range(len(labels))] if shared else [[i] for i in range(len(labels))]
    renamed = list(labels)
    for group in groups:
        overlap = np.zeros((MOST_CLUSTERS, MOST_CLUSTERS))
        for i in group:
            size = tuple(map(max, zip(labels[i].shape, other[i].shape)))
            a, b = (F.interpolate(x[None, None].float(), size)[0, 0].flatten().int().numpy()
                    for x in (labels[i], other[i]))  # fmt: skip
            np.add.at(overlap, (a, b), 1 / len(a))
        names = torch.from_numpy(linear_sum_assignment(-overlap)[1].astype(np.uint8))
        for i in group:
            renamed[i] = names[labels[i].int()]
    return renamed


def foreground(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first principal component of some maps C x h x w, shifted and signed so that > 0 is the foreground: h x w.

    The threshold is Otsu's: the split into two groups with the least variance within them. The background is the group
    that the pictures' borders belong to for the most part.
    """
    vectors = _unit(maps)
    vectors = vectors - vectors.mean(0)
    direction = torch.linalg.eigh(vectors.T @ vectors)[1][:, -1]
    values = vectors @ direction
    values = values - _otsu(values)
    parts = _split(values, maps)
    border = torch.cat([torch.cat([p[0], p[-1], p[1:-1, 0], p[1:-1, -1]]) for p in parts])
    return [-p for p in parts] if (border > 0).float().mean() > 0.5 else parts


def _otsu(values: torch.Tensor) -> float:
    """The number between two groups of numbers that splits them with the largest variance between groups."""
    ordered = values.double().sort().values
    if len(ordered) < 2:
        return float(ordered.mean())
    below = torch.arange(1, len(ordered))
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def _colours(coordinates: Sequence[torch.Tensor], shared: bool) -> list[Image.Image]:
    groups = [list(coordinates)] if shared else [[c] for c in coordinates]
    return [image for group in groups for image in figures.coordinate_colours(group)]


def _segmented(picture: Picture, labels: torch.Tensor) -> Image.Image:
    height, width = picture.working_size
    colours = Image.fromarray(_SEGMENTS[labels.numpy()]).resize((width, height), Image.Resampling.NEAREST)
    return Image.blend(figures.faded(picture.image.resize((width, height))), colours, 0.65)


def _cut_out(picture: Picture, component: torch.Tensor) -> Image.Image:
    height, width = picture.working_size
    image = picture.image.resize((width, height))
    mask = F.interpolate(component[None, None], (height, width), mode="bilinear")[0, 0] > 0
    mask = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    ground = Image.blend(figures.faded(image), Image.new("RGB", image.size, "white"), 0.75)
    return Image.composite(image, ground, mask)
