"""Clean diffusion features as a backbone like any other: importing this registers the models with timm.

    import timm, cleandift_backbones
    model = timm.create_model("cleandift_tiny", pretrained=True, features_only=True)

The import itself loads neither PyTorch nor timm nor diffusers. The models are registered at once where timm is imported
already, otherwise right after its import; diffusers is imported when the first model is built.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .utils.imports import when_imported
from .version import __version__

if TYPE_CHECKING:
    from .models.cleandift import CleanDIFT
    from .models.denoisers.unet import FeatureUNet
    from .models.dift import DIFT
    from .optimization.optimize import optimize


__all__ = ["DIFT", "CleanDIFT", "FeatureUNet", "__version__", "optimize"]

_LAZY = {
    "CleanDIFT": "models.cleandift",
    "DIFT": "models.dift",
    "FeatureUNet": "models.denoisers.unet",
    "optimize": "optimization.optimize",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name == "models":
        return import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


when_imported("timm", lambda: import_module(".models.entrypoints", __name__))
