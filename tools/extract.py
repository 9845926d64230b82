#!/usr/bin/env python3
"""Features of a folder, of WebDataset shards or of a list of pictures, by any timm model; see docs/extract.md."""

from cleandift_command import importing

with importing(__name__):
    from cleandift_backbones.cli.extract import main

if __name__ == "__main__":
    main()
