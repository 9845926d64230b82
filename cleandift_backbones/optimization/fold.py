"""What a constant timestep and prompt give, computed once: layers that hold it in place of the weights it came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..models.denoisers.unet import FeatureUNet
from ..utils.errors import InputError


class LeanResnet(nn.Module):
    """diffusers' ResnetBlock2D for inference, on the same norms and convolutions.

    Activations and sums are written into tensors that the block itself made, and nothing is divided by one. A constant
    time embedding B x T (B = 1) is added to the first convolution's bias.
    """

    def __init__(self, block: ResnetBlock2D, temb: Tensor | None = None):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut, self.scale = block.conv_shortcut, float(block.output_scale_factor)
        self.time_emb_proj = block.time_emb_proj
        if temb is not None and self.time_emb_proj is not None:
            shift = block.time_emb_proj(F.silu(temb.float()))[0]
            self.conv1 = _with_bias(self.conv1, self.conv1.bias + shift)
            self.time_emb_proj = None

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is a resnet of the kind that Stable Diffusion is made of."""
        return (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
            and block.upsample is None
            and block.downsample is None
            and isinstance(block.nonlinearity, nn.SiLU)
            and type(block.conv1) is nn.Conv2d
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None:
            y += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y if self.scale == 1 else y.div_(self.scale)


class FixedText(nn.Module):
    """Attention processor of a cross attention whose text is known: keys and values are held, not computed.

    Args:
        attention: the layer; its to_k and to_v are not used any more.
        text: N x L x C, one text for all images or one per image.
    """

    def __init__(self, attention: Attention, text: Tensor):
        super().__init__()
        # N x L x C: of four dimensions channels_last would reorder them, and fused attention refuse them.
        self.register_buffer("key", attention.to_k(text))
        self.register_buffer("value", attention.to_v(text))

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Whether it is a plain cross attention, run by diffusers' default processor."""
        return (
            isinstance(attention, Attention)
            and type(attention.processor) is AttnProcessor2_0
            and attention.is_cross_attention
            and not (attention.norm_cross or attention.norm_q or attention.norm_k)
            and attention.group_norm is None
            and attention.spatial_norm is None
            and attention.rescale_output_factor == 1
            and not attention.residual_connection
        )

    def forward(self, attention: Attention, x: Tensor, **_: Any) -> Tensor:
        """x: B x tokens x channels, where B is a multiple of N (DIFT runs several noises of an image)."""
        query, key, value = (
            y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (attention.to_q(x), self.key, self.value)
        )  # B or N x heads x tokens or L x d
        if len(key) == 1:
            key, value = (t.expand(x.shape[0], -1, -1, -1) for t in (key, value))
        elif len(key) != x.shape[0]:
            key, value = (t.repeat_interleave(x.shape[0] // len(t), dim=0) for t in (key, value))
        return attention.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FoldedUNet(FeatureUNet):
    """A FeatureUNet at one timestep, and, if `fixed_text`, one prompt: its layers hold what these give."""

    fixed_text = True

    def forward(self, latents: Tensor, timestep: Any = None, conditions: Any = None, maps=None) -> dict[str, Tensor]:
        maps = self.map_names if maps is None else tuple(maps)
        self.check_maps(maps)
        text = None if self.fixed_text else self.text_of(conditions, latents)
        return self.walk(latents, None, text, maps)


def _with_bias(conv: nn.Conv2d, bias: Tensor) -> nn.Conv2d:
    """The convolution with another bias, on the same weight tensor."""
    with torch.device("meta"):
        new = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=True
        ).eval()
    new.weight, new.bias = conv.weight, nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return _hooked(new, conv)


def _timed(unet: FeatureUNet) -> dict[str, ResnetBlock2D]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)}


def _texted(unet: FeatureUNet) -> dict[str, Attention]:
    modules = unet.named_modules()
    return {name: module for name, module in modules if isinstance(module, Attention) and module.is_cross_attention}


def check_foldable(unet: FeatureUNet, text: bool) -> None:
    """Raises ValueError for a layer that `fold` (with the prompt, if `text`) cannot take."""
    others = [name for name, block in _timed(unet).items() if not LeanResnet.fits(block)]
    others += [name for name, layer in _texted(unet).items() if text and not FixedText.fits(layer)]
    if others:
        raise InputError(
            f"{others[0]} cannot be folded: it is not a plain Stable Diffusion layer, or has adapters or an attention "
            "processor of its own. Merge or remove these first, or pass fold=False"
        )


def fold(unet: FeatureUNet, timestep: Tensor, prompt_embeds: Tensor | None) -> None:
    """Computes, in float32, what the timestep and the prompt (None: left open) give, and drops what it came from.

    `check_foldable` must have passed.
    """
    dtype = unet.conv_in.weight.dtype
    temb = unet.time_embedding.float()(unet.time_proj(timestep.reshape(1).float()))
    for name, block in _timed(unet).items():
        block.time_emb_proj.float()
        replace(unet, name, LeanResnet(block, temb))
    for attention in _texted(unet).values() if prompt_embeds is not None else ():
        attention.to_k.float(), attention.to_v.float()
        attention.set_processor(FixedText(attention, prompt_embeds.float()).to(dtype))
        attention.to_k = attention.to_v = None
    unet.time_embedding = unet.time_proj = None
    unet.__class__ = FoldedUNet
    unet.fixed_text = prompt_embeds is not None


def lean(module: nn.Module) -> None:
    """LeanResnet in place of every resnet that it fits."""
    for name, block in list(module.named_modules()):
        if LeanResnet.fits(block):
            replace(module, name, LeanResnet(block))


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def replace(root: nn.Module, name: str, new: nn.Module) -> None:
    """Another module of the same inputs and outputs in the place of one, and under its hooks."""
    parent, _, child = name.rpartition(".")
    siblings = root.get_submodule(parent)._modules
    siblings[child] = _hooked(new, siblings[child])


def _hooked(new: nn.Module, old: nn.Module) -> nn.Module:
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))  # the same dicts, from which their handles remove
    return new
