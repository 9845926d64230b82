"""Measuring feature maps, for any timm model name.

features: maps of any model. correspondence: matching points, PCK. retrieval: nearest pictures. bootstrap: confidence
intervals. emoji: the benchmark on held-out emoji. figures, report: results for people to look at.
"""
