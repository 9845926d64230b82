"""The backbone in configs of mmsegmentation and mmdetection; importing this registers it with mmengine.

backbone: the backbone and a hook. `cleandift_backbones.mm_checks` holds what is checked before mmengine is imported.
"""

from .backbone import CheckBackboneHook, CleanDIFT

__all__ = ["CheckBackboneHook", "CleanDIFT"]
