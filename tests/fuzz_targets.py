"""What the generated damage is tried on: for each kind of input a small valid folder, and the code that reads it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import standins
import timm
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

import cleandift_backbones  # noqa: F401  (registers with timm)
from cleandift_backbones import checkpoints, convert
from cleandift_backbones.app.pictures import open_picture
from cleandift_backbones.distill import shards as training_shards
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.distill.compose import load_pictures
from cleandift_backbones.distill.data import DecodeOptions, decode_batch, list_pictures, plain_images
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.trainer import read_log
from cleandift_backbones.evaluation import depth, emoji, knn, pairs, segmentation
from cleandift_backbones.evaluation.items import check_answers
from cleandift_backbones.evaluation.report import Row
from cleandift_backbones.extraction import Features
from cleandift_backbones.extraction.formats import Computed
from cleandift_backbones.extraction.sources import list_entries
from cleandift_backbones.extraction.store import Store
from cleandift_backbones.extractor import load_extractor
from cleandift_backbones.images import read_image, to_input
from cleandift_backbones.tars import find_shards


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        files: paths below a folder -> bytes: a valid input.
        read: reads the folder as the package does; what it returns counts for nothing.
        damaged: those of the files that are damaged; all if it is empty.
        cost: how many examples of other kinds one takes; the slow ones get fewer.
    """

    files: dict[str, bytes]
    read: Callable[[Path], object]
    damaged: tuple[str, ...] = ()
    cost: float = 1

    @property
    def names(self) -> tuple[str, ...]:
        return self.damaged or tuple(self.files)


def image(seed: int = 0, size: tuple[int, int] = (72, 64), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tar(members: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def text(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def lines(values: list) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def table(rows: list[dict]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def drained(found: object) -> object:
    """Asks for everything that a lazy result would read later."""
    return [drained(one) for one in found] if isinstance(found, Iterator) else found


# --- images ---


def image_files() -> dict[str, bytes]:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "steps: 20", zip=True)
    floats = Image.fromarray(np.random.default_rng(1).random((64, 72), dtype=np.float32))
    deep = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (64, 72), dtype=np.uint16))
    moving = dict(save_all=True, append_images=[image(3)])
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a.jpg": encoded(image(), "JPEG", exif=exif), "a.png": encoded(image(mode="RGBA"), "PNG", pnginfo=info),
        "palette.png": encoded(image(mode="P"), "PNG"), "deep.png": encoded(deep, "PNG"),
        "a.webp": encoded(image(), "WEBP"), "a.tif": encoded(image(), "TIFF", compression="tiff_lzw"),
        "raw.tiff": encoded(image(), "TIFF"), "floats.tif": encoded(floats, "TIFF"),
        "jpeg.tif": encoded(image(), "TIFF", compression="jpeg"), "a.gif": encoded(image(mode="P"), "GIF", **moving),
        "a.bmp": encoded(image(), "BMP"), "a.ppm": encoded(image(), "PPM"),
        "ink.jpg": encoded(image(mode="CMYK"), "JPEG"),
    }  # fmt: skip


