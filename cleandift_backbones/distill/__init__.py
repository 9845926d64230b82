"""Distillation of clean features: projection heads, teacher and student, data, training loop."""
