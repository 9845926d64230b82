"""Images and captions in, for training, extraction and evaluation.

listing: files of folders and patterns. shards: .tar files. decoding: bytes to images. images: images to tensors.
sources, loading: what extraction reads, in batches of one size. captioned, batches, streaming, compositing: what
training reads.
"""
