_base_ = "./retinanet_cleandift-sd21-frozen_fpn.py"
# The VAE stays frozen; activations are computed again in the backward pass.
model = dict(backbone=dict(frozen=False, dtype=None, save_frozen=True, with_cp=True))
