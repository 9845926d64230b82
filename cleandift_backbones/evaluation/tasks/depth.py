"""Monocular depth by a linear probe on NYUv2's layout: the bins probe, its loss and the usual measures.

The paper's protocol (AdaBins' expectation over bins, Bhat et al. 2021, with uniform bins): a 1x1
convolution from us6 at 768x768, not upsampled, to 256 bins, prompt "A photo of a room".

Left open by the paper, and done here as in the field (Eigen et al. 2014): predictions are upsampled
bilinearly to the depth map, only the Eigen crop of 480x640 maps counts, pixels from 1 mm to 10 m count, and measures
are means over pictures of each picture's own. Training compares at the map's size, with each cell's mean depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ...data.sources import ImageSource, file_source
from ...utils.atomic import DamagedFileError, open_tensors, replacing
from ...utils.errors import needs
from ...utils.records import split_words
from ..bootstrap import Tally
from ..items import DataError, check_answers, limit_scenes, read_lines, read_target, require
from ..probes import ProbeOptions, ProbeSettings, train_probe
from ..task import Task, option, register_task

PROMPT = "A photo of a room"
BINS, NEAREST, FARTHEST = 256, 0.1, 10.0
EIGEN = (slice(45, 471), slice(41, 601))  # rows and columns of a 480x640 map
MEASURES = ("rmse", "abs_rel", "delta1", "delta2", "delta3")
LAYOUT = (
    "nyu_SPLIT.txt (or SPLIT.txt), a line per picture: PICTURE DEPTH.png [FOCAL LENGTH], depths 16-bit PNG in mm; or "
    "nyu_depth_v2_labeled.mat with splits.mat"
)


@dataclass
class DepthSet:
    """Pictures with depths: `depths[i]()` gives H x W float32 in metres, 0 where unknown; `files`: where they lie."""

    items: list[ImageSource]
    depths: list[Callable[[], np.ndarray]]
    files: list[tuple[Path, Path]] = field(default_factory=list)


def read_nyu(root: str | Path, split: str = "test") -> DepthSet:
    """A split, "train" or "test", of NYUv2 in either of its layouts.

    Lists (as of BTS and its followers): nyu_SPLIT.txt names pictures and 16-bit depths in mm, below the folder, with or
    without a leading slash. The labelled .mat (HDF5, read by h5py): `images` N x 3 x W x H, `depths` N x W x H in m;
    splits.mat holds `trainNdxs` and `testNdxs`, counted from 1.

    Raises:
        DataError: neither layout, missing files or splits.
    """
    root = Path(root)
    folder, mat = (root.parent, root) if root.suffix == ".mat" else (root, root / "nyu_depth_v2_labeled.mat")
    if mat.is_file():
        return _read_labelled(mat, folder / "splits.mat", split)
    table = next((p for p in (root / f"nyu_{split}.txt", root / f"{split}.txt") if p.is_file()), None)
    if table is None:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) if root.is_dir() else "nothing"
        raise DataError(f"{root}: no split {split!r} of NYUv2 (found {found}); expected {LAYOUT}")
    images, depths = [], []
    for number, line in enumerate(read_lines(table, LAYOUT), 1):
        words = split_words(line)
        if len(words) < 2:
            raise DataError(f"{table}, line {number}: {line!r}; expected {LAYOUT}")
        if words[1] == "None":  # BTS's lists of other data sets mark pictures without depth so
            continue
        images.append(root / words[0].lstrip("/"))
        depths.append(root / words[1].lstrip("/"))
    require([(path, table) for path in images], "pictures", LAYOUT)
    require([(path, table) for path in depths], "depth maps", LAYOUT)
    items = [file_source(path, root, PROMPT) for path in images]
    return DepthSet(items, [partial(read_depth, path) for path in depths], list(zip(images, depths, strict=True)))


def read_depth(path: Path) -> np.ndarray:
    """A 16-bit PNG in millimetres as metres, H x W. Raises DataError for anything else."""
    mode, depth = read_target(path, "depth map")
    if not mode.startswith("I"):
        raise DataError(f"{path}: colour mode {mode}; expected a 16-bit grey PNG in millimetres")
    return depth.astype(np.float32) / 1000


def _read_labelled(mat: Path, splits: Path, split: str) -> DepthSet:
    with needs("eval"):
        import h5py
        from scipy.io import loadmat
    if not splits.is_file():
        raise DataError(f"{splits} is missing; it tells which pictures of {mat.name} are for training")
    try:
        indices = loadmat(splits)[f"{split}Ndxs"].ravel().astype(int) - 1
        with h5py.File(mat, "r") as file:
            count, shapes = len(file["images"]), (file["images"].shape, file["depths"].shape)
    except Exception as error:  # damaged .mat files raise nearly anything
        raise DataError(f"{mat} or {splits.name}: not NYUv2's labelled files ({error}); expected {LAYOUT}") from None
    if len(shapes[0]) != 4 or shapes[0][1] != 3 or shapes[1] != (shapes[0][0], *shapes[0][2:]):
        raise DataError(f"{mat}: images {shapes[0]} and depths {shapes[1]}; expected N x 3 x W x H and N x W x H")
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= count:
        raise DataError(f"{splits}: {split}Ndxs must number the {count} pictures of {mat.name}, from 1 on")

    def depth(index: int) -> np.ndarray:
        with h5py.File(mat, "r") as file:
            return np.ascontiguousarray(file["depths"][index].T).astype(np.float32)

    items = [_LabelledSource(f"{mat.name}/{i}", str(mat), caption=PROMPT, index=i) for i in indices.tolist()]
    return DepthSet(items, [partial(depth, i) for i in indices.tolist()])


@dataclass(frozen=True)
class _LabelledSource(ImageSource):
    """An image of NYUv2's labelled .mat."""

    index: int = 0

    def read(self) -> Image.Image:
        import h5py

        with h5py.File(self.path, "r") as file:
            return Image.fromarray(np.ascontiguousarray(file["images"][self.index].transpose(2, 1, 0)))


