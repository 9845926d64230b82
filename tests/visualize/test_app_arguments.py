"""app.match, maps and compare from Python with arguments of other forms."""

import numpy as np
import pytest
import torch
from PIL import Image

from cleandift_backbones.utils.errors import InputError, InputTypeError
from cleandift_backbones.visualize import compare, maps, match
from cleandift_backbones.visualize.pictures import sample_names

SAMPLES = list(sample_names()[:2])


@pytest.mark.parametrize(
    "pictures",
    ["cat.png", None, [Image.new("RGB", (64, 64))], Image.new("RGB", (64, 64)), [np.zeros((64, 64, 3))], [None],
     [*SAMPLES, torch.zeros(3, 64, 64)]],
)  # fmt: skip
def test_pictures_that_are_no_list_of_files(pictures):
    for ask in (lambda: match(pictures, []), lambda: maps(pictures), lambda: compare(pictures)):
        with pytest.raises(InputTypeError, match="pictures must be a list of paths, or of the bytes"):
            ask()


@pytest.mark.parametrize(
    "points", [[(0.5, 0.5)], (0, 0.5, 0.5), [("a", 0, 0)], [(float("nan"), 0, 0)], [(0.5, 0.5, 0.5)], [(0, None, 0)]]
)
def test_points_of_another_form(points, features):
    for ask in (match, compare):
        with pytest.raises(InputError, match=r"point .* is not \(picture, x, y\)"):
            ask(SAMPLES, points, features=features)


@pytest.mark.parametrize("points", [np.array([[1, 0.25, 0.5]]), torch.tensor([[1, 0.25, 0.5]]), [(True, 0.25, 0.5)]])
def test_points_of_arrays(points, features):
    assert match(SAMPLES, points, features=features).points == [(1, 0.25, 0.5)]


def test_no_points(features):
    assert match(SAMPLES, None, features=features).points == []
