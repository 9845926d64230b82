#!/usr/bin/env python
"""The same as `cleandift finetune`, with the same arguments, for a checkout."""

import sys

from cleandift_backbones.cli.finetune import main

if __name__ == "__main__":
    sys.exit(main())