class BinsProbe(nn.Module):
    """Features N x C x h x w -> depth in metres N x h x w.

    A 1x1 convolution gives a score for each of 256 depths, uniform over 0.1..10 m; max(score, 0) + 0.1, divided by
    their sum, are weights, and the weighted mean depth is the answer.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.register_buffer("depths", torch.linspace(NEAREST, FARTHEST, conv.out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return expected_depth(self.conv(x), self.depths)

    def save(self, path: str | Path) -> None:
        """Writes the convolution as safetensors: `weight` K x C x 1 x 1, `bias` K."""
        with replacing(path) as aside:
            save_file({name: x.contiguous() for name, x in self.conv.state_dict().items()}, aside)

    @classmethod
    def load(cls, path: str | Path, channels: int) -> BinsProbe:
        """Reads a probe file, the published one (cleandift_sd21_depth_probe) or one of `save`; tensors are known by
        shape.

        Raises:
            DataError: no safetensors file, or not a 1x1 convolution from `channels` to 256.
        """
        try:
            with open_tensors(path) as file:
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except DamagedFileError as error:
            raise DataError(f"{path}: not a safetensors file ({error.__cause__})") from None
        weights = [x for x in tensors.values() if x.numel() == BINS * channels and x.shape[0] == BINS]
        biases = [x for x in tensors.values() if x.shape == (BINS,)]
        if len(weights) != 1 or len(biases) > 1 or len(weights) + len(biases) != len(tensors):
            found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in list(tensors.items())[:4])
            raise DataError(f"{path}: expected a 1x1 convolution {channels} -> {BINS}, found {found}")
        conv = nn.Conv2d(channels, BINS, 1, bias=bool(biases))
        conv.load_state_dict(
            {"weight": weights[0].view(BINS, channels, 1, 1)} | ({"bias": biases[0]} if biases else {})
        )
        return cls(conv.eval().requires_grad_(False))


def expected_depth(scores: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Scores N x K x h x w and K depths -> N x h x w, see `BinsProbe`."""
    weights = scores.relu() + 0.1
    return torch.einsum("nkhw,k->nhw", weights / weights.sum(1, keepdim=True), depths)


