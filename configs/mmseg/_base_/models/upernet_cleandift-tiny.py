_base_ = "./upernet_cleandift-sd21-frozen.py"
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN has no CPU kernel
model = dict(
    backbone=dict(model_name="cleandift_tiny", out_indices=["us9", "us6", "us3", "mid"], dtype=None),
    decode_head=dict(in_channels=[80, 112, 112, 112], channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=112, channels=64, norm_cfg=norm_cfg),
)
