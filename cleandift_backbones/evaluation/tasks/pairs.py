"""Pairs of pictures with matching keypoints: SPair-71k, PF-PASCAL, and a JSON file of one's own.

Points are (x, y) in pixels, as they stand in the annotations; whole numbers are pixel centres, 0 is the first pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...data.sources import ImageSource
from ...utils.atomic import is_file
from ...utils.errors import CleanDIFTError, needs
from ...utils.records import read_json
from ..items import DataError, picture_size, read_lines, read_table, require, require_folder, sized_source

Size = tuple[int, int]
PROMPT = "A photo of a {category}."
SPAIR = "SPair-71k: JPEGImages/CATEGORY/*.jpg, PairAnnotation/SPLIT/*.json, Layout/large/SPLIT.txt"
PF_PASCAL = (
    "PF-PASCAL: JPEGImages/*.jpg and Annotations/CLASS/*.mat (or both in PF-dataset-PASCAL/), and SPLIT_pairs.csv or "
    "SPLIT_pairs_pf_pascal.csv with the columns source_image, target_image, class"
)
JSON = (
    'a JSON list of {"source": FILE, "target": FILE, "source_points": [[x, y], ...], "target_points": [[x, y], ...]}, '
    'each optionally with "category" and "target_box" [left, top, right, bottom]'
)
PASCAL = (  # classes in the order of their numbers
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class Pair:
    """Two pictures, by their places among the items, and the points that they have in common.

    Attributes:
        source_points, target_points: P x 2, (x, y) in pixels.
        box: longer side of the target's box in pixels, None where there is no box.
    """

    source: int
    target: int
    source_points: torch.Tensor
    target_points: torch.Tensor
    category: str = ""
    box: float | None = None


@dataclass
class PairSet:
    """Pairs of a data set; `sizes` are (height, width) of the items; `skipped` counts points outside their pictures."""

    name: str
    items: list[ImageSource]
    sizes: list[Size]
    pairs: list[Pair]
    skipped: int = 0


class _Builder:
    """Collects pairs; each picture becomes one item."""

    def __init__(self, name: str, root: Path, skip_outside: bool):
        self.set, self.root, self.skip_outside = PairSet(name, [], [], []), root, skip_outside
        self.places: dict[tuple[Path, str], int] = {}
        self.outside: list[str] = []

    def item(self, path: Path, size: Size, category: str) -> int:
        key = (path, category)
        if key not in self.places:
            self.places[key] = len(self.set.items)
            prompt = PROMPT.format(category=category) if category else ""
            self.set.items.append(sized_source(path, self.root, prompt, size))
            self.set.sizes.append(size)
        return self.places[key]

    def add(self, label, paths, sizes, points, category, box) -> None:
        try:
            points = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in points]
        except (TypeError, ValueError):
            raise DataError(f"{label}: keypoints are not lists of [x, y]") from None
        if len(points[0]) != len(points[1]):
            counts = f"{len(points[0])} source and {len(points[1])} target keypoints"
            raise DataError(f"{label}: {counts}; a pair lists the same keypoints in both pictures")
        inside = np.ones(len(points[0]), dtype=bool)
        for array, (height, width), side in zip(points, sizes, ("source", "target"), strict=True):
            held = ((array >= -0.5) & (array <= [width, height])).all(1)  # a point on the very edge counts as inside
            if not held.all():
                first = array[~held][0]
                self.outside.append(f"{label}: {side} keypoint {tuple(first.tolist())} in {width}x{height} pixels")
            inside &= held
        if not inside.all():
            self.set.skipped += int((~inside).sum())
        # On the edge, and where annotations count from 1: the outermost pixel.
        fixed = [
            torch.tensor(np.clip(a[inside], 0, [w - 1, h - 1]), dtype=torch.float32)
            for a, (h, w) in zip(points, sizes, strict=True)
        ]
        if box is not None and not box > 0:
            raise DataError(f"{label}: the target's box has no area; correct it, or leave it out")
        if len(fixed[0]):
            ends = [self.item(path, size, category) for path, size in zip(paths, sizes, strict=True)]
            self.set.pairs.append(Pair(*ends, *fixed, category, box))

    def done(self) -> PairSet:
        if self.outside and not self.skip_outside:
            raise DataError(
                f"{self.set.skipped} keypoints lie outside their pictures, first in {self.outside[0]}; correct them, "
                "or leave them out with --skip-outside"
            )
        if not self.set.pairs:
            raise DataError(f"{self.set.name}: no pair has a keypoint in common; nothing to match")
        return self.set


def read_spair(root: str | Path, split: str = "test", skip_outside: bool = False) -> PairSet:
    """SPair-71k (Min et al. 2019): 12,234 pairs of its test split in 18 categories.

    Layout/large/SPLIT.txt names the pairs, PairAnnotation/SPLIT/NAME.json holds each: category, src_imname, trg_imname,
    src_imsize and trg_imsize as (width, height, 3), src_kps and trg_kps, and trg_bndbox as (left, top, right, bottom).

    Raises:
        DataError: another layout, missing files, an annotation that is not so, keypoints outside their pictures.
    """
    root = require_folder(root, ["JPEGImages", "PairAnnotation", "Layout/large"], SPAIR)
    table = root / "Layout" / "large" / f"{split}.txt"
    names = read_lines(table, SPAIR)
    files = [root / "PairAnnotation" / split / f"{name}.json" for name in names]
    require([(file, table) for file in files], "pair annotations", SPAIR)
    builder, told = _Builder("SPair-71k", root, skip_outside), []
    for path in files:
        pair = _read_json(path)
        try:
            images = [root / "JPEGImages" / pair["category"] / pair[f"{side}_imname"] for side in ("src", "trg")]
            sizes = [(int(pair[f"{side}_imsize"][1]), int(pair[f"{side}_imsize"][0])) for side in ("src", "trg")]
            left, top, right, bottom = pair["trg_bndbox"]
            told.append(
                (path.name, images, sizes, (pair["src_kps"], pair["trg_kps"]), pair["category"],
                 float(max(right - left, bottom - top)))
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not a pair annotation of SPair-71k ({error!r})") from None
    require([(image, entry[0]) for entry in told for image in entry[1]], "pictures", SPAIR)
    for entry in told:
        builder.add(*entry)
    return builder.done()


def read_pf_pascal(root: str | Path, split: str = "test", skip_outside: bool = False) -> PairSet:
    """PF-PASCAL (Ham et al. 2017), its pairs listed in a CSV file, as in the splits of Han et al. 2017 (SCNet).

    Points come from the columns XA, YA, XB, YB ("x;x;...") where the CSV has them, otherwise from the .mat files: `kps`
    is N x 2, NaN where a keypoint cannot be seen; those seen in both pictures count. `bbox`, as the .mat files give it,
    is the target's box. `class` counts from 1 in the alphabetical order of PASCAL's 20 classes. Points are taken as
    they stand, as the field does.

    Raises:
        DataError: see `read_spair`.
    """
    root = Path(root)
    base = root / "PF-dataset-PASCAL" if (root / "PF-dataset-PASCAL").is_dir() else root
    require_folder(base, ["JPEGImages"], PF_PASCAL)
    names = [f"{split}_pairs.csv", f"{split}_pairs_pf_pascal.csv"]
    table = next((place / name for place in (root, base) for name in names if (place / name).is_file()), None)
    if table is None:
        found = ", ".join(sorted(path.name for path in root.glob("*.csv"))) or "no .csv file"
        raise DataError(
            f"{root} has no {names[0]} and no {names[1]} (found {found}): choose the split with --split; "
            f"expected {PF_PASCAL}"
        )
    lines = read_table(table, ["source_image", "target_image", "class"], PF_PASCAL)
    told = []
    for number, line in enumerate(lines, 2):
        try:
            category = PASCAL[int(float(line["class"])) - 1] if float(line["class"]) >= 1 else None
        except (ValueError, IndexError):
            category = None
        if category is None:
            raise DataError(f"{table}, line {number}: class {line['class']!r} is not 1..20")
        images = [base / "JPEGImages" / Path(line[f"{side}_image"]).name for side in ("source", "target")]
        marks = [base / "Annotations" / category / f"{image.stem}.mat" for image in images]
        told.append((f"{table.name}, line {number}", images, marks, category, line))
    require([(image, entry[0]) for entry in told for image in entry[1]], "pictures", PF_PASCAL)
    in_table = "XA" in lines[0]
    if not in_table:
        require([(mark, entry[0]) for entry in told for mark in entry[2]], "annotations", PF_PASCAL)
    builder = _Builder("PF-PASCAL", root, skip_outside)
    for label, images, marks, category, line in told:
        box = None
        if in_table:
            points = [_columns(line, side, label) for side in "AB"]
            if marks[1].is_file():
                box = _read_mat(marks[1])[1]
        else:
            (a, _), (b, box) = (_read_mat(mark) for mark in marks)
            if len(a) != len(b):
                raise DataError(f"{label}: {marks[0].name} and {marks[1].name} hold {len(a)} and {len(b)} keypoints")
            seen = ~(np.isnan(a).any(1) | np.isnan(b).any(1))
            points = [a[seen], b[seen]]
        builder.add(label, images, [picture_size(image) for image in images], points, category, box)
    return builder.done()


def read_json_pairs(path: str | Path, skip_outside: bool = False) -> PairSet:
    """Pairs of one's own: paths are relative to the JSON file's folder, or absolute; points as everywhere here.

    [{"source": "a.jpg", "target": "b.jpg", "source_points": [[10, 20]], "target_points": [[30, 12]],
      "category": "cat", "target_box": [5, 5, 90, 80]}, ...]; the last two may be left out.

    Raises:
        DataError: see `read_spair`.
    """
    path = Path(path)
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected {JSON}")
    told = []
    for number, entry in enumerate(entries):
        try:
            images = [path.parent / entry[side] for side in ("source", "target")]
            points = [entry["source_points"], entry["target_points"]]
            box = entry.get("target_box")
            box = None if box is None else float(max(box[2] - box[0], box[3] - box[1]))
            told.append((f"{path.name}, pair {number}", images, points, str(entry.get("category", "")), box))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{path}, pair {number}: {error!r}; expected {JSON}") from None
    require([(image, entry[0]) for entry in told for image in entry[1]], "pictures", JSON)
    builder = _Builder(path.stem, path.parent, skip_outside)
    for label, images, points, category, box in told:
        builder.add(label, images, [picture_size(image) for image in images], points, category, box)
    return builder.done()


def read_pairs(path: str | Path, split: str = "test", skip_outside: bool = False) -> PairSet:
    """Whichever of the three stands at `path`: a JSON file, or a folder with one or with a data set in its layout.

    Raises:
        DataError: see `read_spair`; a folder with several JSON files of pairs.
    """
    path = Path(path)
    if is_file(path):
        return read_json_pairs(path, skip_outside)
    if (path / "PairAnnotation").is_dir() or (path / "Layout").is_dir():
        return read_spair(path, split, skip_outside)
    lists = _pair_lists(path)
    tables = (path / "PF-dataset-PASCAL").is_dir() or any(path.glob("*pairs*.csv"))
    if tables or ((path / "JPEGImages").is_dir() and not lists):
        return read_pf_pascal(path, split, skip_outside)
    if len(lists) > 1:
        names = ", ".join(file.name for file in lists)
        raise DataError(f"{path} has {len(lists)} JSON files ({names}): choose one, as in --data {lists[0]}")
    if lists:
        return read_json_pairs(lists[0], skip_outside)
    found = ", ".join(sorted(p.name for p in path.glob("[!.]*"))[:8]) or "nothing"
    raise DataError(f"{path}: no pairs (found {found}); expected one of\n  {SPAIR}\n  {PF_PASCAL}\n  {JSON}")


def _pair_lists(folder: Path) -> list[Path]:
    """The JSON files with "pairs" in their names; all JSON files where there is none of these. No hidden files."""
    files = sorted(
        path for path in folder.glob("*") if path.suffix.lower() == ".json" and not path.name.startswith(".")
    )
    return [path for path in files if "pairs" in path.name.lower()] or files


def _read_json(path: Path):
    try:
        return read_json(path, object)
    except CleanDIFTError as error:
        raise DataError(str(error)) from None


def _read_mat(path: Path) -> tuple[np.ndarray, float]:
    """Keypoints N x 2 (NaN: not seen), and the longer side of the box."""
    with needs("eval"):
        from scipy.io import loadmat
    try:
        mat = loadmat(path)
        left, top, right, bottom = np.asarray(mat["bbox"], dtype=np.float64).ravel()
        return np.asarray(mat["kps"], dtype=np.float64).reshape(-1, 2), float(max(right - left, bottom - top))
    except Exception as error:  # damaged .mat files raise nearly anything
        raise DataError(f"{path}: not an annotation of PF-PASCAL with kps and bbox ({error!r})") from None


def _columns(line: dict[str, str], side: str, label: str) -> np.ndarray:
    try:
        x, y = ([float(v) for v in line[f"{axis}{side}"].split(";") if v] for axis in "XY")
        return np.array([x, y]).T
    except (KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{label}: columns X{side} and Y{side} must hold numbers with ; between ({error!r})") from None


def categories(pairs: Sequence[Pair]) -> list[str]:
    """Names of categories, sorted."""
    return sorted({pair.category for pair in pairs if pair.category})
