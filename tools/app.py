#!/usr/bin/env python
"""The same as `cleandift app`, with the same arguments, for a checkout."""

import sys

from cleandift_backbones.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
