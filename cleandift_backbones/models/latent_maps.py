"""What a VAE's config says of its encoder: stride and maps. Builds nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def is_tiny(config: Mapping) -> bool:
    """Whether a VAE's config is AutoencoderTiny's, not AutoencoderKL's."""
    return "encoder_block_out_channels" in config


def widths(config: Mapping) -> tuple[int, ...]:
    return tuple(config["encoder_block_out_channels" if is_tiny(config) else "block_out_channels"])


def latent_stride(config: Mapping) -> int:
    """Pixels of the image per cell of the latent, of a VAE's config."""
    return 2 ** (len(widths(config)) - 1)


def latent_maps(config: Mapping) -> list[dict]:
    """timm's feature_info of an encoder's own maps, fine to coarse, up to half the latent's stride: `vae2`, `vae4`.

    They are the outputs of the strided stages: of AutoencoderKL, whose stages end with their stride, stage i; of
    AutoencoderTiny, whose stages begin with it, stage i + 1.
    """
    channels = widths(config)
    ends = stage_ends(config["num_encoder_blocks"]) if is_tiny(config) else []
    return [
        dict(
            name=f"vae{2 ** (i + 1)}",
            num_chs=channels[i + 1] if ends else channels[i],
            reduction=2 ** (i + 1),
            module=f"encoder.layers.{ends[i + 1]}" if ends else f"encoder.down_blocks.{i}",
        )
        for i in range(len(channels) - 2)
    ]


def stage_ends(blocks: Collection[int]) -> list[int]:
    """Index of the last layer of each stage of an EncoderTiny: a convolution and so many blocks each."""
    ends, last = [], -1
    for count in blocks:
        last += 1 + count
        ends.append(last)
    return ends
