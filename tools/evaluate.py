#!/usr/bin/env python
"""The same as `cleandift evaluate`, with the same arguments, for a checkout."""

from cleandift_backbones.utils.guard import importing

with importing(__name__):
    from cleandift_backbones.cli.evaluate import main

if __name__ == "__main__":
    main()
