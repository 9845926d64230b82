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


@pytest.fixture(autouse=True)
def checkout_instead_of_github(monkeypatch):
    """torch.hub.list and help know only GitHub: let the checkout be what they have downloaded."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: ROOT)


def test_list_leaks_nothing():
    assert set(torch.hub.list("OWNER/REPO")) == NAMES
    assert hubconf.dependencies


@pytest.mark.parametrize("name", sorted(NAMES))
def test_help(name):
    text = torch.hub.help("OWNER/REPO", name)
    assert "pretrained:" in text and "out_indices" in text and ("ensemble_size" in text) == name.startswith("dift_")


def test_load_equals_timm():
    x = torch.randn(1, 3, 64, 64)
    model = torch.hub.load(ROOT, "cleandift_tiny", source="local", pretrained=True, features_only=True).eval()
    same = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).eval()
    for a, b in zip(model(x), same(x)):
        torch.testing.assert_close(a, b)
