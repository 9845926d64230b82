# How fast the backbone learns does not depend on what is on top of it.
_base_ = "../../../mmseg/_base_/schedules/finetune.py"
