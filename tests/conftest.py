"""The Hub of the tests stands on 127.0.0.1. huggingface_hub reads its address at import, hence before anything else."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Helpers and tests of other folders are imported by their plain names.
sys.path[:0] = sorted({str(path.parent) for path in Path(__file__).parent.rglob("test_*.py")})
pytest.register_assert_rewrite("app_browser")

from hub_server import TOKEN, HubServer  # noqa: E402

_server = HubServer()
_home = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ.update(
    HF_ENDPOINT=_server.url,
    HF_HOME=_home.name,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1",
)
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

# Shells start what runs in the background with SIGINT ignored, and the processes that tests interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from PIL import Image  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _running_hub():
    _server.start()
    yield _server
    _server.shutdown()


@pytest.fixture
def hub(_running_hub, tmp_path, monkeypatch):
    """An empty Hub, an empty cache (`hub.cache`), and nobody logged in."""
    _running_hub.reset()
    _running_hub.cache = tmp_path / "hf_cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(_running_hub.cache))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "hf_assets"))
    return _running_hub


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def offline(monkeypatch):
    """Calling it cuts the network off."""
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of twelve captioned pictures, to train on."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        image = Image.new("RGB", (70 + number, 64 + 3 * number), (20 * number, 200 - 15 * number, 90))
        image.paste((250 - 20 * number, 10 * number, 90), (8 + number, 16, 40 + number, 56))
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"red box {number}")
    return folder


@pytest.fixture(scope="module")
def features():
    """Features that the page keeps, of cleandift_tiny and dift_tiny, shared by the tests that only read them."""
    from cleandift_backbones.visualize.features import FeatureProvider

    return FeatureProvider()
