_base_ = [
    "./_base_/models/fpn_cleandift-sd21-frozen.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/80k.py",
    "./_base_/default_runtime.py",
]
