"""Small valid inputs of all kinds: paths below a folder -> bytes. Generated damage starts from them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import standins
import timm
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

import cleandift_backbones  # noqa: F401  (registers with timm)
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.evaluation.report import Row
from cleandift_backbones.evaluation.tasks import depth
from cleandift_backbones.features.formats import Computed
from cleandift_backbones.features.store import Store
from cleandift_backbones.publish import convert


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


def captioned() -> dict[str, bytes]:
    return {
        "a.png": encoded(image(0), "PNG"), "a.txt": "a red cup, café".encode(), "b.jpg": encoded(image(1), "JPEG"),
        "b.json": text({"caption": "two cups"}), "deep/c.webp": encoded(image(2), "WEBP"), "deep/c.txt": b"three",
    }  # fmt: skip


def shard_files() -> dict[str, bytes]:
    members = {
        "0001.jpg": encoded(image(1), "JPEG"), "0001.txt": b"a cup", "0002.png": encoded(image(2), "PNG"),
        "0002.json": text({"caption": "cups"}), "x/0.5.webp": encoded(image(3), "WEBP"),
    }  # fmt: skip
    return {
        "0.tar": tar(members),
        "1.tar": tar({f"b{name}": data for name, data in members.items()}, tarfile.PAX_FORMAT),
    }


@cache
def native() -> dict[str, bytes]:
    """A native folder of the test model, as convert writes it."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        model = timm.create_model("test_cleandift", final_map="us10")
        from cleandift_backbones.publish.card import save_folder

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


def pair_files() -> dict[str, bytes]:
    pair = dict(
        source="a.png", target="b.jpg", source_points=[[1, 2], [10.5, 20]], target_points=[[3, 4], [5, 6]],
        category="cat", target_box=[0, 0, 30, 20],
    )  # fmt: skip
    return {"pairs.json": text([pair, pair]), "a.png": encoded(image(0), "PNG"), "b.jpg": encoded(image(1), "JPEG")}


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


def labelled_shard_files() -> dict[str, bytes]:
    shards = {}
    for number in range(2):
        members = {"0.png": encoded(image(number), "PNG"), "0.cls": b"3", "1.jpg": encoded(image(number + 2), "JPEG")}
        shards[f"{number}.tar"] = tar(members | {"1.json": text({"text": "a cup", "label": "cup"})})
    return shards


def scene_files() -> dict[str, bytes]:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 21, (64, 72), dtype=np.uint8), "L")
    return {
        "JPEGImages/a.jpg": encoded(image(0), "JPEG"), "SegmentationClass/a.png": encoded(mask, "PNG"),
        "ImageSets/Segmentation/val.txt": b"a\n", "classes.txt": "".join(f"thing {n}\n" for n in range(21)).encode(),
    }  # fmt: skip


def depth_files() -> dict[str, bytes]:
    metres = Image.fromarray(np.random.default_rng(0).integers(0, 9000, (64, 72), dtype=np.uint16))
    return {
        "nyu_test.txt": b"/k/a.jpg /k/d.png 518.8579\n", "k/a.jpg": encoded(image(0), "JPEG"),
        "k/d.png": encoded(metres, "PNG"),
    }  # fmt: skip


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
        convert.to_ldm(str(folder), Path(temporary, "w.safetensors"), "test_dift")
        return Path(temporary, "w.safetensors").read_bytes()


def diffusers_folder() -> dict[str, bytes]:
    return {f"sd/{name}": data for name, data in standins.diffusers_files().items()}