def read_images(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to_input(read_image(path, min_side=1), 32, "crop")


def open_uploads(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        open_picture(path.read_bytes(), path.name)


def captioned() -> dict[str, bytes]:
    return {
        "a.png": encoded(image(0), "PNG"), "a.txt": "a red cup, café".encode(), "b.jpg": encoded(image(1), "JPEG"),
        "b.json": text({"caption": "two cups"}), "deep/c.webp": encoded(image(2), "WEBP"), "deep/c.txt": b"three",
    }  # fmt: skip


def train_on_folder(folder: Path) -> None:
    options = DecodeOptions(32, crop="random")
    found = list_pictures(folder)
    decode_batch(found, options, 0, 7, 0)
    plain_images(found, options)


def train_on_shards(folder: Path) -> None:
    batches = training_shards.ShardBatches(find_shards(folder), DecodeOptions(32), 0, 2, buffer=2)
    stream = iter(batches)
    for _ in range(3):
        next(stream)


def list_and_read(data: str, folder: Path) -> None:
    entries, _ = list_entries(str(folder / data) if data else str(folder))
    for entry in entries:
        entry.read()


def shard_files() -> dict[str, bytes]:
    members = {
        "0001.jpg": encoded(image(1), "JPEG"), "0001.txt": b"a cup", "0002.png": encoded(image(2), "PNG"),
        "0002.json": text({"caption": "cups"}), "x/0.5.webp": encoded(image(3), "WEBP"),
    }  # fmt: skip
    return {
        "0.tar": tar(members),
        "1.tar": tar({f"b{name}": data for name, data in members.items()}, tarfile.PAX_FORMAT),
    }


# --- weights ---

CFG = standins.CFG


@cache
def native() -> dict[str, bytes]:
    """A native folder of the test model, as convert writes it."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        model = timm.create_model("test_cleandift", final_map="us10")
        from cleandift_backbones.hub import save_folder

        folder = save_folder(model, Path(temporary, "native"))
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@cache
def sharded() -> dict[str, bytes]:
    from safetensors.torch import load

    state = load(native()["model.safetensors"])
    halves = {0: {}, 1: {}}
    for number, (name, tensor) in enumerate(sorted(state.items())):
        halves[number % 2][name] = tensor
    names = {number: f"model-0000{number + 1}-of-00002.safetensors" for number in halves}
    where = {name: names[number] for number, part in halves.items() for name in part}
    index = text({"metadata": {"total_size": 0}, "weight_map": where})
    files = {names[number]: save(part, {"format": "pt"}) for number, part in halves.items()}
    return files | {"model.safetensors.index.json": index, "config.json": native()["config.json"]}


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


# --- recipes, logs and checkpoints of a run ---

RECIPE = b"""base: base.yaml
model: cleandift_tiny
teacher: dift_tiny
output_dir: runs/x
data: {path: web, size: 128}
maps: {us6: 1, mid: 0.5}
lora: {rank: 4}
max_steps: 20
"""
BASE = b"learning_rate: 1e-5\nheads: {depth: 2, conditioning: film}\ntimestep_range: [1, 999]\n"


@cache
def run_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        kept = Checkpoints(temporary, 3)
        for step in (1, 2):
            kept.save(
                step, {"module/a": torch.randn(3, 4), "timestep": torch.tensor(261.0)}, {"step": step, "broken": []}
            )
        files = {path.name: path.read_bytes() for path in Path(temporary).iterdir()}
    return files | {"log.jsonl": lines([{"step": 1, "loss": 0.5}, {"step": 2, "validation": -0.5}])}


def read_run(folder: Path) -> None:
    Checkpoints(folder).load()
    if (folder / "log.jsonl").is_file():
        read_log(folder / "log.jsonl")


# --- stores ---

SETTINGS = dict(format="safetensors", maps=["us6", "mid"], model="m")


@cache
def store_files(kind: str) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        store = Store(temporary, SETTINGS | dict(format=kind), {})
        for number in range(2):
            maps = {"us6": torch.randn(2, 3, 4, 4), "mid": torch.randn(2, 5, 2, 2)}
            store.add(Computed([f"{number}/a.png", f"{number}/b.png"], [(40, 32)] * 2, (32, 32), maps))
            store.fail(f"{number}/c.png", "c.png", "truncated")
            store.flush()
        store.merge()
        found = [p for p in Path(temporary).rglob("*") if p.is_file() and not p.name.startswith(".")]
        return {str(path.relative_to(temporary)): path.read_bytes() for path in found}


def read_store(kind: str, folder: Path) -> None:
    found = Features(folder)
    for one in found:
        assert one["us6"].shape == (3, 4, 4)
    assert found.failures is not None


def resume_store(kind: str, folder: Path) -> None:
    store = Store(folder, SETTINGS | dict(format=kind), {})
    store.done()
    store.merge()


# --- evaluation ---


def pair_files() -> dict[str, bytes]:
    pair = dict(
        source="a.png", target="b.jpg", source_points=[[1, 2], [10.5, 20]], target_points=[[3, 4], [5, 6]],
        category="cat", target_box=[0, 0, 30, 20],
    )  # fmt: skip
    return {"pairs.json": text([pair, pair]), "a.png": encoded(image(0), "PNG"), "b.jpg": encoded(image(1), "JPEG")}


def read_pairs(folder: Path, name: str = "") -> None:
    for item in pairs.read_pairs(folder / name).items:
        item.read()


def spair_files() -> dict[str, bytes]:
    pair = dict(
        src_imname="a.jpg", trg_imname="b.jpg", src_imsize=[72, 64, 3], trg_imsize=[72, 64, 3], category="cat",
        trg_bndbox=[0, 0, 30, 20], src_kps=[[1, 2]], trg_kps=[[3, 4]],
    )  # fmt: skip
    return {
        "JPEGImages/cat/a.jpg": encoded(image(0), "JPEG"), "JPEGImages/cat/b.jpg": encoded(image(1), "JPEG"),
        "PairAnnotation/test/0-a-b.json": text(pair), "Layout/large/test.txt": b"0-a-b\n",
    }  # fmt: skip


def pascal_files() -> dict[str, bytes]:
    from scipy.io import savemat

    def mat(points) -> bytes:
        buffer = io.BytesIO()
        savemat(buffer, dict(kps=np.array(points, float), bbox=np.array([0, 0, 30, 20])))
        return buffer.getvalue()

    row = dict(source_image="x/a.jpg", target_image="x/b.jpg", **{"class": 8})
    return {
        "test_pairs.csv": table([row]), "JPEGImages/a.jpg": encoded(image(0), "JPEG"),
        "JPEGImages/b.jpg": encoded(image(1), "JPEG"), "Annotations/cat/a.mat": mat([[1, 2], [np.nan, np.nan]]),
        "Annotations/cat/b.mat": mat([[1, 2], [3, 4]]),
    }  # fmt: skip


def class_files() -> dict[str, bytes]:
    rows = [dict(ImageId=f"v{n}", PredictionString=f"n0{n} 1 2 3 4") for n in range(2)]
    files = {f"val/v{n}.JPEG": encoded(image(n), "JPEG") for n in range(2)}
    files |= {f"train/n0{n}/a{n}.JPEG": encoded(image(n), "JPEG") for n in range(2)}
    return files | {"LOC_val_solution.csv": table(rows)}


def read_classes(folder: Path) -> None:
    for part in knn.read_train_and_val(folder):
        for item in part.items:
            item.read()


def scene_files() -> dict[str, bytes]:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 21, (64, 72), dtype=np.uint8), "L")
    return {
        "JPEGImages/a.jpg": encoded(image(0), "JPEG"), "SegmentationClass/a.png": encoded(mask, "PNG"),
        "ImageSets/Segmentation/val.txt": b"a\n",
    }  # fmt: skip


def read_scenes(folder: Path) -> None:
    found = segmentation.read_scenes(folder, "val")
    check_answers(found.files, "masks")
    segmentation.all_labels(found, (4, 4))
    [item.read() for item in found.items]


def depth_files() -> dict[str, bytes]:
    metres = Image.fromarray(np.random.default_rng(0).integers(0, 9000, (64, 72), dtype=np.uint16))
    return {
        "nyu_test.txt": b"/k/a.jpg /k/d.png 518.8579\n", "k/a.jpg": encoded(image(0), "JPEG"),
        "k/d.png": encoded(metres, "PNG"),
    }  # fmt: skip


def read_depths(folder: Path) -> None:
    found = depth.read_nyu(folder, "test")
    check_answers(found.files, "depth maps")
    [(item.read(), one()) for item, one in zip(found.items, found.depths, strict=True)]


@cache
def labelled_files() -> dict[str, bytes]:
    import h5py
    from scipy.io import savemat

    data, splits = io.BytesIO(), io.BytesIO()
    with h5py.File(data, "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 32), dtype=np.uint8)
        file["depths"] = np.random.default_rng(1).random((2, 40, 32), dtype=np.float32)
    savemat(splits, dict(trainNdxs=[[1]], testNdxs=[[2]]))
    return {"nyu_depth_v2_labeled.mat": data.getvalue(), "splits.mat": splits.getvalue()}


def emoji_files() -> dict[str, bytes]:
    files, rows, eyes = {}, [], {}
    for concept in "AB":
        for number, style in enumerate(("noto", "flat")):
            name = f"heldout/{style}/{concept}.png"
            files[name] = encoded(image(number, (64, 64), "RGBA"), "PNG")
            rows.append(dict(file_name=name.removeprefix("heldout/"), text="cat", style=style, concept=concept))
            rows[-1]["subgroup"] = "x"
            eyes.setdefault(concept, {})[style] = [[0.3, 0.4], [0.7, 0.4]]
    return files | {"heldout/metadata.jsonl": lines(rows), "eyes.json": text({"eyes": eyes})}


def read_emoji(folder: Path) -> None:
    emoji.load_suite(folder, 64, folder / "eyes.json")
    load_pictures(folder / "heldout", 32)


@cache
def row_file() -> bytes:
    import tempfile

    from cleandift_backbones.evaluation.bootstrap import Tally

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "row.safetensors")
        tally = Tally(np.ones((3, 2)), np.ones((3, 2)) * 2)
        Row("label", "clean", {"us6": {"pck": tally}}, {"timestep": 1}, 0.5).save(path)
        return path.read_bytes()


@cache
def probe_file() -> bytes:
    return save({"weight": torch.randn(depth.BINS, 8, 1, 1), "bias": torch.randn(depth.BINS)})


def listed(kind: str) -> dict[str, bytes]:
    files = {"a.png": encoded(image(0), "PNG"), "b ü.jpg": encoded(image(1), "JPEG")}
    if kind == "txt":
        return files | {"list.txt": "a.png\nb ü.jpg\n".encode()}
    return files | {"list.jsonl": lines([{"path": "a.png", "prompt": "x"}, {"file_name": "b ü.jpg", "key": 7}])}


def metadata(kind: str) -> dict[str, bytes]:
    files = {"a.png": encoded(image(0), "PNG"), "b.jpg": encoded(image(1), "JPEG")}
    rows = [{"file_name": "a.png", "text": "a cup"}, {"file_name": "b.jpg", "text": "two, of them\u2028"}]
    return files | ({"metadata.csv": table(rows)} if kind == "csv" else {"metadata.jsonl": lines(rows)})


@cache
def ldm_file() -> bytes:
    """A single file of the original code, as convert writes it."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        folder = standins.write(Path(temporary, "sd"), standins.diffusers_files())
        convert.to_ldm(str(folder), Path(temporary, "w.safetensors"), "dift_test")
        return Path(temporary, "w.safetensors").read_bytes()


def diffusers_folder() -> dict[str, bytes]:
    return {f"sd/{name}": data for name, data in standins.diffusers_files().items()}


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
        "checkpoints and log": Target(run_files(), read_run),
        "store, safetensors": Target(store_files("safetensors"), partial(read_store, "safetensors")),
        "store, parquet": Target(store_files("parquet"), partial(read_store, "parquet")),
        "store resumed, safetensors": Target(store_files("safetensors"), partial(resume_store, "safetensors")),
        "store resumed, parquet": Target(store_files("parquet"), partial(resume_store, "parquet")),
        "pairs": Target(pair_files(), partial(read_pairs, name="pairs.json")),
        "SPair": Target(spair_files(), read_pairs),
        "PF-PASCAL": Target(pascal_files(), read_pairs),
        "classes": Target(class_files(), read_classes),
        "scenes": Target(scene_files(), read_scenes),
        "depths": Target(depth_files(), read_depths),
        "labelled depths": Target(labelled_files(), read_depths),
        "emoji": Target(emoji_files(), read_emoji, cost=2),
        "measured row": Target({"r.safetensors": row_file()}, lambda folder: Row.load(folder / "r.safetensors")),
        "depth probe": Target(
            {"p.safetensors": probe_file()}, lambda folder: depth.BinsProbe.load(folder / "p.safetensors", 8)
        ),
    }
