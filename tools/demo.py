#!/usr/bin/env python3
"""See what the features of a picture know: draws point matches, PCA colours, and clean against noisy features.

    python tools/demo.py                                  the sample pictures that come with the package
    python tools/demo.py --images a.jpg b.jpg             points of a.jpg found in b.jpg
    python tools/demo.py --model resnet18 --maps layer3   any timm model

Per pair it writes matches_*.png (points of one picture, where each is found in the other, and how alike every place
there is), pca_*.png (three strongest directions of each map as colours) and, for cleandift_* models,
clean_vs_noisy_*.png (the same from the untouched diffusion model fed with noise); and overview.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cleandift_command import guard, importing

with importing(__name__):
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from cleandift_backbones.data.images import check_folder, to_tensor
    from cleandift_backbones.features import correspondence
    from cleandift_backbones.features.extractor import (
        Extractor,
        extract,
        list_maps,
        load_extractor,
        map_indices,
        resolve_device,
    )
    from cleandift_backbones.features.model_names import default_map, defaults_of, own_size, shown_maps, twin
    from cleandift_backbones.features.options import map_items
    from cleandift_backbones.optimization.cpu_malloc import keep_freed_memory
    from cleandift_backbones.publish.training_data import training_data
    from cleandift_backbones.utils.atomic import save_png
    from cleandift_backbones.utils.errors import InputError, resource_errors
    from cleandift_backbones.visualize import figures
    from cleandift_backbones.visualize.figures import Panel
    from cleandift_backbones.visualize.pictures import SAMPLES, open_picture

POINTS = 4
BATCH = 8


class UsageError(InputError):
    """Arguments that do not fit; the message says what to give."""


@dataclass
class Pair:
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


@guard("the figures written so far are kept")
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = _parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    keep_freed_memory()
    pairs = _read_pairs(args)
    clean, noisy, shown, matched = _load(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with resource_errors("lower --size"):
        _compute(pairs, clean, noisy, matched)
    out = Path(args.out)
    names = (args.model, f"{twin(args.model)}, t={defaults_of(args.model).timestep:.0f}, one noise" if noisy else "")
    for name, image in _draw(pairs, names, shown, matched):
        save_png(image, out / name)
        print(f"wrote {out / name}  ({image.width} x {image.height})", flush=True)
    print(
        f"{args.model}: {len(pairs)} pairs, points matched on {matched}, {time.perf_counter() - started:.1f} s in all"
    )
    if not args.random_weights and (known := training_data(args.model)):
        print(f"{args.model} is trained on {known}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="cleandift_tiny", help="any timm model name, or 'pixels'")
    parser.add_argument("--random-weights", action="store_true", help="do not load pretrained weights")
    parser.add_argument(
        "--images", nargs="+", metavar="FILE", help="your own pictures: the first is compared with each of the others"
    )
    parser.add_argument(
        "--points", nargs="+", metavar="X,Y",
        help="points in the first of --images, as fractions of its width and height; without them a few are chosen "
        "where both pictures agree",
    )  # fmt: skip
    parser.add_argument("--maps", nargs="+", metavar="MAP", help="maps to show, by name or index; default: up to three")
    parser.add_argument(
        "--match-map", metavar="MAP", help="map to match points on; default: us6, or the middle one shown"
    )
    parser.add_argument("--size", type=int, help="side that the model gets pictures in; default: the model's own")
    parser.add_argument("--out", default="demo", help="folder for the figures")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... or auto")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser


def _read_pairs(args: argparse.Namespace) -> list[Pair]:
    """All pictures, read before any long work."""
    check_folder(args.out)
    if args.size is not None and args.size < 64:
        raise UsageError(f"--size {args.size} is too small; give at least 64")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads} is too small; give at least 1")
    if args.images:
        if len(args.images) < 2:
            raise UsageError(f"--images got only {args.images[0]}; give two files or more")
        points = torch.tensor([_point(text) for text in args.points]) if args.points else None
        first, *others = (open_picture(path).image for path in args.images)
        stems = [Path(path).stem for path in args.images]
        names = [f"{stems[0]}_{stem}" for stem in stems[1:]]
        names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names, 1)]
        return [Pair(name, first, other, points) for name, other in zip(names, others, strict=True)]
    if args.points:
        raise UsageError("--points belong to pictures of your own; give --images too")
    listing = json.loads((SAMPLES / "pairs.json").read_text(encoding="utf-8"))["pairs"]
    return [
        Pair(item["a"].split("_")[0] + ("-photo" if "photo" in item["a"] else ""),
             open_picture(item["a"]).image, open_picture(item["b"]).image, torch.tensor(item["points"]), item["names"])
        for item in listing
    ]  # fmt: skip


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--points {text!r} is no point; give x,y such as 0.4,0.55") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise UsageError(f"--points {text} lies outside the picture; give fractions from 0 to 1")
    return x, y


def _load(args: argparse.Namespace) -> tuple[Extractor, Extractor | None, list[str], str]:
    """The model, its noisy twin if it has one, names of the maps to show, and of the map to match on."""
    infos = list_maps(args.model)
    names = [info["name"] for info in infos]
    shown = [names[i] for i in map_indices(infos, map_items(args.maps))] if args.maps else shown_maps(args.model, names)
    matched = default_map(args.model, shown)
    if args.match_map:
        matched = names[map_indices(infos, map_items([args.match_map]))[0]]
    wanted = list(dict.fromkeys([*shown, matched]))
    pretrained, device = not args.random_weights, resolve_device(args.device)
    size = args.size or own_size(args.model)
    torch.manual_seed(0)
    clean = load_extractor(args.model, wanted, pretrained, device, size)
    noisy_name = None if ":" in args.model else twin(args.model)  # a folder's twin may lie nowhere here
    noisy = None
    if noisy_name:
        noisy = load_extractor(noisy_name, wanted, pretrained, device, size, ensemble_size=1)
    for extractor in (clean, noisy) if noisy else (clean,):
        extractor.optimize()
    return clean, noisy, shown, matched


@torch.inference_mode()
def _compute(pairs: list[Pair], clean: Extractor, noisy: Extractor | None, matched: str) -> None:
    first, second = [pair.a for pair in pairs], [pair.b for pair in pairs]
    _attach([pair.maps for pair in pairs], *(extract(clean, pictures, BATCH) for pictures in (first, second)))
    if noisy:
        noisy.reseed(0)
        a = extract(noisy, first, BATCH)
        noisy.reseed(1)  # two pictures, two noises, as DIFT does
        _attach([pair.noisy for pair in pairs], a, extract(noisy, second, BATCH))
    for pair in pairs:
        if pair.points is None:
            pair.points = choose_points(pair.a, *pair.maps[matched])


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


def _match(pair: Pair, maps: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Matches in pixels of picture b, P x 2, and a heat map (0..1) per point."""
    found, scores = correspondence.match_points(*maps, pair.pixels(), *pair.sizes())
    return found, [correspondence.contrast(score) for score in scores]


