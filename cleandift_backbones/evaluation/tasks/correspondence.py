"""Keypoints of pairs: the task correspondence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...features.extractor import ModelError
from ..task import Options, Task, limited, option, register_task
from . import matching
from .matching import ALPHAS
from .pairs import PairSet, read_pairs


@dataclass(frozen=True)
class CorrespondenceOptions(Options):
    """Of the task correspondence."""

    split: str = option("test", "of SPair-71k and PF-PASCAL")
    alpha: tuple[float, ...] = option(ALPHAS, "thresholds of PCK", low=1e-6, high=10, metavar="A")
    resize: str = option("squash", "pictures to the model's input", choices=("squash", "pad"))
    soft_argmax: int = option(0, "its window's side, odd; 0: argmax", low=0, metavar="PIXELS")
    temperature: float = option(0.04, "of the soft-argmax", low=1e-9)
    skip_outside: bool = option(False, "leave out keypoints outside their pictures")

    def __post_init__(self):
        super().__post_init__()
        if self.soft_argmax and (self.soft_argmax < 3 or self.soft_argmax % 2 == 0):
            raise ModelError(
                f"--soft-argmax {self.soft_argmax} has no middle pixel with others around; give 3, 5, 7, ..., or 0"
            )


@register_task
class Correspondence(Task):
    """Keypoints of pairs, see `matching`."""

    name = "correspondence"
    about = "keypoints of SPair-71k, PF-PASCAL or a JSON file of pairs: PCK"
    text = """PCK: the share of keypoints found near the true point; bbox@0.1: within 0.1 of the longer side
of the target's box, img@0.1: of the target image. Per point pools all points, per image is the mean over pairs.
Features upsampled bilinearly to the images' size, cosine similarity."""
    Options = CorrespondenceOptions
    ensemble = 8
    counted = "pairs"

    unit = "target pictures"

    def __init__(self, data: PairSet, alphas: Sequence[float], mode="squash", window=0, temperature=0.04):
        super().__init__(data.items)
        self.data, self.alphas, self.mode = data, alphas, mode
        self.window, self.temperature = window, temperature
        points = sum(len(pair.source_points) for pair in data.pairs)
        self.facts |= dict(data_set=data.name, pairs=len(data.pairs), points=points, points_skipped=data.skipped)
        self.facts |= dict(mode=mode, answer=f"soft-argmax, window {window}, T={temperature}" if window else "argmax")

    @classmethod
    def read(cls, data, options, limit=None, seed=0):
        found = limit_pairs(read_pairs(data, options.split, options.skip_outside), limit, seed)
        alphas = sorted(options.alpha, key=lambda alpha: alpha != 0.1)  # 0.1, where it is asked for, leads
        return cls(found, alphas, options.resize, options.soft_argmax, options.temperature)

    def measure(self, features, size, progress=True):
        found = matching.match_pairs(
            features, self.data, self.mode, size, self.window, self.temperature, progress=progress
        )
        return matching.pck_tallies(found, self.data, self.alphas)

    def same_position(self):
        """What the place of a point alone is worth: as `measure`, without features."""
        return matching.pck_tallies(matching.same_position(self.data), self.data, self.alphas)

    def main(self, metrics):
        return tuple(key for key in metrics if f"@{self.alphas[0]:g} " in key and "," not in key)

    def heading(self, metric):
        return f"PCK {metric}"


def limit_pairs(data: PairSet, limit: int | None, seed: int) -> PairSet:
    """Fewer pairs, and only the pictures that they need."""
    pairs = [data.pairs[i] for i in limited(data.pairs, limit, seed)]
    used = sorted({i for pair in pairs for i in (pair.source, pair.target)})
    place = {old: new for new, old in enumerate(used)}
    pairs = [replace(pair, source=place[pair.source], target=place[pair.target]) for pair in pairs]
    return replace(data, pairs=pairs, items=[data.items[i] for i in used], sizes=[data.sizes[i] for i in used])
