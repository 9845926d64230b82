"""This package's tasks, one file each: what is read, and what is measured on one map. See `task.register_task`.

They are imported in the order in which the command's help lists them.
"""

# isort: off
from .correspondence import Correspondence, limit_pairs
from .knn import Knn
from .retrieval import Retrieval
from .segmentation import Segmentation
from .depth import Depth
from .noise import Noise

# isort: on

__all__ = ["Correspondence", "Depth", "Knn", "Noise", "Retrieval", "Segmentation", "limit_pairs"]
