_base_ = [
    "./_base_/models/linear_cleandift-tiny.py",
    "./_base_/datasets/scenes.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/500.py",
    "./_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=6))
