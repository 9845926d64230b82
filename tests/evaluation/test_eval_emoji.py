"""The emoji benchmark's subgroups and figures."""

import math

import numpy as np
import pytest
import torch
from test_emoji import folder, read  # noqa: F401 (a fixture)

from cleandift_backbones.evaluation import emoji, emoji_probes
from cleandift_backbones.features.extractor import load_extractor


def test_subgroups_by_hand():
    # angle, concept, subgroup; k = 2 nearest of other concepts
    told = [(0, "a", "x"), (1, "a", "x"), (10, "b", "x"), (16, "c", "y"), (25, "d", "y")]
    told += [(90, "e", "z"), (95, "f", "")]
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a, _, _ in told])
    hits, counted = emoji_probes.subgroup_hits(vectors, [t[1] for t in told], [t[2] for t in told], k=2)
    # every vote is a tie of x and y: 0 and 1: 10, 16; 10: 16, 1; 16: 10, 25; 25: 16, 10; the first name wins
    assert hits.tolist() == [True, True, True, False, False, False, False]
    assert counted.tolist() == [True] * 5 + [False] * 2  # z has one concept, f no subgroup
    _, counted = emoji_probes.subgroup_hits(vectors, [t[1] for t in told], [t[2] for t in told], k=6)
    assert counted.tolist() == [False, False, True, True, True, False, False]  # of a, only five pictures are others


def test_figures_that_are_linear_in_the_features_are_found():
    generator = torch.Generator().manual_seed(0)
    alphas = (torch.rand(12, 4, 4, generator=generator) > 0.6).float().repeat_interleave(8, 1).repeat_interleave(8, 2)
    cells = alphas[:, ::8, ::8]
    maps = torch.randn(12, 5, 4, 4, generator=generator)
    maps[:, 2] = 7 - 3 * cells
    fitted = torch.arange(12) < 6
    hits, unions = emoji_probes.figure_counts(maps, alphas, fitted)
    assert torch.equal(hits, unions) and hits.sum() == 6 * 32 * 32
    maps[:, 2] = 0  # nothing to go by: ground everywhere, its IoU its share
    hits, unions = emoji_probes.figure_counts(torch.zeros_like(maps), alphas, fitted)
    ground = (alphas[6:] < 0.5).sum()
    assert hits.sum(0).tolist() == [ground, 0] and unions.sum(0).tolist() == [6 * 1024, 6 * 1024 - ground]


def test_the_benchmark_measures_them(folder):  # noqa: F811
    lines = (folder / "data/heldout/metadata.jsonl").read_text()
    for number in range(5):
        group = "ab"[number % 2]
        old, new = (f'"concept": "C{number}", "subgroup": "{name}"' for name in ("", group))
        lines = lines.replace(old, new)
    (folder / "data/heldout/metadata.jsonl").write_text(lines)
    suite = read(folder)
    assert set(suite.subgroups) == {"a", "b"} and suite.alphas.shape == (15, 96, 96)
    assert suite.alphas[0, 50, 50] == 1 and suite.alphas[0, 0, 0] == 0
    pixels = load_extractor("pixels", size=96)
    tallies = emoji.EmojiBenchmark(suite, seed=1).run(pixels, progress=False)["pixels"]
    assert tallies["subgroup"].trials.sum() == 15 and 0 <= tallies["subgroup"].rate <= 1
    # a coloured body on grey: pixels tell figure from ground, up to the body's border within a cell
    assert tallies["figure"].rate > 0.9 and (tallies["figure"].trials.sum(1) > 0).sum() == 3
    assert np.isfinite(tallies["figure"].resampled(np.ones((1, 5)))).all()
    suite.alphas = None
    assert "figure" not in emoji.EmojiBenchmark(suite, seed=1).run(pixels, progress=False)["pixels"]


def test_halves_split_concepts():
    concepts = [f"c{i // 3}" for i in range(30)]
    fitted = emoji_probes.halves(concepts, 0)
    assert fitted.sum() == 15 and len({(c, f) for c, f in zip(concepts, fitted.tolist(), strict=True)}) == 10
    assert emoji_probes.halves(concepts, 1).tolist() != fitted.tolist()


@pytest.mark.parametrize("k", [1, 3])
def test_no_subgroups_count_nothing(k):
    vectors = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    hits, counted = emoji_probes.subgroup_hits(vectors, list("abcd"), [""] * 4, k)
    assert not hits.any() and not counted.any()
