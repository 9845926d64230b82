"""Features of many pictures, computed once and kept: `cleandift extract` writes them, `Features` reads them.

extractor: one interface to the maps of any model. model_names, options: from names and options to a model. engines:
batches through the model, overlapped with loading and storing. store: the folder of shards that they are written to.
formats: a shard as safetensors or Parquet. dataset: the folder as a data set. latent_cache: latents of images that are
passed again. correspondence: matching points by their features.
"""

from .dataset import Features

__all__ = ["Features"]
