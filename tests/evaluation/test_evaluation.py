"""Evaluation against plain references: matching, PCK, retrieval, bootstrap, extraction."""

import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import cleandift_backbones  # noqa: F401
from cleandift_backbones.evaluation import bootstrap, cross_style
from cleandift_backbones.evaluation.bootstrap import Tally
from cleandift_backbones.features import correspondence
from cleandift_backbones.features.extractor import ModelError, extract, list_maps, load_extractor, resolve_device

# --- correspondence ---------------------------------------------------------------------------------------------------


def plain_match(source, target, points, source_size, target_size):
    """The protocol written down: upsample both maps, read the source pixel, cosine with every target pixel, argmax."""
    a = F.interpolate(source[None], source_size, mode="bilinear", align_corners=False)[0]
    b = F.interpolate(target[None], target_size, mode="bilinear", align_corners=False)[0]
    found, maps = [], []
    for x, y in points.tolist():
        vector = a[:, round(y), round(x)]
        scores = F.cosine_similarity(b, vector[:, None, None], dim=0)
        best = int(scores.argmax())
        found.append((best % target_size[1], best // target_size[1]))
        maps.append(scores)
    return torch.tensor(found, dtype=torch.float32), torch.stack(maps)


@pytest.mark.parametrize(
    ("source_cells", "target_cells", "source_size", "target_size"),
    [
        ((8, 8), (8, 8), (64, 64), (64, 64)),
        ((5, 9), (7, 4), (60, 101), (75, 50)),
        ((1, 1), (3, 1), (32, 20), (33, 17)),
        ((32, 32), (40, 36), (20, 24), (30, 18)),  # maps finer than the pictures
    ],
)
def test_matching_equals_the_plain_reference(source_cells, target_cells, source_size, target_size):
    generator = torch.Generator().manual_seed(sum(source_cells) + sum(target_size))
    source = torch.randn(13, *source_cells, generator=generator)
    target = torch.randn(13, *target_cells, generator=generator)
    limits = torch.tensor([source_size[1] - 1, source_size[0] - 1])
    points = torch.rand(6, 2, generator=generator) * limits
    points[0], points[1] = torch.zeros(2), limits  # the corners too
    found, scores = correspondence.match_points(source, target, points, source_size, target_size)
    expected, expected_scores = plain_match(source, target, points, source_size, target_size)
    assert scores.shape == (6, *target_size)
    assert torch.allclose(scores, expected_scores, atol=1e-5)
    at = [s[int(y), int(x)] for s, (x, y) in zip(expected_scores, found.tolist(), strict=True)]
    best = expected_scores.flatten(1).amax(1)
    assert torch.allclose(torch.stack(at), best, atol=1e-5)  # the same maximum, also where it is a plateau
    if target_cells == (8, 8):  # away from the border, where upsampling repeats pixels, the very same pixel
        inner = ((expected > 4) & (expected < 59)).all(1)
        assert inner.any() and torch.equal(found[inner], expected[inner])


def test_a_picture_matches_itself():
    maps = torch.randn(32, 6, 6, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[10.0, 20.0], [40.0, 33.0]])
    found, _ = correspondence.match_points(maps, maps, points, (48, 48), (48, 48))
    assert torch.equal(found, points)


def test_matching_takes_half_precision_and_refuses_nonsense():
    maps = torch.randn(4, 6, 6)
    correspondence.match_points(maps.half(), maps.half(), torch.tensor([[1.0, 1.0]]), (48, 48), (48, 48))
    with pytest.raises(ValueError, match=r"\(48\.0, 3\.0\) lies outside the picture of 48x48"):
        correspondence.match_points(maps, maps, torch.tensor([[48.0, 3.0]]), (48, 48), (48, 48))
    with pytest.raises(ValueError, match="4 and 5 channels"):
        correspondence.match_points(maps, torch.randn(5, 6, 6), torch.tensor([[1.0, 1.0]]), (48, 48), (48, 48))


def test_heat_map_peaks_at_the_match():
    source, target = torch.randn(8, 6, 6), torch.randn(8, 6, 6)
    heat = correspondence.heat_map(source, target, (11, 30), (48, 48), (40, 56))
    found, _ = correspondence.match_points(source, target, torch.tensor([[11.0, 30.0]]), (48, 48), (40, 56))
    assert heat.shape == (40, 56) and heat.min() == 0 and heat.max() == 1
    x, y = found[0].int().tolist()
    assert heat[y, x] == 1


def test_pck_equals_a_loop():
    rng = random.Random(0)
    predicted = [(rng.uniform(0, 90), rng.uniform(0, 90)) for _ in range(200)]
    truth = [(rng.uniform(0, 90), rng.uniform(0, 90)) for _ in range(200)]
    sizes = [rng.uniform(50, 500) for _ in range(200)]
    for alpha in (0.05, 0.1):
        hits = [
            math.hypot(p[0] - t[0], p[1] - t[1]) <= alpha * s for p, t, s in zip(predicted, truth, sizes, strict=True)
        ]
        found = correspondence.pck(torch.tensor(predicted), torch.tensor(truth), torch.tensor(sizes), alpha)
        assert found.tolist() == hits and 0 < sum(hits) < 200
    on_the_line = correspondence.pck(torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]]), 100)
    assert on_the_line.item()  # the limit itself counts


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_retrieval_by_hand():
    # angles of unit vectors; style A: concepts x, y, z; style B: x, y; style C: y only
    angles = [("x", "A", 0), ("y", "A", 90), ("z", "A", 44), ("x", "B", 10), ("y", "B", 46), ("y", "C", 200)]
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for *_, a in angles])
    hits = cross_style.cross_style_hits(vectors, [a[0] for a in angles], [a[1] for a in angles])
    assert hits == {
        ("A", "B"): {"x": True, "y": True},  # z is not drawn in B
        ("B", "A"): {"x": True, "y": False},  # y in B lies next to z in A
        ("A", "C"): {"y": True},
        ("C", "A"): {"y": True},
        ("B", "C"): {"y": True},
        ("C", "B"): {"y": True},
    }
    assert cross_style.retrieval_accuracy(hits) == pytest.approx((1 + 0.5 + 4) / 6)


