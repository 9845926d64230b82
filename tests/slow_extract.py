"""tools/extract.py with a model that takes SLOW seconds more for each batch, to be killed in the middle.

It adds a letter to the file CALLS, if given, as it begins with a batch.
"""

import os
import time

from cleandift_backbones.cli.extract import main
from cleandift_backbones.features.extractor import Extractor

call = Extractor.__call__


def slowly(self, pictures):
    if os.environ["CALLS"]:
        with open(os.environ["CALLS"], "a") as file:
            file.write("x")
    time.sleep(float(os.environ["SLOW"]))
    return call(self, pictures)


Extractor.__call__ = slowly
main()
