"""torch.hub entrypoints: torch.hub.load("OWNER/REPO", "cleandift_tiny", pretrained=True, features_only=True)."""

dependencies = ["torch", "torchvision", "timm", "diffusers", "safetensors", "huggingface_hub"]
