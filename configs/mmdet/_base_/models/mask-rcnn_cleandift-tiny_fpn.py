_base_ = "./mask-rcnn_cleandift-sd21-frozen_fpn.py"
model = dict(
    backbone=dict(model_name="cleandift_tiny", out_indices=["us9", "us6", "us3", "mid"], dtype=None),
    neck=dict(in_channels=[80, 112, 112, 112], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=14),
        bbox_head=dict(in_channels=64, fc_out_channels=128),
        mask_roi_extractor=dict(out_channels=64, finest_scale=14),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    # An eighth of the regions: pictures of 128 px hold few.
    train_cfg=dict(rpn=dict(sampler=dict(num=64)), rpn_proposal=dict(max_per_img=128), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=128)),
)
