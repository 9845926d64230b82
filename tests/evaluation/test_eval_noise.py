"""The noise share against variances that were put in, and against a loop."""

import math

import pytest
import torch

from cleandift_backbones.evaluation.tasks.noise import noise_shares, variance_shares
from cleandift_backbones.features.extractor import ModelError, load_extractor


def test_the_variances_that_were_put_in_come_out():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    features = 3 + 2 * draw(40, 1, 500) + 1 * draw(1, 30, 500) + 0.5 * draw(40, 30, 500)
    shares = variance_shares(features)  # variances 4, 1, 0.25
    assert shares.image == pytest.approx(4 / 5.25, abs=0.01) and shares.noise == pytest.approx(1 / 5.25, abs=0.01)
    assert shares.image + shares.noise + shares.both == pytest.approx(1)


def test_the_formula_by_hand():
    # f = [[1, 3], [5, 11]]: means 5; images 2, 8; noises 3, 7; rest (1, -1, -1, 1)
    shares = variance_shares(torch.tensor([[1.0, 3.0], [5.0, 11.0]]).view(2, 2, 1))
    # MS_A = 2 * (9 + 9) = 36, MS_B = 2 * (4 + 4) = 16, MS_E = 4: variances 16, 6, 4
    assert (shares.image, shares.noise, shares.both) == pytest.approx((16 / 26, 6 / 26, 4 / 26))


def test_intervals_are_the_jackknifes():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(7, 1, 20, generator=generator) + 0.7 * torch.randn(7, 4, 20, generator=generator)
    shares = variance_shares(features)
    left = [variance_shares(features[[k for k in range(7) if k != i]]).image for i in range(7)]
    error = math.sqrt(6 / 7 * sum((x - sum(left) / 7) ** 2 for x in left))
    assert shares.intervals["image"] == pytest.approx((shares.image - 1.96 * error, shares.image + 1.96 * error))
    assert 0 < error < 0.2 and variance_shares(features[:2]).intervals == {}


def test_intervals_hold_what_was_put_in():
    """95 % intervals of many draws: most hold the true share, 1 / (1 + 0.25)."""
    generator, held = torch.Generator().manual_seed(2), 0
    for _ in range(60):
        features = torch.randn(16, 1, 30, generator=generator) + 0.5 * torch.randn(16, 4, 30, generator=generator)
        low, high = variance_shares(features).intervals["image"]
        held += low <= 0.8 <= high
    assert 52 <= held <= 60


def test_pure_cases_and_refusals():
    image = torch.randn(6, 1, 9).expand(6, 4, 9)
    assert variance_shares(image).image == pytest.approx(1)
    assert variance_shares(image.transpose(0, 1)).noise == pytest.approx(1)
    with pytest.raises(ValueError, match="1 images under 4 noises"):
        variance_shares(image[:1])
    with pytest.raises(ValueError, match="all features are equal"):
        variance_shares(torch.ones(2, 2, 3))


def test_noise_grows_with_the_timestep():
    pictures = torch.rand(3, 3, 64, 64)
    shares = {}
    for step in (1, 900):
        noisy = load_extractor("dift_tiny", "us6", size=64, ensemble_size=1, timestep=step)
        shares[step] = noise_shares(noisy, pictures, noises=3)["us6"]
    assert shares[1].image > 0.9 and shares[900].noise + shares[900].both > 0.5
    with pytest.raises(ModelError, match="draws no noise; give a dift_"):
        noise_shares(load_extractor("pixels"), pictures)
    with pytest.raises(ModelError, match="averages noises"):
        noise_shares(load_extractor("dift_tiny", "us6", size=64, ensemble_size=2), pictures)
