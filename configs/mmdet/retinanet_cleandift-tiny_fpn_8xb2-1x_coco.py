_base_ = [
    "./_base_/models/retinanet_cleandift-tiny_fpn.py",
    "./_base_/datasets/coco_detection.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/1x.py",
    "./_base_/default_runtime.py",
]
