_base_ = [
    "./_base_/models/fpn_cleandift-sd21-finetune.py",
    "./_base_/datasets/voc12aug.py",
    "./_base_/schedules/finetune.py",
    "./_base_/schedules/80k.py",
    "./_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=21))
