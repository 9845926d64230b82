"""Lightweight distillation: LoRA (peft) on the student's self-attention and feed-forward layers, merged on export."""

from __future__ import annotations

from torch import Tensor

from ..models.denoisers.unet import FeatureUNet
from ..utils.errors import needs

#: CleanDIFT, supplement: rank 64 on self-attention (attn1) and feed-forward layers, for backbones too large to train
TARGETS = r".*(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


def add_lora(unet: FeatureUNet, rank: int, alpha: float | None = None) -> FeatureUNet:
    """Freezes a UNet and adds adapters of this rank, which alone train; they start as the identity.

    Args:
        alpha: scale of the adapters (default: the rank).

    Raises:
        ImportError: peft is not installed. ValueError: the UNet has no attention to adapt.
    """
    with needs("train"):
        from peft import LoraConfig
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=TARGETS))
    return unet


def merged_state(unet: FeatureUNet) -> dict[str, Tensor]:
    """The UNet's state dict under its plain names, with the adapters merged; the UNet itself stays as it is."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    state = {}
    for name, tensor in unet.state_dict().items():
        if ".lora_" in name or name.startswith("lora_"):
            continue
        plain = name.replace(".base_layer.", ".")
        layer = layers.get(name.rsplit(".base_layer.", 1)[0]) if plain != name else None
        if layer is not None and plain.endswith(".weight"):
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter).to(tensor)
        state[plain] = tensor
    return state


def lora_state(unet: FeatureUNet) -> dict[str, Tensor]:
    """The adapters alone, under diffusers' names: `UNet2DConditionModel.load_lora_adapter` takes them."""
    from peft.utils import get_peft_model_state_dict

    config = unet.peft_config["default"]
    scale = config.lora_alpha / config.r  # the file names no alpha: its readers take the rank
    state = get_peft_model_state_dict(unet)
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in state.items()}
