_base_ = "./linear_cleandift-sd21-frozen.py"
model = dict(
    backbone=dict(model_name="cleandift_tiny", dtype=None),
    decode_head=dict(in_channels=112, channels=112),
)
