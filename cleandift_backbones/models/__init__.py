"""What a model is, under timm's contract.

architectures: the one list of architectures and models; specs: their classes. entrypoints: timm's registry of them.
cleandift, dift: the two kinds of models. feature_info: their maps. denoisers: the UNet. latents: from images to
latents; latent_maps: what a config says of it. schedule: noise at a timestep. conditions, text: from prompts to the
constants of a denoiser. projection_heads: CleanDIFT's heads. pretrained, latent_encoders, learned, last_map: weights of
a model, found and loaded. inputs: checks of arguments. precise_numbers: buffers that stay in float32.
"""

import timm

from .architectures import (
    ARCHITECTURES,
    MODELS,
    Architecture,
    Defaults,
    DenoiserSpec,
    ModelSpec,
    Published,
    model_names,
    published,
    spec_of,
    unet_config,
)
from .conditions import TextConditions
from .entrypoints import default_cfgs, register_architecture
from .schedule import Schedule

__all__ = [
    "ARCHITECTURES",
    "MODELS",
    "Architecture",
    "Defaults",
    "DenoiserSpec",
    "ModelSpec",
    "Published",
    "Schedule",
    "TextConditions",
    "default_cfgs",
    "model_names",
    "published",
    "register_architecture",
    "spec_of",
    "unet_config",
]


def __getattr__(name: str):
    """The entrypoint of a model: `models.cleandift_tiny`."""
    if name in MODELS:
        return timm.model_entrypoint(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