def test_retrieval_refuses_what_it_cannot_do():
    vectors = torch.eye(2)
    with pytest.raises(ValueError, match="two pictures of concept 'x' in style 'A'"):
        cross_style.cross_style_hits(vectors, ["x", "x"], ["A", "A"])
    with pytest.raises(ValueError, match="no concept is drawn in two styles"):
        cross_style.cross_style_hits(vectors, ["x", "y"], ["A", "B"])
    with pytest.raises(ValueError, match="'mean' is unknown; choose one of pooled, whole"):
        cross_style.embed(torch.zeros(1, 2, 3, 3), "mean")


def test_embeddings():
    maps = torch.randn(5, 3, 4, 2)
    array = maps.numpy()
    pooled = array.mean((2, 3))
    assert np.allclose(cross_style.embed(maps), pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-6)
    flat = array.reshape(5, -1) - array.reshape(5, -1).mean(0)
    expected = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.allclose(cross_style.embed(maps, "whole"), expected, atol=1e-6)


def test_cosines_are_bounded_where_neighbours_are_opposite():
    """A checkerboard of a vector and its opposite: between cells nothing is left of them."""
    signs = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    vector = torch.randn(40, generator=torch.Generator().manual_seed(0))
    maps = (vector[:, None, None] * signs)[None]
    for size in ((40, 56), (16, 16), (33, 47)):
        scores = correspondence.score_maps(vector[None, None], maps, size)
        assert scores.abs().max() <= 1.03 and scores.max() > 0.999
        norms = F.interpolate(maps, size, mode="bilinear").norm(dim=1)
        found = correspondence.upsampled_norm(maps, size)
        far = norms > 0.01 * vector.norm()
        assert torch.allclose(found[far], norms[far], rtol=2e-2) and (found < 0.011 * vector.norm())[~far].all()


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_rates_and_intervals():
    tally = Tally(np.array([[1.0, 0], [0, 0], [1, 1]]), np.array([[1.0, 0], [1, 1], [2, 1]]))
    assert tally.rate == pytest.approx((2 / 4 + 1 / 2) / 2)
    empty_group = Tally(np.array([[1.0, 0]]), np.array([[2.0, 0]]))
    assert empty_group.rate == 0.5  # a group without trials is left out
    rng = np.random.default_rng(0)
    hits = (rng.random((400, 1)) < 0.3).astype(float)
    tally = Tally(hits, np.ones_like(hits))
    weights = bootstrap.unit_weights(400)
    low, high = bootstrap.rate_interval(tally, weights)
    error = 1.96 * math.sqrt(tally.rate * (1 - tally.rate) / 400)  # normal approximation
    assert low == pytest.approx(tally.rate - error, abs=0.01) and high == pytest.approx(tally.rate + error, abs=0.01)


def test_many_units_are_pooled_before_they_are_drawn():
    rng = np.random.default_rng(0)
    hits = (rng.random((50_000, 1)) < 0.3).astype(float)
    tally = Tally(hits, np.ones_like(hits))
    weights = bootstrap.unit_weights(len(hits))
    assert weights.nbytes < 70e6
    low, high = bootstrap.rate_interval(tally, weights)
    error = 1.96 * math.sqrt(0.21 / 50_000)
    assert low == pytest.approx(tally.rate - error, abs=6e-4) and high == pytest.approx(tally.rate + error, abs=6e-4)
    better = Tally(np.maximum(hits, (rng.random(hits.shape) < 0.01)), tally.trials)
    _, low, high = bootstrap.difference(better, tally, weights)
    assert high - low < error  # paired: both are pooled alike


