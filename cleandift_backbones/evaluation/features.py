"""The models that evaluation measures, from `cleandift_backbones.extractor`, which extraction uses too."""

from ..extractor import (
    PIXELS,
    Extractor,
    ModelError,
    Pictures,
    check_model_name,
    extract,
    list_maps,
    load_extractor,
    map_indices,
    map_names,
    resolve_device,
    weights_digest,
)

__all__ = [
    "PIXELS",
    "Extractor",
    "ModelError",
    "Pictures",
    "check_model_name",
    "extract",
    "list_maps",
    "load_extractor",
    "map_indices",
    "map_names",
    "resolve_device",
    "weights_digest",
]
