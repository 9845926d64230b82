_base_ = "./fpn_cleandift-sd21-frozen.py"
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN has no CPU kernel
model = dict(
    backbone=dict(model_name="cleandift_tiny", out_indices=["us9", "us6", "us3", "mid"], dtype=None),
    neck=dict(in_channels=[80, 112, 112, 112], out_channels=64),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, norm_cfg=norm_cfg),
)
