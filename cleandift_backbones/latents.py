"""image -> latent: the encoder half of diffusers' AutoencoderKL, deterministic (the posterior's mean, no sample)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LatentEncoder(nn.Module):
    """Encoder and quant_conv of an AutoencoderKL, under diffusers' key names (`encoder.*`, `quant_conv.*`).

    Args:
        config: AutoencoderKL's config; of it are used block_out_channels, layers_per_block, norm_num_groups, act_fn,
            latent_channels, mid_block_add_attention, use_quant_conv and scaling_factor.
        in_chans: image channels.
    """

    def __init__(self, config: dict, in_chans: int = 3):
        super().__init__()
        widths = tuple(config["block_out_channels"])
        channels = config.get("latent_channels", 4)
        self.encoder = Encoder(
            in_channels=in_chans,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=config.get("norm_num_groups", 32),
            act_fn=config.get("act_fn", "silu"),
            mid_block_add_attention=config.get("mid_block_add_attention", True),
        )
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.get("use_quant_conv", True) else None
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.stride = 2 ** (len(widths) - 1)
        #: name -> (channels, reduction) of the encoder's own maps, fine to coarse, up to half the latent's stride
        self.map_infos = {f"vae{2 ** (i + 1)}": (widths[i], 2 ** (i + 1)) for i in range(len(widths) - 2)}
        self.grad_checkpointing = False

    def forward(self, images: Tensor, maps: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodes images.

        Args:
            images: B x in_chans x H x W in [-1, 1]; any H, W: edge pixels are repeated up to a multiple of the stride.
            maps: names of encoder maps to return as well (`vae2`, `vae4`: outputs of the strided stages).

        Returns:
            latents B x C x ceil(H / stride) x ceil(W / stride), scaled by scaling_factor (METHOD: 0.18215 for SD), and
            the maps asked for, cropped to ceil(H / reduction) x ceil(W / reduction).
        """
        height, width = images.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        x = F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
        encoder = self.encoder
        found = {}
        x = encoder.conv_in(x)
        for i, block in enumerate(encoder.down_blocks):
            x = self._run(block, x)
            name = f"vae{2 ** (i + 1)}"
            if name in maps:
                reduction = self.map_infos[name][1]
                found[name] = x[..., : -(-height // reduction), : -(-width // reduction)]
        x = self._run(encoder.mid_block, x)
        x = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))
        moments = x if self.quant_conv is None else self.quant_conv(x)
        mean, _ = moments.chunk(2, dim=1)
        return mean * self.scaling_factor, found

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)
