"""torch.hub entrypoints: torch.hub.load("OWNER/REPO", "cleandift_tiny", pretrained=True, features_only=True)."""

dependencies = ["torch", "torchvision", "timm", "diffusers", "safetensors", "huggingface_hub"]

from cleandift_backbones.models import (  # noqa: E402, F401 (torch.hub checks `dependencies` first, then looks these up)
    cleandift_sd15,
    cleandift_sd15_pyramid,
    cleandift_sd21,
    cleandift_sd21_pyramid,
    cleandift_tiny,
    cleandift_tiny_pyramid,
    dift_sd15,
    dift_sd21,
    dift_tiny,
)
