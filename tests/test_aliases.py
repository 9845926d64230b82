"""Import paths of earlier versions, which stay for a release: each gives the objects of the new one."""

from importlib import import_module

import pytest

PATHS = {
    "extractor": ("features.extractor", "load_extractor extract list_maps Extractor ModelError OutOfMemory PIXELS"),
    "extraction": ("features", "Features"),
    "hub": ("publish", "CardInfo push_to_hub save_folder timm_config model_card"),
    "convert": ("publish.convert", "to_native to_diffusers to_ldm"),
    "errors": ("utils.errors", "CleanDIFTError InputError FileError FolderInUseError"),
    "allocator": ("optimization.cpu_malloc", "keep_freed_memory return_freed_memory"),
    "evaluation.correspondence": ("features.correspondence", "match_points pck"),
    "evaluation.noise": ("evaluation.tasks.noise", "noise_shares"),
    "app": ("visualize", "match maps compare"),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_same_objects(path):
    new, names = PATHS[path]
    old, new = (import_module(f"cleandift_backbones.{name}") for name in (path, new))
    for name in names.split():
        assert getattr(old, name) is getattr(new, name), name
