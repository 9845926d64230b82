"""Features of many images, computed once and kept: `extract` (`cleandift extract`) writes them, `Features` reads them.

config, extraction: that call and its settings. extractor: one interface to the maps of any model. model_names, options:
from names and options to a model. engines: batches through the model, overlapped with loading and storing. store: the
folder of shards that they are written to. formats: a shard as safetensors or Parquet. dataset: the folder as a data
set. latent_cache: latents of images that are passed again. correspondence: matching points by their features.
"""

from .config import ExtractConfig
from .dataset import Features
from .extraction import extract

__all__ = ["ExtractConfig", "Features", "extract"]
