"""Measuring feature maps, for any timm model name.

items, cache: images of data sets, and their features on disk. tasks: what is measured, one module each. probes: linear
probes. plans: which models with which settings. emoji, emoji_probes, cross_style: the benchmark on held-out emoji.
bootstrap: confidence intervals. report, plots: results for people to look at.
"""
