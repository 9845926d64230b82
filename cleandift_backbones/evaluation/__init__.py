"""Measuring feature maps, for any timm model name.

features: maps of any model. items, cache: pictures of data sets, and their features on disk. correspondence: matching
points, PCK. pairs, matching: data sets of keypoint pairs, all matched. knn: classes by nearest neighbours, recall.
segmentation, depth, probes: linear probes. noise: how much of a feature is the noise. tasks, command: all of these as a
command line. retrieval, emoji, emoji_probes: the benchmark on held-out emoji. bootstrap: confidence intervals. figures,
report, noise_report: results for people to look at.
"""
