"""The scope `cleandift_backbones` of mmengine's registries.

mmengine looks a scope up in a module of this very name, so configs say `type="cleandift_backbones.CleanDIFT"` without
importing anything. Only mmengine and mm/backbone.py import this.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

_HERE = dict(scope="cleandift_backbones", locations=["cleandift_backbones.mm"])

MODELS = Registry("model", parent=MMENGINE_MODELS, **_HERE)
HOOKS = Registry("hook", parent=MMENGINE_HOOKS, **_HERE)
