#!/usr/bin/env python
"""The same as `cleandift push`, with the same arguments, for a checkout."""

import sys

from cleandift_backbones.cli.push import main

if __name__ == "__main__":
    sys.exit(main())
