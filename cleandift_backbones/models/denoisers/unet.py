"""FeatureUNet: diffusers' UNet2DConditionModel that returns named maps and stops after the deepest one asked for.

The maps of the four-level Stable Diffusion UNet, in execution order (CleanDIFT, arXiv 2412.03439, section 4; "us" = up
stage): `mid`, then per up block the outputs after each layer but its last, then after its upsampler (which follows the
last layer): `us1, us2, us3 | us4, us5, us6 | us7, us8, us9`, and after layer 0 of the last up block: `us10`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...utils.errors import InputError, StateError
from .maps import unet_maps


def _layers(block: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """(resnet, attention or None) pairs of a down or up block."""
    attentions = block.attentions if hasattr(block, "attentions") else [None] * len(block.resnets)
    return list(zip(block.resnets, attentions))


class FeatureUNet(UNet2DConditionModel):
    """UNet2DConditionModel whose forward returns feature maps instead of predicted noise.

    Same constructor, submodules, key names, LoRA and attention-processor interfaces as diffusers' model, so published
    UNet files fit. `FeatureUNet.from_pretrained(folder).truncate("us6")` and `FeatureUNet.build(config, "us6")` give a
    UNet that holds nothing behind `us6`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.infos = unet_maps(self.config)  # all maps of the architecture, in execution order, held or cut
        self.last_map = self.infos[-1].name
        self.dropped_keys: frozenset[str] = frozenset()
        self.grad_checkpointing = False

    # diffusers' from_pretrained and from_config read the accepted arguments off the signature.
    __init__.__signature__ = inspect.signature(UNet2DConditionModel.__init__)

    @classmethod
    def build(cls, config: Mapping, last_map: str | None = None) -> FeatureUNet:
        """Makes a randomly initialised UNet that holds parameters only as deep as `last_map` (default: the deepest).

        The full model is laid out on the meta device, which allocates nothing, cut, and only then given memory, on
        the current default device (inside `with torch.device("meta")` it stays on meta).
        """
        device = torch.empty(0).device
        with torch.device("meta"):
            unet = cls(**config)
        unet.truncate(last_map or unet.map_names[-1])
        if device.type != "meta":
            for module in unet.modules():
                if module._parameters or module._buffers:
                    module.to_empty(device=device, recurse=False)
                    module.reset_parameters()
        return unet

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the maps that this UNet still holds, in execution order."""
        names = tuple(info.name for info in self.infos)
        return names[: names.index(self.last_map) + 1]

    def check_maps(self, maps: Collection[str]) -> None:
        """Raises ValueError for names that do not exist, or that lie behind the point where the UNet was cut."""
        known = [info.name for info in self.infos]
        for name in maps:
            if name not in known:
                raise InputError(f"unknown map {name!r}: this UNet has {', '.join(known)}")
            if name not in self.map_names:
                raise InputError(
                    f"map {name!r} is not held: the UNet was built only as deep as {self.last_map!r}. "
                    f"Build it deeper, e.g. with features_only=True and out_indices, or final_map={name!r}"
                )

    def truncate(self, last_map: str) -> FeatureUNet:
        """Drops, in place, every module that runs after `last_map`. Names of dropped keys stay in `dropped_keys`.

        Raises:
            ValueError: `last_map` does not exist or has been cut already.
        """
        self.check_maps([last_map])
        before = set(self.state_dict())
        self.conv_norm_out = self.conv_act = self.conv_out = None
        if last_map == "mid":
            self.up_blocks = nn.ModuleList()
        else:
            module = next(info.module for info in self.infos if info.name == last_map)
            _, block, kind, layer = module.split(".")
            self.up_blocks = self.up_blocks[: int(block) + 1]
            if kind != "upsamplers":
                end = self.up_blocks[-1]
                end.upsamplers = None
                end.resnets = end.resnets[: int(layer) + 1]
                if hasattr(end, "attentions"):
                    end.attentions = end.attentions[: int(layer) + 1]
        self.last_map = last_map
        self.dropped_keys = self.dropped_keys | (before - set(self.state_dict()))
        return self

    def layer_groups(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of tensor names, shallow to deep, for layer-wise learning rates: one group per layer, or block."""
        layer = "" if coarse else r"\.(?:resnets|attentions|downsamplers|upsamplers)\.(\d+)"
        return dict(
            stem=r"conv_in|time_embedding",
            down=rf"down_blocks\.(\d+){layer}",
            mid=r"mid_block",
            up=rf"up_blocks\.(\d+){layer}",
        )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        conditions: Mapping[str, Tensor] | Tensor,
        maps: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """One walk down and up, ending after the deepest map asked for.

        Args:
            latents: B x C x h x w, scaled by the VAE's scaling factor; any h, w.
            timestep: a scalar or one per sample, 0..999, floats allowed.
            conditions: `prompt_embeds`, 1 or B x L x C, output of the text encoder; or that tensor itself.
            maps: names of the maps to return (default: all that are held).

        Returns:
            name -> B x channels x ceil(h / stride) x ceil(w / stride), in execution order.

        Raises:
            ValueError: unknown or cut map.
        """
        maps = self.map_names if maps is None else tuple(maps)
        self.check_maps(maps)
        batch = latents.shape[0]
        time = torch.as_tensor(timestep, device=latents.device).reshape(-1).expand(batch)
        temb = self.time_embedding(self.time_proj(time).to(latents.dtype))
        return self.walk(latents, temb, self.text_of(conditions, latents), maps)

    @staticmethod
    def text_of(conditions: Mapping[str, Tensor] | Tensor, latents: Tensor) -> Tensor:
        """The prompt B x L x C, for the batch and in the dtype of the latents."""
        text = conditions if isinstance(conditions, Tensor) else conditions["prompt_embeds"]
        return text.to(latents.dtype).expand(len(latents), -1, -1)

    def walk(
        self, latents: Tensor, temb: Tensor | None, text: Tensor | None, maps: Collection[str]
    ) -> dict[str, Tensor]:
        """`forward` after its embeddings: temb B x T and text B x L x C, None where layers hold them as constants."""
        wanted = {info.module: info.name for info in self.infos if info.name in maps}
        found: dict[str, Tensor] = {}

        def keep(module: str, x: Tensor) -> bool:
            """Stores x if the output of this module was asked for; says whether all maps are there."""
            if module in wanted:
                found[wanted[module]] = x
            return len(found) == len(wanted)

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in _layers(block):
                x = self._layer(resnet, attention, x, temb, text)
                skips.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)

        mid = self.mid_block
        x = self._layer(mid.resnets[0], None, x, temb, text)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:]):
            x = self._layer(resnet, None, self._attend(attention, x, text), temb, text)
        if keep("mid_block", x):
            return found

        for i, block in enumerate(self.up_blocks):
            kind = "attentions" if hasattr(block, "attentions") else "resnets"
            for j, (resnet, attention) in enumerate(_layers(block)):
                x = self._layer(resnet, attention, torch.cat([x, skips.pop()], dim=1), temb, text)
                if keep(f"up_blocks.{i}.{kind}.{j}", x):
                    return found
            for j, upsampler in enumerate(block.upsamplers or ()):
                x = upsampler(x, skips[-1].shape[-2:])
                if keep(f"up_blocks.{i}.upsamplers.{j}", x):
                    return found
        raise StateError(f"maps {sorted(set(maps) - set(found))} were not reached")

    def _layer(self, resnet: nn.Module, attention: nn.Module | None, x: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run_layer, resnet, attention, x, temb, text, use_reentrant=False)
        return self._run_layer(resnet, attention, x, temb, text)

    def _run_layer(self, resnet, attention, x, temb, text):
        x = resnet(x, temb)
        return x if attention is None else self._attend(attention, x, text)

    @staticmethod
    def _attend(attention: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        # return_dict=False: the output class's deprecation warning would break torch.compile(fullgraph=True).
        return attention(x, encoder_hidden_states=text, return_dict=False)[0]
