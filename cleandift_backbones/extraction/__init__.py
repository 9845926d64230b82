"""Features of many pictures, computed once and kept: `tools/extract.py` writes them, `Features` reads them.

sources: which pictures. loading: from files to batches of one size. run: batches through the model, overlapped with
loading and storing. store: the folder of shards that they are written to. formats: a shard as safetensors or Parquet.
reading: the folder as a data set. command: the command line.
"""

from .reading import Features

__all__ = ["Features"]
