"""A model's image encoder alone, with its weights: for training a student or another encoder on its latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .. import checkpoints
from ..checkpoints.hub import HubError
from ..utils.errors import MissingWeightsError, StateError
from .architectures import published, spec_of
from .latents import build_latent_encoder
from .pretrained import BESIDE, WeightSources, missing_message, open_encoder


def load_latent_encoder(
    model: str, latent_encoder: str = "default", source: str | None = None, cache_dir: str | Path | None = None
) -> nn.Module:
    """Images in [-1, 1] -> latents (see `latents`), in float32, without the UNet.

    Args:
        model: name, e.g. "cleandift_sd21". latent_encoder: "default" or "tiny".
        source: of the weights, instead of where they are published; see `hub.parse_source`.
        cache_dir: of the Hub's files.

    Raises:
        ValueError: unknown encoder. RuntimeError: no weights are known, or they are unavailable.
        checkpoints.CheckpointError: weights of another kind, or another size.
    """
    config = spec_of(model).arch.encoder_config(latent_encoder)
    parts = WeightSources(model.partition(".")[0], published(model), dict(vae=source) if source else {}, latent_encoder)
    place = parts.get("vae") or (parts.get("unet") if latent_encoder == "default" else None)
    if place is None:
        raise StateError(f"no weights of latent_encoder={latent_encoder!r} are known for {model}: give their source")
    try:
        weights = open_encoder(place, latent_encoder, cache_dir)
    except (HubError, FileNotFoundError) as error:
        missing = [f"vae: {error}"]
        raise MissingWeightsError(missing_message(parts, missing), model, missing) from error
    checkpoints.check_configs(weights, {"vae": config})
    with torch.device("meta"):
        encoder = build_latent_encoder(config)
    expected = {f"vae.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state = checkpoints.fit(
        weights, expected, lambda name: not name.startswith("vae.") or name.startswith(BESIDE), dtype=torch.float32
    )
    encoder.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in state.items()}, assign=True)
    return encoder
