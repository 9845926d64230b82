"""Images and captions in, for training, extraction and evaluation.

listing: files of folders and patterns. shards: .tar files. captions: texts and labels beside images. sources: the one
list of images, made of these. decoding: bytes to images. resize, images: images to tensors of a size. loading: batches
of one size, for extraction and evaluation. captioned, batches, streaming, compositing: batches for training.
"""
