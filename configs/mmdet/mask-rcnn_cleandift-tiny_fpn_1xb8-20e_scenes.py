_base_ = [
    "./_base_/models/mask-rcnn_cleandift-tiny_fpn.py",
    "./_base_/datasets/scenes_instance.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/20e.py",
    "./_base_/default_runtime.py",
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5)))
