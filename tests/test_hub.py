"""torch.hub entrypoints, as a user calls them, from a local checkout."""

from pathlib import Path

import pytest
import timm
import torch

import hubconf

ROOT = str(Path(__file__).parents[1])
NAMES = {f"{kind}_{arch}" for kind in ("cleandift", "dift") for arch in ("sd15", "sd21", "tiny")} | {
    f"cleandift_{arch}_pyramid" for arch in ("sd15", "sd21", "tiny")
}


def test_list_leaks_nothing():
    assert set(torch.hub.list(ROOT, source="local")) == NAMES
    assert hubconf.dependencies


@pytest.mark.parametrize("name", sorted(NAMES))
def test_help(name):
    text = torch.hub.help(ROOT, name, source="local")
    assert name.split("_")[1] in text.lower() or "Stable Diffusion" in text


def test_load_equals_timm():
    x = torch.randn(1, 3, 64, 64)
    model = torch.hub.load(ROOT, "cleandift_tiny", source="local", pretrained=True, features_only=True).eval()
    same = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).eval()
    for a, b in zip(model(x), same(x)):
        torch.testing.assert_close(a, b)
