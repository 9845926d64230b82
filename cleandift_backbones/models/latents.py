"""image -> latent, deterministic: the encoder half of diffusers' AutoencoderKL (the posterior's mean, no sample), or a
light one of its AutoencoderTiny form, which imitates it (TAESD)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder, EncoderTiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .latent_maps import is_tiny, latent_maps, latent_stride, stage_ends, widths


def build_latent_encoder(config: Mapping, in_chans: int = 3) -> LatentEncoder | TinyLatentEncoder:
    """The encoder of a VAE's config: AutoencoderTiny's by its `encoder_block_out_channels`, else AutoencoderKL's."""
    return (TinyLatentEncoder if is_tiny(config) else LatentEncoder)(config, in_chans)


class _Encoder(nn.Module):
    """What both encoders share: sizes, their own maps, checkpointing. A subclass gives `_encode`."""

    def __init__(self, config: Mapping):
        super().__init__()
        self.stride = latent_stride(config)
        #: name -> (channels, reduction) of the encoder's own maps
        self.map_infos = {info["name"]: (info["num_chs"], info["reduction"]) for info in latent_maps(config)}
        self.grad_checkpointing = False

    def forward(self, images: Tensor, maps: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodes images.

        Args:
            images: B x in_chans x H x W in [-1, 1]; any H, W: edge pixels are repeated up to a multiple of the stride.
            maps: names of encoder maps to return as well (`vae2`, `vae4`: outputs of the strided stages).

        Returns:
            latents B x C x ceil(H / stride) x ceil(W / stride) in the UNet's scale, and the maps asked for, cropped to
            ceil(H / reduction) x ceil(W / reduction).
        """
        height, width = images.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        x = F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
        found = {}

        def keep(name: str, x: Tensor) -> None:
            if name in maps:
                reduction = self.map_infos[name][1]
                found[name] = x[..., : -(-height // reduction), : -(-width // reduction)]

        return self._encode(x, keep), found

    def _encode(self, x: Tensor, keep: Callable[[str, Tensor], None]) -> Tensor:
        raise NotImplementedError

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class LatentEncoder(_Encoder):
    """Encoder and quant_conv of an AutoencoderKL, under diffusers' key names (`encoder.*`, `quant_conv.*`).

    Args:
        config: AutoencoderKL's config; of it are used block_out_channels, layers_per_block, norm_num_groups, act_fn,
            latent_channels, mid_block_add_attention, use_quant_conv, scaling_factor (SD: 0.18215) and shift_factor.
        in_chans: image channels.
    """

    kind = "default"

    def __init__(self, config: Mapping, in_chans: int = 3):
        super().__init__(config)
        stages = widths(config)
        channels = config.get("latent_channels", 4)
        self.encoder = Encoder(
            in_channels=in_chans,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(stages),
            block_out_channels=stages,
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=config.get("norm_num_groups", 32),
            act_fn=config.get("act_fn", "silu"),
            mid_block_add_attention=config.get("mid_block_add_attention", True),
        )
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.get("use_quant_conv", True) else None
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.shift_factor = float(config.get("shift_factor") or 0.0)

    def _encode(self, x: Tensor, keep: Callable[[str, Tensor], None]) -> Tensor:
        encoder = self.encoder
        x = encoder.conv_in(x)
        for i, block in enumerate(encoder.down_blocks):
            x = self._run(block, x)
            keep(f"vae{2 ** (i + 1)}", x)
        x = self._run(encoder.mid_block, x)
        x = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))
        moments = x if self.quant_conv is None else self.quant_conv(x)
        mean, _ = moments.chunk(2, dim=1)
        if self.shift_factor:  # latents are (mean - shift) * scale, as in diffusers' pipelines of SD 3 and Flux
            mean = mean - self.shift_factor
        return mean * self.scaling_factor


class TinyLatentEncoder(_Encoder):
    """Encoder of an AutoencoderTiny, under diffusers' key names (`encoder.layers.*`): convolutions and ReLU, no norms.

    TAESD (github.com/madebyollin/taesd) is trained to give Stable Diffusion's latents already scaled, so that its
    scaling_factor is 1, and takes images in [0, 1]: diffusers' EncoderTiny makes these of images in [-1, 1].

    Args:
        config: AutoencoderTiny's config; of it are used encoder_block_out_channels (all equal: diffusers' strided
            convolutions keep their width), num_encoder_blocks, act_fn, latent_channels and scaling_factor.
        in_chans: image channels.
    """

    kind = "tiny"

    def __init__(self, config: Mapping, in_chans: int = 3):
        super().__init__(config)
        self.encoder = EncoderTiny(
            in_channels=in_chans,
            out_channels=config.get("latent_channels", 4),
            num_blocks=tuple(config["num_encoder_blocks"]),
            block_out_channels=widths(config),
            act_fn=config.get("act_fn", "relu"),
        )
        self.scaling_factor = float(config.get("scaling_factor", 1.0))
        self._maps_after = {end: f"vae{2**i}" for i, end in enumerate(stage_ends(config["num_encoder_blocks"])) if i}

    def _encode(self, x: Tensor, keep: Callable[[str, Tensor], None]) -> Tensor:
        x = x.add(1).div(2)  # as EncoderTiny.forward does, but for its checkpointing, which leaves this out
        for i, layer in enumerate(self.encoder.layers):
            x = self._run(layer, x)
            if i in self._maps_after:
                keep(self._maps_after[i], x)
        return x * self.scaling_factor
