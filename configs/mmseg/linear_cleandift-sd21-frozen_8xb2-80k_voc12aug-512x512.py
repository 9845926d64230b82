_base_ = [
    "./_base_/models/linear_cleandift-sd21-frozen.py",
    "./_base_/datasets/voc12aug.py",
    "./_base_/schedules/frozen.py",
    "./_base_/schedules/80k.py",
    "./_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=21))
