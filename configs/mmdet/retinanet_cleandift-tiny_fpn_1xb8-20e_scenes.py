_base_ = [
    "./_base_/models/retinanet_cleandift-tiny_fpn.py",
    "./_base_/datasets/scenes_detection.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/20e.py",
    "./_base_/default_runtime.py",
]
model = dict(bbox_head=dict(num_classes=5))
