"""What a model is, under timm's contract.

entrypoints: the one list of models, with their architectures. cleandift, dift: the two kinds of models. denoisers: the
UNet. latents: from images to latents. text: from prompts to embeddings. projection_heads: CleanDIFT's heads.
pretrained, latent_encoders, learned, last_map: weights of a model, found and loaded. inputs: checks of arguments.
precise_numbers: buffers that stay in float32.
"""

from .entrypoints import (
    ARCHITECTURES,
    SOURCES,
    architecture_of,
    cleandift_sd15,
    cleandift_sd15_pyramid,
    cleandift_sd21,
    cleandift_sd21_pyramid,
    cleandift_tiny,
    cleandift_tiny_pyramid,
    default_cfgs,
    dift_sd15,
    dift_sd21,
    dift_tiny,
    model_names,
    published,
)

__all__ = [
    "ARCHITECTURES",
    "SOURCES",
    "architecture_of",
    "cleandift_sd15",
    "cleandift_sd15_pyramid",
    "cleandift_sd21",
    "cleandift_sd21_pyramid",
    "cleandift_tiny",
    "cleandift_tiny_pyramid",
    "default_cfgs",
    "dift_sd15",
    "dift_sd21",
    "dift_tiny",
    "model_names",
    "published",
]
