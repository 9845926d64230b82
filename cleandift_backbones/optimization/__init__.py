"""The same maps for less time and memory.

optimize: `cleandift_backbones.optimize`. fold: what a constant timestep and prompt give, computed once. cpu_winograd:
convolutions in fewer multiplications. cpu_any_size_conv: one compiled graph for images of any size. cpu_malloc: whether
the C library keeps freed memory.
"""
