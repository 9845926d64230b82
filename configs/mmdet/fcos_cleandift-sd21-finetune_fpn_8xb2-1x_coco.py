_base_ = [
    "./_base_/models/fcos_cleandift-sd21-finetune_fpn.py",
    "./_base_/datasets/coco_detection.py",
    "./_base_/schedules/finetune.py",
    "./_base_/schedules/1x.py",
    "./_base_/default_runtime.py",
]
