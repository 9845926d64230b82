"""What the generated damage is tried on: for each kind of input the code that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import standins
import timm
from fuzz_inputs import (
    BASE,
    RECIPE,
    SETTINGS,
    captioned,
    class_files,
    depth_files,
    diffusers_folder,
    emoji_files,
    image_files,
    labelled_files,
    labelled_shard_files,
    ldm_file,
    listed,
    metadata,
    native,
    pair_files,
    pascal_files,
    probe_file,
    row_file,
    run_files,
    scene_files,
    shard_files,
    sharded,
    spair_files,
    store_files,
)

import cleandift_backbones  # noqa: F401  (registers with timm)
from cleandift_backbones import checkpoints
from cleandift_backbones.data import streaming
from cleandift_backbones.data.batches import DecodeOptions, decode_batch, plain_images
from cleandift_backbones.data.images import read_image, to_input
from cleandift_backbones.data.shards import find_shards
from cleandift_backbones.data.sources import list_sources, list_training_sources
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.tracking import read_log
from cleandift_backbones.evaluation import emoji
from cleandift_backbones.evaluation.items import check_answers
from cleandift_backbones.evaluation.report import Row
from cleandift_backbones.evaluation.tasks import depth, knn, pairs, segmentation
from cleandift_backbones.features import Features
from cleandift_backbones.features.extractor import load_extractor
from cleandift_backbones.features.store import Store
from cleandift_backbones.publish import convert
from cleandift_backbones.visualize.pictures import open_picture
from tools.tiny.emoji_folder import load_pictures


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        files: paths below a folder -> bytes: a valid input.
        read: reads the folder as the package does; what it returns counts for nothing.
        damaged: those of the files that are damaged; all if it is empty.
        refuses: False where damage is never an error, such as where an older file is taken in its place.
        cost: how many examples of other kinds one takes; the slow ones get fewer.
    """

    files: dict[str, bytes]
    read: Callable[[Path], object]
    damaged: tuple[str, ...] = ()
    cost: float = 1
    refuses: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return self.damaged or tuple(self.files)


def read_images(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to_input(read_image(path, min_side=1), 32, "crop")


def open_uploads(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        open_picture(path.read_bytes(), path.name)


def train_on_folder(folder: Path) -> None:
    options = DecodeOptions(32, crop="random")
    found = list_training_sources(folder)
    decode_batch(found, options, 0, 7, 0)
    plain_images(found, options)


def train_on_shards(folder: Path) -> None:
    batches = streaming.ShardBatches(find_shards(folder), DecodeOptions(32), 0, 2, buffer=2)
    stream = iter(batches)
    for _ in range(3):
        next(stream)


def list_and_read(data: str, folder: Path) -> None:
    entries, _ = list_sources(str(folder / data) if data else str(folder))
    for entry in entries:
        entry.read()


def read_tensors(folder: Path, name: str = "") -> None:
    weights = checkpoints.open_checkpoint(folder / name)
    weights.describe()
    for key in sorted(weights.names()):
        weights[key]


def load_folder(folder: Path) -> None:
    load_extractor(f"local-dir:{folder}", ["us6"])


def load_file(folder: Path, name: str) -> None:
    timm.create_model("test_cleandift", pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / name)))


def convert_folder(folder: Path, name: str = "") -> None:
    convert.to_native(str(folder / name), folder / "out.safetensors", "test_cleandift")


def read_run(folder: Path) -> None:
    Checkpoints(folder).load()
    if (folder / "log.jsonl").is_file():
        read_log(folder / "log.jsonl")


def read_store(kind: str, folder: Path) -> None:
    found = Features(folder)
    for one in found:
        assert all(one[name].ndim == 3 for name in found.maps)
    assert found.failures is not None


def resume_store(kind: str, folder: Path) -> None:
    store = Store(folder, SETTINGS | dict(format=kind), {})
    store.done()
    store.merge()


def read_pairs(folder: Path, name: str = "") -> None:
    for item in pairs.read_pairs(folder / name).items:
        item.read()


