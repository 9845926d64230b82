"""`python -m cleandift_backbones` is the command `cleandift`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