def _draw(
    pairs: Sequence[Pair], models: tuple[str, str], shown: Sequence[str], matched: str
) -> Iterator[tuple[str, Image.Image]]:
    """File names and figures, one by one."""
    for pair in pairs:
        yield f"matches_{pair.name}.png", _draw_matches(pair, models[0], matched)
    for pair in pairs:
        yield f"pca_{pair.name}.png", _draw_pca(pair, models[0], shown)
    if models[1]:
        for pair in pairs:
            yield f"clean_vs_noisy_{pair.name}.png", _draw_comparison(pair, models, matched)
    yield "overview.png", _draw_overview(pairs[:3], models, matched)


def _marked(pair: Pair) -> Panel:
    return Panel(pair.a, "points", figures.mark_points(pair.pixels(), pair.sizes()[0]))


def _heat_panel(pair: Pair, found: torch.Tensor, heats: Sequence[torch.Tensor], number: int, caption: str) -> Panel:
    mark = figures.mark_points(found[number : number + 1], pair.sizes()[1], [number + 1])[0]
    return figures.heat_panel(pair.b, heats[number], mark, caption)


def _draw_matches(pair: Pair, model: str, matched: str) -> Image.Image:
    found, heats = _match(pair, pair.maps[matched])
    panels = [_marked(pair), Panel(pair.b, "best matches", figures.mark_points(found, pair.sizes()[1]))]
    panels += [_heat_panel(pair, found, heats, i, f"similarity to point {i + 1}") for i in range(len(heats))]
    note = "   ".join(f"{number} {label}" for number, label in enumerate(pair.labels, 1))
    return figures.grid([panels], f"{pair.name}: {model}, map {matched}", note=note)


def _draw_pca(pair: Pair, model: str, shown: Sequence[str]) -> Image.Image:
    rows = [[Panel(pair.a, "picture")], [Panel(pair.b)]]
    for name in shown:
        maps = pair.maps[name]
        images, _ = figures.principal_colours(maps)
        for row, image, picture in zip(rows, images, (pair.a, pair.b), strict=True):
            channels, height, width = maps[0].shape
            caption = f"{name}: {channels} x {height} x {width}" if row is rows[0] else ""
            row.append(Panel(figures.smooth(image, picture), caption))
    return figures.grid(rows, f"{pair.name}: {model}, three main directions of both pictures' features")


def _draw_comparison(pair: Pair, models: tuple[str, str], matched: str) -> Image.Image:
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


def _draw_overview(pairs: Sequence[Pair], models: tuple[str, str], matched: str) -> Image.Image:
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


if __name__ == "__main__":
    main()
