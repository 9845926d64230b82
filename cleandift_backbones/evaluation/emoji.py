"""The emoji benchmark: held-out concepts, each drawn by several hands.

Cross-style retrieval, and matching the eyes of one drawing in another of the same thing. Pictures come from a folder
made by tools/tiny/make_pictures.py (DIR/heldout/STYLE/KEY.png with metadata.jsonl), eye centres from emoji_eyes.json
beside this file; the pictures are put on plain light grey.

Eyes are matched in two ways. `centred`: the pictures as they are. Emoji fill their canvas, so that an eye is mostly
near the place where it was in the other drawing; the row "same position" (answer = the source point) says how far that
alone goes. `placed`: every picture is shrunk to 0.6..0.9 of the canvas and put at a random place, and half of the
target pictures are mirrored, so that position does not help. A mirrored face's left eye is the one that is seen at the
left afterwards (as for every face), so labels change sides.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.decoding import opened, read_image
from ..data.images import to_tensor
from ..data.resize import resize
from ..features import correspondence
from ..features.extractor import Extractor, extract
from ..utils.atomic import is_file
from ..utils.errors import CleanDIFTError, InputError
from ..utils.progress import tqdm
from ..utils.records import read_json, read_records
from . import cross_style, emoji_probes
from .bootstrap import Tally

EYES_FILE = Path(__file__).with_name("emoji_eyes.json")
BACKGROUND = (224, 224, 224)
ALPHA = 0.1  # PCK's tolerance, in sides of the picture
SCALES = (0.6, 0.9)  # of `placed` pictures
METRICS = {
    "retrieval_pooled": "retrieval, pooled map",
    "retrieval_whole": "retrieval, whole map",
    "eyes_centred": "eyes, centred",
    "eyes_placed": "eyes, placed",
    "subgroup": "subgroup, kNN",
    "figure": "figure, mIoU",
}
Tallies = dict[str, Tally]


class SuiteError(InputError):
    """Benchmark data that cannot be used; the message says what was expected and how to get it."""


@dataclass
class Suite:
    """Held-out pictures, N of them.

    Attributes:
        pictures: N x 3 x S x S in 0..1.
        concepts, styles: N names each.
        subgroups: N names, "" where none is known; or none at all.
        alphas: N x S x S opacities in 0..1, None where a picture has none.
        eyes: index of a picture -> 2 x 2 tensor of (x, y) as fractions of the side, left eye then right eye as seen.
    """

    pictures: torch.Tensor
    concepts: list[str]
    styles: list[str]
    eyes: dict[int, torch.Tensor]
    folder: str = ""
    subgroups: list[str] = field(default_factory=list)
    alphas: torch.Tensor | None = None
    names: list[str] = field(init=False)  # concepts, each once

    def __post_init__(self):
        self.names = list(dict.fromkeys(self.concepts))

    @property
    def side(self) -> int:
        return self.pictures.shape[-1]

    def eye_pairs(self) -> list[tuple[int, int]]:
        """Ordered pairs of pictures of one concept in two styles that both have marked eyes."""
        members: dict[str, list[int]] = {}
        for i in self.eyes:
            members.setdefault(self.concepts[i], []).append(i)
        return [(a, b) for group in members.values() for a in group for b in group if a != b]


def load_suite(
    folder: str | os.PathLike,
    size: int = 128,
    eyes_file: str | os.PathLike = EYES_FILE,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Suite:
    """Reads the held-out pictures.

    Args:
        folder: made by tools/tiny/make_pictures.py; it, or its subfolder `heldout`, holds metadata.jsonl.
        size: side in pixels that pictures are brought to.
        eyes_file: JSON {"eyes": {concept: {style: [[x, y], [x, y]]}}}, fractions of the side.
        limit: number of concepts to keep, drawn by `seed`; those with and without eyes keep their shares.

    Raises:
        SuiteError: missing or malformed metadata or eye marks, missing pictures, or no pair of marked pictures.
        ImageError: a picture that cannot be read.
    """
    folder = Path(folder)
    root = folder / "heldout" if is_file(folder / "heldout" / "metadata.jsonl") else folder
    lines = _read_metadata(root)
    eyes = _read_eyes(Path(eyes_file))
    if limit is not None:
        kept = _limited([line["concept"] for line in lines], set(eyes), limit, seed)
        lines = [line for line in lines if line["concept"] in kept]
    missing = [line["file_name"] for line in lines if not os.path.isfile(root / line["file_name"])]
    if missing:
        raise SuiteError(f"{root}: {len(missing)} of {len(lines)} pictures are missing, first {missing[0]}; {_MAKE}")
    pictures, alphas = torch.empty(len(lines), 3, size, size), torch.ones(len(lines), size, size)
    for i, line in enumerate(tqdm(lines, desc="pictures", unit="img", disable=not progress, leave=False)):
        pictures[i] = resize(to_tensor(read_image(root / line["file_name"], BACKGROUND)), (size, size))
        alphas[i] = _alpha(root / line["file_name"], size)
    marks = {}
    for i, line in enumerate(lines):
        points = eyes.get(line["concept"], {}).get(line["style"])
        if points is not None:
            marks[i] = torch.tensor(points, dtype=torch.float32)
    concepts, styles, subgroups = ([x[key] for x in lines] for key in ("concept", "style", "subgroup"))
    opaque = bool((alphas.flatten(1).amin(1) >= 0.5).any())  # a picture without a ground
    suite = Suite(pictures, concepts, styles, marks, str(root), subgroups, None if opaque else alphas)
    if not suite.eye_pairs():
        raise SuiteError(f"{root}: no concept has marked eyes in two styles; give more pictures or another eyes file")
    return suite


_MAKE = "make the folder with `python tools/tiny/make_pictures.py --out DIR`"


def _alpha(path: Path, size: int) -> torch.Tensor:
    """Opacity of a picture that was read before, size x size in 0..1."""
    with opened(path) as image:
        alpha = image.convert("RGBA").getchannel("A").resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(alpha)).float() / 255


def _read_metadata(root: Path) -> list[dict]:
    path = root / "metadata.jsonl"
    if not path.is_file():
        raise SuiteError(f"{path} is missing; {_MAKE}")
    lines = []
    try:
        for number, line in read_records(path):
            if not all(isinstance(line.get(key), str) for key in ("file_name", "style", "concept")):
                raise SuiteError(f"{path}, line {number}: expected file_name, style and concept; {_MAKE}")
            lines.append({key: line.get(key, "") for key in ("file_name", "style", "concept", "subgroup")})
    except SuiteError:
        raise
    except CleanDIFTError as error:
        raise SuiteError(f"{error}; {_MAKE}") from None
    if not lines:
        raise SuiteError(f"{path} is empty; {_MAKE}")
    return lines


def _read_eyes(path: Path) -> dict[str, dict[str, list]]:
    try:
        eyes = read_json(path)["eyes"]
        marks = [(concept, *mark) for concept, styles in eyes.items() for mark in styles.items()]
    except (CleanDIFTError, KeyError, AttributeError) as error:
        raise SuiteError(f"{path}: not a JSON file of eye marks ({error!r})") from None
    for concept, style, points in marks:
        try:
            array = np.asarray(points, dtype=float)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != (2, 2) or not ((array >= 0) & (array < 1)).all():
            raise SuiteError(f"{path}: {concept} in {style} has {points}; expected two points (x, y) within 0..1")
    return eyes


def _limited(concepts: Sequence[str], eyed: set[str], limit: int, seed: int) -> set[str]:
    names = sorted(set(concepts))
    random.Random(seed).shuffle(names)
    with_eyes = [name for name in names if name in eyed]
    share = min(len(with_eyes), math.ceil(limit * len(with_eyes) / len(names)))
    return set(with_eyes[:share] + [name for name in names if name not in eyed][: limit - share])


@dataclass
class Placed:
    """Pictures shrunk onto canvases: M x 3 x S x S, their points M x 2 x 2 in pixels, and their sides there, M."""

    pictures: torch.Tensor
    points: torch.Tensor
    lengths: torch.Tensor


def pixel_points(fractions: torch.Tensor, side: int) -> torch.Tensor:
    """Fractions of the side -> pixel units where whole numbers are pixel centres."""
    return (fractions * side - 0.5).clamp(0, side - 1)


def place(suite: Suite, indices: Sequence[int], rng: random.Random, mirror: bool) -> Placed:
    """Puts pictures with marked eyes at random places and scales of plain canvases; mirrors half of them on demand."""
    side = suite.side
    canvases = torch.tensor(BACKGROUND).view(1, 3, 1, 1).div(255).repeat(len(indices), 1, side, side)
    points, lengths = [], []
    for canvas, i in zip(canvases, indices, strict=True):
        length = round(side * rng.uniform(*SCALES))
        left, top = rng.randint(0, side - length), rng.randint(0, side - length)
        small = resize(suite.pictures[i], (length, length))
        eyes = suite.eyes[i]
        if mirror and rng.random() < 0.5:
            small = small.flip(-1)
            eyes = torch.stack([1 - eyes[:, 0], eyes[:, 1]], 1).flip(0)  # left and right as seen change sides
        canvas[:, top : top + length, left : left + length] = small
        points.append(pixel_points(eyes, length) + torch.tensor([left, top]))
        lengths.append(length)
    return Placed(canvases, torch.stack(points), torch.tensor(lengths, dtype=torch.float32))


class EmojiBenchmark:
    """The suite made ready: what all rows of a table share.

    Args:
        suite: the pictures.
        placements: how many random placements of each picture with eyes.
        seed: of the placements and of the noises.
        independent_noise: noisy models draw another noise for each style (and for sources and targets of `placed`), as
            DIFT does for the two pictures of a pair. False: one noise for all pictures, which favours equal positions.
    """

    def __init__(self, suite: Suite, placements: int = 1, seed: int = 0, independent_noise: bool = True):
        self.suite, self.seed, self.independent_noise = suite, seed, independent_noise
        self.eyed = list(suite.eyes)
        position = {i: n for n, i in enumerate(self.eyed)}
        self.pairs = torch.tensor([(position[a], position[b]) for a, b in suite.eye_pairs()])
        self.pair_concepts = [suite.concepts[a] for a, _ in suite.eye_pairs()]
        rng = random.Random(seed)
        self.sources = [place(suite, self.eyed, rng, mirror=False) for _ in range(placements)]
        self.targets = [place(suite, self.eyed, rng, mirror=True) for _ in range(placements)]
        self.points = torch.stack([pixel_points(suite.eyes[i], suite.side) for i in self.eyed])

    def run(self, extractor: Extractor, batch_size: int = 32, progress: bool = True) -> dict[str, Tallies]:
        """Everything measured on one model: {map name: {metric: Tally}}."""
        suite = self.suite
        style_ids = [sorted(set(suite.styles)).index(style) for style in suite.styles]
        placed = [p.pictures for p in (*self.sources, *self.targets)]
        pictures = torch.cat([suite.pictures, *placed])
        groups = style_ids + [100 + (k >= len(self.sources)) for k, p in enumerate(placed) for _ in p]
        maps = self._extract(extractor, pictures, groups, batch_size, progress)
        results = {}
        for name in list(maps):
            centred, *rest = maps.pop(name).split([len(suite.pictures), *(len(p) for p in placed)])
            results[name] = self._measure(centred, rest)
        return results

    def _extract(self, extractor, pictures, groups, batch_size, progress) -> dict[str, torch.Tensor]:
        if not self.independent_noise or not extractor.reseed(self.seed):
            return extract(extractor, pictures, batch_size, progress)
        maps: dict[str, torch.Tensor] = {}
        for group in sorted(set(groups)):
            extractor.reseed(1000 * self.seed + group)
            chosen = torch.tensor([i for i, g in enumerate(groups) if g == group])
            for name, part in extract(extractor, pictures[chosen], batch_size, progress).items():
                if name not in maps:
                    maps[name] = part.new_empty(len(pictures), *part.shape[1:])
                maps[name][chosen.to(part.device)] = part
        return maps

    def _measure(self, centred: torch.Tensor, placed: list[torch.Tensor]) -> Tallies:
        suite, half = self.suite, len(self.sources)
        tallies = {}
        for pooling in cross_style.POOLINGS:
            hits = cross_style.cross_style_hits(cross_style.embed(centred, pooling), suite.concepts, suite.styles)
            tallies[f"retrieval_{pooling}"] = self._tally_retrieval(hits)
        tallies |= self._measure_probes(centred)
        eyed = centred[torch.tensor(self.eyed, device=centred.device)]
        tallies["eyes_centred"] = self._tally_eyes([self.match(eyed, eyed, self.points, self.points, suite.side)])
        found = [
            self.match(a, b, source.points, target.points, target.lengths)
            for a, b, source, target in zip(placed[:half], placed[half:], self.sources, self.targets, strict=True)
        ]
        if found:
            tallies["eyes_placed"] = self._tally_eyes(found)
        return tallies

    def _measure_probes(self, centred: torch.Tensor) -> Tallies:
        suite, tallies = self.suite, {}
        index = {name: k for k, name in enumerate(suite.names)}
        rows = np.array([index[concept] for concept in suite.concepts])
        if any(suite.subgroups):
            embeddings = cross_style.embed(centred, "pooled").cpu()
            found, counted = emoji_probes.subgroup_hits(embeddings, suite.concepts, suite.subgroups)
            if counted.any():
                tallies["subgroup"] = _gather(rows, found[:, None], counted[:, None], len(index))
        fitted = emoji_probes.halves(suite.concepts, self.seed)
        if suite.alphas is not None and fitted.any():
            hits, unions = emoji_probes.figure_counts(centred, suite.alphas, fitted)
            tallies["figure"] = _gather(rows[~fitted.numpy()], hits, unions, len(index))
        return tallies

    def match(
        self,
        source_maps: torch.Tensor,
        target_maps: torch.Tensor,
        source_points: torch.Tensor,
        target_points: torch.Tensor,
        lengths: torch.Tensor | float,
        chunk: int = 64,
    ) -> torch.Tensor:
        """Which eyes are found in all pairs: maps E x C x h x w of all pictures with eyes -> bool, pairs x 2."""
        size, device = (self.suite.side, self.suite.side), source_maps.device
        lengths = torch.as_tensor(lengths, dtype=torch.float32).expand(len(target_points)).to(device)
        target_points = target_points.to(device)
        vectors = correspondence.read_points(source_maps, source_points.to(device), size)
        norms = correspondence.upsampled_norm(target_maps, size)
        found = []
        for pairs in self.pairs.to(device).split(chunk):
            a, b = pairs.T
            scores = correspondence.score_maps(vectors[a], target_maps[b], size, norms[b])
            predicted = correspondence.peaks(scores)
            found.append(correspondence.pck(predicted, target_points[b], lengths[b, None], ALPHA))
        return torch.cat(found)

    def same_position(self) -> Tallies:
        """The baseline that answers with the source point itself: {metric: Tally}, eyes only."""
        a, b = self.pairs.T
        centred = correspondence.pck(self.points[a], self.points[b], self.suite.side, ALPHA)
        placed = [
            correspondence.pck(source.points[a], target.points[b], target.lengths[b, None], ALPHA)
            for source, target in zip(self.sources, self.targets, strict=True)
        ]
        tallies = {"eyes_centred": self._tally_eyes([centred])}
        return tallies | ({"eyes_placed": self._tally_eyes(placed)} if placed else {})

    def _tally_eyes(self, found: list[torch.Tensor]) -> Tally:
        index = {name: k for k, name in enumerate(self.suite.names)}
        rows = np.array([index[concept] for concept in self.pair_concepts])
        hits, trials = np.zeros((len(index), 1)), np.zeros((len(index), 1))
        for bools in found:
            np.add.at(hits[:, 0], rows, bools.float().sum(1).cpu().numpy())
            np.add.at(trials[:, 0], rows, bools.shape[1])
        return Tally(hits, trials)

    def _tally_retrieval(self, hits: dict[tuple[str, str], dict[str, bool]]) -> Tally:
        index = {name: k for k, name in enumerate(self.suite.names)}
        tally = Tally(np.zeros((len(index), len(hits))), np.zeros((len(index), len(hits))))
        for group, found in enumerate(hits.values()):
            for concept, hit in found.items():
                tally.hits[index[concept], group] = hit
                tally.trials[index[concept], group] = 1
        return tally


def _gather(rows: np.ndarray, hits: torch.Tensor, trials: torch.Tensor, concepts: int) -> Tally:
    """Numbers per picture, M x G, added up per concept."""
    tally = Tally(*(np.zeros((concepts, hits.shape[1])) for _ in range(2)))
    np.add.at(tally.hits, rows, hits.double().numpy())
    np.add.at(tally.trials, rows, trials.double().numpy())
    return tally
