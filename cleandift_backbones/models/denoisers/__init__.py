"""Denoisers whose maps are the features: the UNet of Stable Diffusion."""
