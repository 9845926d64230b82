"""Distillation of clean features: projection heads, teacher and student, data, training loop."""

from ..utils.errors import needs

with needs("train"):
    import accelerate  # noqa: F401
    import omegaconf  # noqa: F401
    import transformers  # noqa: F401