def sig_loss(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Scale-invariant log loss of two sets of depths in metres: sqrt(var(g) + 0.15 mean(g)^2), g = log p - log t.

    After Eigen et al. 2014 and AdaBins; the variance is the unbiased one.
    """
    g = predicted.log() - truth.log()
    return (g.var() + 0.15 * g.mean().square()).clamp_min(1e-12).sqrt()


def cell_depths(depth: np.ndarray, cells: tuple[int, int]) -> torch.Tensor:
    """Mean depth of the pixels that each cell of an h x w map covers, 0 where none is known: h x w."""
    (h, w), (height, width) = cells, depth.shape
    place = ((np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width).ravel()
    known = (depth >= 1e-3) & (depth <= FARTHEST)
    counts = np.bincount(place, known.ravel(), minlength=h * w)
    total = np.bincount(place, np.where(known, depth, 0).ravel(), minlength=h * w)
    return torch.from_numpy((total / np.maximum(counts, 1)).astype(np.float32)).view(h, w)


def train_depth(features, data: DepthSet, settings: ProbeSettings | None = None, progress=True) -> BinsProbe:
    """The bins probe, trained by `sig_loss` over each batch's cells. Raises DataError if no depth is known."""
    cells = tuple(features[0].shape[1:])
    truth = torch.stack([cell_depths(depth(), cells) for depth in data.depths])
    if not (truth > 0).any():
        raise DataError(f"all {len(truth)} depth maps are empty: no pixel lies between 1 mm and {FARTHEST:g} m")
    depths = torch.linspace(NEAREST, FARTHEST, BINS)

    def loss(scores: torch.Tensor, indices: list[int]) -> torch.Tensor | None:
        target = truth[indices]
        known = target > 0
        return sig_loss(expected_depth(scores, depths)[known], target[known]) if known.sum() > 1 else None

    return BinsProbe(train_probe(features, BINS, loss, settings, progress))


def measures(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """RMSE in m, mean |p - t| / t, and shares of max(p / t, t / p) < 1.25, 1.25^2, 1.25^3, of two vectors of depths."""
    ratio = np.maximum(predicted / truth, truth / predicted)
    values = [np.sqrt(np.mean((predicted - truth) ** 2)), np.mean(np.abs(predicted - truth) / truth)]
    return dict(zip(MEASURES, map(float, [*values, *((ratio < 1.25**n).mean() for n in (1, 2, 3))])))


def evaluate_depth(probe: BinsProbe, features, data: DepthSet, eigen_crop: bool = True) -> dict[str, Tally]:
    """All measures, means over the pictures that have known depths. Raises DataError if none has."""
    sums = {name: np.zeros((2, len(data.items), 1)) for name in MEASURES}
    for i, read in enumerate(data.depths):
        truth = read()
        with torch.inference_mode():
            predicted = probe(features[i][None].float())[None]
            predicted = F.interpolate(predicted, truth.shape, mode="bilinear", align_corners=False)[0, 0].numpy()
        if eigen_crop and truth.shape == (480, 640):
            truth, predicted = truth[EIGEN], predicted[EIGEN]
        known = (truth >= 1e-3) & (truth <= FARTHEST)
        if known.any():
            for name, value in measures(predicted[known], truth[known]).items():
                sums[name][:, i, 0] = value, 1
    if not sums["rmse"][1].any():
        raise DataError(f"all {len(data.items)} depth maps are empty: no pixel lies between 1 mm and {FARTHEST:g} m")
    return {name: Tally(*values) for name, values in sums.items()}


@dataclass(frozen=True)
class DepthOptions(ProbeOptions):
    """Of the task depth."""

    probe: str | None = option(None, "a probe's safetensors, used as it is: nothing is trained", metavar="FILE")
    no_eigen_crop: bool = option(False, "count the borders of 480x640 depths too")


@register_task
class Depth(Task):
    """The bins probe's errors; trained, or `probe_file` taken as it is."""

    name = "depth"
    about = "a linear probe on NYUv2's layout: RMSE, AbsRel, delta"
    text = """A 1x1 convolution on the map to 256 bins over 0.1..10 m, trained by the scale-invariant log loss on
cached features; predictions upsampled bilinearly. Measures are means over pictures."""
    Options = DepthOptions
    timestep = 299
    memory_option = "--probe-batch"

    lower = frozenset({"RMSE (m)", "AbsRel"})

    def __init__(self, train: DepthSet | None, test: DepthSet, settings: ProbeSettings, probe_file=None, crop=True):
        super().__init__((train.items if train else []) + test.items)
        check_answers((train.files if train else []) + test.files, "depth maps")
        self.train, self.test, self.settings, self.probe_file, self.crop = train, test, settings, probe_file, crop
        self.facts |= dict(train_pictures=len(train.items) if train else 0, test_pictures=len(test.items))
        self.facts |= dict(probe=str(probe_file or settings), eigen_crop=crop)

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        train = None if options.probe else limit_scenes(read_nyu(data, "train"), limit, seed)
        test = limit_scenes(read_nyu(data, "test"), limit, seed)
        return cls(train, test, options.probe_settings(seed), options.probe, not options.no_eigen_crop)

    def measure(self, features, size, progress=True):
        count = len(self.train.items) if self.train else 0
        if self.train:
            probe = train_depth(features.part(0, count), self.train, self.settings, progress)
        else:
            probe = BinsProbe.load(self.probe_file, features[0].shape[0])
        found = evaluate_depth(probe, features.part(count), self.test, self.crop)
        names = dict(rmse="RMSE (m)", abs_rel="AbsRel", delta1="delta < 1.25", delta2="delta < 1.25^2")
        return {names.get(key, "delta < 1.25^3"): value for key, value in found.items()}
