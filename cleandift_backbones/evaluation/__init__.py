"""Measuring feature maps, for any timm model name: `api.evaluate`.

task: what a task is, and the list of tasks. tasks: one file each. items, labelled: data sets. features: the stored
features of their images. plans, runs: which models with which settings, and their measuring. neighbours, probes: what
tasks have in common. emoji, emoji_probes, cross_style: the benchmark on held-out emoji.
bootstrap: confidence intervals. report, plots: results for people to look at.
"""
