_base_ = "./retinanet_cleandift-sd21-frozen_fpn.py"
# Strides are half of sd21's, for pictures of 128 px.
model = dict(
    backbone=dict(model_name="cleandift_tiny", out_indices=["us9", "us6", "us3", "mid"], dtype=None),
    neck=dict(in_channels=[80, 112, 112, 112], out_channels=64),
    bbox_head=dict(
        in_channels=64, feat_channels=64, stacked_convs=2, anchor_generator=dict(strides=[4, 8, 16, 32, 64])
    ),
)