def test_paired_difference_is_tighter_than_two_intervals():
    rng = np.random.default_rng(1)
    hits = (rng.random((200, 1)) < 0.5).astype(float)
    better = np.maximum(hits, (rng.random((200, 1)) < 0.1).astype(float))
    weights = bootstrap.unit_weights(200)
    ones = np.ones_like(hits)
    delta, low, high = bootstrap.difference(Tally(better, ones), Tally(hits, ones), weights)
    assert delta == pytest.approx(better.mean() - hits.mean()) and 0 < low < delta < high < 0.12
    assert bootstrap.difference(Tally(hits, ones), Tally(hits, ones), weights) == (0, 0, 0)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_cleandift"])
def test_extractor_gives_the_models_own_maps(name):
    """Convolutional, transformer, channels-last and diffusion models: all maps, in timm's normalisation."""
    size = 64
    torch.manual_seed(0)
    extractor = load_extractor(name, pretrained=False, size=size)
    infos = list_maps(name)
    assert extractor.maps == tuple(info["name"] for info in infos)
    pictures = torch.rand(3, 3, size, size)
    maps = extract(extractor, pictures, batch_size=2, progress=False)
    for info in infos:
        side = math.ceil(size / info["reduction"])
        assert maps[info["name"]].shape == (3, info["num_chs"], side, side)
    config = timm.data.resolve_model_data_config(extractor.model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        direct = extractor.model((pictures - mean) / std)
    for found, expected in zip(maps.values(), direct, strict=True):
        expected = expected.permute(0, 3, 1, 2) if name == "test_mambaout" else expected
        assert torch.allclose(found, expected, atol=1e-4)


def test_maps_by_name_and_index():
    assert load_extractor("test_cleandift", "us6", pretrained=False).maps == ("us6",)
    assert load_extractor("test_cleandift", -1, pretrained=False).maps == ("mid",)
    assert load_extractor("test_cleandift", ["mid", 0], pretrained=False).maps == ("mid", "us10")
    assert load_extractor("test_resnet", "layer2", pretrained=False).channels == (48,)
    with pytest.raises(ModelError, match="'us11' is not one of us10, us9, .*mid"):
        load_extractor("test_cleandift", "us11", pretrained=False)
    with pytest.raises(ModelError, match="map 5 is not one of"):
        load_extractor("test_resnet", 5, pretrained=False)


def test_bad_models_and_devices():
    with pytest.raises(ModelError, match="'cleandift_tinny' is unknown; did you mean cleandift_tiny"):
        load_extractor("cleandift_tinny")
    with pytest.raises(ModelError, match="'nowhere' cannot be used"):
        resolve_device("nowhere")
    with pytest.raises(ModelError, match="test_resnet.*colour_of_magic"):
        load_extractor("test_resnet", pretrained=False, colour_of_magic=8)


def test_pixels_are_the_picture_itself():
    extractor = load_extractor("pixels")
    picture = torch.rand(1, 3, 128, 128)
    maps = extract(extractor, picture, progress=False)["pixels"]
    assert maps.shape == (1, 3, 32, 32)
    half = F.interpolate(picture, 32, mode="bilinear", antialias=True)
    assert torch.allclose(maps, half * 2 - 1, atol=1e-5)


def test_extract_takes_all_kinds_of_pictures():
    arrays = [np.full((70, 90, 3), 200, np.uint8), Image.new("L", (64, 80), 200)]
    maps = extract(load_extractor("pixels", size=64), arrays, progress=False)["pixels"]
    assert maps.shape == (2, 3, 32, 32) and torch.allclose(maps, torch.tensor(200 / 127.5 - 1), atol=1e-5)
    with pytest.raises(ValueError, match="different sizes"):
        extract(load_extractor("pixels"), arrays, progress=False)
    with pytest.raises(ValueError, match="no pictures"):
        extract(load_extractor("pixels"), [], progress=False)
    with pytest.raises(ModelError, match="test_cleandift cannot take pictures of 32x32.*at least 64"):
        extract(load_extractor("test_cleandift", pretrained=False), torch.rand(1, 3, 32, 32), progress=False)


def test_noise_can_be_reseeded_and_latents_remembered():
    torch.manual_seed(0)
    noisy = load_extractor("dift_tiny", "mid", pretrained=False, ensemble_size=1)
    picture = torch.rand(2, 3, 64, 64)
    first = extract(noisy, picture, progress=False)["mid"]
    assert noisy.reseed(1)
    second = extract(noisy, picture, progress=False)["mid"]
    assert not torch.allclose(first, second, atol=1e-3)
    memory = {}
    noisy.remember_latents(memory)
    for _ in range(2):
        assert torch.allclose(extract(noisy, picture, progress=False)["mid"], second, atol=1e-4)
    assert len(memory) == 2
    with pytest.raises(ModelError, match="dift_tiny remembers latents already: optimize it before"):
        noisy.optimize()
    with pytest.raises(ModelError, match="dift_tiny remembers latents already"):
        noisy.remember_latents({})
    compiled = load_extractor("test_cleandift", pretrained=False)
    compiled.optimize(compile=True)
    with pytest.raises(ModelError, match="is compiled: what it encodes cannot be remembered"):
        compiled.remember_latents({})
    assert not load_extractor("pixels").reseed(1)
