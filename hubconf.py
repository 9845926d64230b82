"""torch.hub entrypoints: torch.hub.load("OWNER/REPO", "cleandift_tiny", pretrained=True, features_only=True)."""

dependencies = ["torch", "torchvision", "timm", "diffusers", "safetensors", "huggingface_hub"]

from cleandift_backbones import models as _models  # noqa: E402  (torch.hub checks `dependencies` first)

globals().update({name: getattr(_models, name) for name in _models.model_names()})  # each is an entrypoint