def read_classes(folder: Path) -> None:
    for part in filter(None, knn.read_queries(folder)):
        for item in part.items:
            item.read()


def read_scenes(folder: Path) -> None:
    found = segmentation.read_scenes(folder, "val")
    check_answers(found.files, "masks")
    segmentation.all_labels(found, (4, 4))
    [item.read() for item in found.items]


def read_depths(folder: Path) -> None:
    found = depth.read_nyu(folder, "test")
    check_answers(found.files, "depth maps")
    [(item.read(), one()) for item, one in zip(found.items, found.depths, strict=True)]


def read_emoji(folder: Path) -> None:
    emoji.load_suite(folder, 64, folder / "eyes.json")
    load_pictures(folder / "heldout", 32)


def targets() -> dict[str, Target]:
    """All kinds by name."""
    names = ("config.json", "model.safetensors")
    configs = ("sd/unet/config.json", "sd/vae/config.json", "sd/scheduler/scheduler_config.json")
    return {
        "images": Target(image_files(), read_images),
        "uploads": Target(image_files(), open_uploads),
        "training folder": Target(captioned(), train_on_folder),
        "training metadata.jsonl": Target(metadata("jsonl"), train_on_folder, ("metadata.jsonl",)),
        "training metadata.csv": Target(metadata("csv"), train_on_folder, ("metadata.csv",)),
        "training shards": Target(shard_files(), train_on_shards),
        "extraction shards": Target(shard_files(), partial(list_and_read, "")),
        "extraction list": Target(listed("txt"), partial(list_and_read, "list.txt"), ("list.txt",)),
        "extraction jsonl": Target(listed("jsonl"), partial(list_and_read, "list.jsonl"), ("list.jsonl",)),
        "native file": Target(dict(native()), partial(read_tensors, name="model.safetensors"), names[1:]),
        "native folder": Target(dict(native()), load_folder, names, cost=8),
        "sharded folder": Target(sharded(), read_tensors),
        "sharded folder, converted": Target(sharded(), convert_folder, cost=8),
        "native file, loaded": Target(dict(native()), partial(load_file, name="model.safetensors"), names[1:], cost=8),
        "CompVis file": Target({"w.safetensors": standins.compvis_full()}, partial(read_tensors, name="w.safetensors")),
        "LDM file": Target({"w.safetensors": ldm_file()}, partial(read_tensors, name="w.safetensors")),
        "diffusers folder": Target(diffusers_folder(), partial(convert_folder, name="sd"), configs, cost=8),
        "recipe": Target({"r.yaml": RECIPE, "base.yaml": BASE}, lambda folder: load_recipe(folder / "r.yaml")),
        "checkpoints and log": Target(run_files(), read_run, refuses=False),
        "store, safetensors": Target(store_files("safetensors"), partial(read_store, "safetensors")),
        "store, parquet": Target(store_files("parquet"), partial(read_store, "parquet")),
        "store resumed, safetensors": Target(store_files("safetensors"), partial(resume_store, "safetensors")),
        "store resumed, parquet": Target(store_files("parquet"), partial(resume_store, "parquet")),
        "pairs": Target(pair_files(), partial(read_pairs, name="pairs.json")),
        "SPair": Target(spair_files(), read_pairs),
        "PF-PASCAL": Target(pascal_files(), read_pairs),
        "classes": Target(class_files(), read_classes),
        "labelled shards": Target(labelled_shard_files(), read_classes),
        "scenes": Target(scene_files(), read_scenes),
        "depths": Target(depth_files(), read_depths),
        "labelled depths": Target(labelled_files(), read_depths),
        "emoji": Target(emoji_files(), read_emoji, cost=2),
        "measured row": Target({"r.safetensors": row_file()}, lambda folder: Row.load(folder / "r.safetensors")),
        "depth probe": Target(
            {"p.safetensors": probe_file()}, lambda folder: depth.BinsProbe.load(folder / "p.safetensors", 8)
        ),
    }
