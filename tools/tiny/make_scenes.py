#!/usr/bin/env python3
"""Make a small labelled data set for mmsegmentation and mmdetection: cut-outs composed on drawn backgrounds.

Masks and boxes come from the pictures' alpha, so they are exact:

    OUT/images/train/0000.png  OUT/annotations/train/0000.png (class per pixel, 0 = background)  OUT/train.json (COCO)
    OUT/images/val/0000.png    OUT/annotations/val/0000.png                                      OUT/val.json

Without --pictures the sample emoji of the package are used: the val scenes show drawings that the train scenes do not.
With it, a folder made by tools/tiny/make_pictures.py (train and heldout concepts), or any folder CLASS/*.png of
pictures with transparency (every fifth goes to val). Equal seeds give equal scenes.

    python tools/tiny/make_scenes.py --out data/scenes
    python tools/tiny/make_scenes.py --out data/scenes --pictures data/emoji --train 1000 --val 200
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    import numpy as np
    from PIL import Image

    from cleandift_backbones.data.decoding import opened
    from cleandift_backbones.data.images import check_folder
    from cleandift_backbones.models.architectures import ASSETS
    from cleandift_backbones.utils.atomic import write_text
    from cleandift_backbones.utils.errors import CleanDIFTError, file_errors
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.progress import tqdm
    from cleandift_backbones.utils.records import read_records

# class -> beginnings of Unicode's names of subgroups; configs/*/_base_/datasets/scenes.py name the same classes
CLASSES = {
    "face": ("face-",),
    "animal": ("animal-",),
    "food": ("food-",),
    "transport": ("transport-",),
    "time": ("time",),
}
SAMPLES = {  # concepts in assets/samples
    "nerd-face": "face",
    "cat-face": "animal",
    "tiger-face": "animal",
    "soft-ice-cream": "food",
    "bus": "transport",
    "watch": "time",
}
Pictures = dict[str, list[Path]]  # class -> files
Objects = list[tuple[int, np.ndarray]]  # class, from 1, and mask


class SceneError(CleanDIFTError):
    """Something in the pictures is missing or not as expected; the message says what to do."""


def sample_pictures() -> tuple[Pictures, Pictures]:
    """The samples of the package: of each concept, the first style for training, the second for validation."""
    train, val = defaultdict(list), defaultdict(list)
    for concept, name in SAMPLES.items():
        first, second = sorted((ASSETS / "samples").glob(f"{concept}_*.png"))
        train[name].append(first)
        val[name].append(second)
    return train, val


def emoji_pictures(folder: Path) -> Pictures:
    """A half (train, heldout) of a folder made by tools/tiny/make_pictures.py, by CLASSES."""
    found = defaultdict(list)
    for line, entry in read_records(folder / "metadata.jsonl"):
        try:
            subgroup, file = entry["subgroup"], folder / entry["file_name"]
        except (KeyError, TypeError) as error:
            raise SceneError(
                f"{folder / 'metadata.jsonl'}, line {line}: no file_name or subgroup ({error}); make the folder again"
            ) from None
        for name, beginnings in CLASSES.items():
            if subgroup.startswith(beginnings):
                found[name].append(file)
    return found


def read_pictures(folder: Path | None) -> tuple[Pictures, Pictures]:
    """class -> files, for training and for validation.

    Raises:
        SceneError: no such folder, or of no known layout.
    """
    if folder is None:
        return sample_pictures()
    if (folder / "train" / "metadata.jsonl").is_file() and (folder / "heldout" / "metadata.jsonl").is_file():
        return emoji_pictures(folder / "train"), emoji_pictures(folder / "heldout")
    train, val = {}, {}
    for part in sorted(p for p in folder.glob("*/") if p.is_dir()):
        files = sorted(part.glob("*.png"))
        train[part.name], val[part.name] = [f for i, f in enumerate(files) if i % 5], files[::5]
    if not train or not all([*train.values(), *val.values()]):
        raise SceneError(
            f"{folder} is neither made by tools/tiny/make_pictures.py nor a folder CLASS/*.png with two pictures per "
            "class"
        )
    return train, val


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """A gradient between two colours, with stripes, checks or noise on it, or nothing."""
    colours = rng.uniform(40, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size
    along = x * np.cos(angle) + y * np.sin(angle)
    weight = (along - along.min()) / np.ptp(along)
    kind = rng.integers(4)
    period = rng.integers(4, 16)
    if kind == 1:
        weight = (along * period % 1 > 0.5).astype(float)
    elif kind == 2:
        weight = ((x * period).astype(int) + (y * period).astype(int)) % 2
    pixels = colours[0] + weight[..., None] * (colours[1] - colours[0])
    if kind == 3:
        pixels = pixels + rng.normal(0, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def cut_out(rng: np.random.Generator, path: Path, side: int) -> Image.Image:
    """A picture at a side of `side`, perhaps mirrored, turned a little, cropped to what is not transparent."""
    with opened(path) as picture:
        picture = picture.copy()
    if picture.mode != "RGBA":
        raise SceneError(f"{path} has no transparency ({picture.mode}): objects are cut out by it")
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    box = picture.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
    if box is None:
        raise SceneError(f"{path} is transparent everywhere")
    picture = picture.crop(box)
    scale = side / max(picture.size)
    return picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.LANCZOS)


def compose(
    rng: np.random.Generator, pictures: Pictures, size: int
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """One scene: the picture, and its objects; masks are size x size, of what is seen of an object."""
    scene = background(rng, size)
    names = list(pictures)
    objects: Objects = []
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(len(names)))
        files = pictures[names[label]]
        part = cut_out(rng, files[rng.integers(len(files))], int(size * rng.uniform(0.25, 0.6)))
        for _ in range(20):
            left, top = (int(rng.integers(0, size - s + 1)) for s in part.size)
            alpha = np.zeros((size, size), np.uint8)
            alpha[top : top + part.height, left : left + part.width] = np.asarray(part.getchannel("A"))
            mask = alpha > 127
            if all((mask & other).sum() <= 0.2 * other.sum() for _, other in objects):
                scene.paste(part, (left, top), part)
                objects = [(other_label, other & ~mask) for other_label, other in objects] + [(label + 1, mask)]
                break
    return scene, objects


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding: column by column, zeros first."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return dict(size=list(mask.shape), counts=runs.tolist())


def coco_annotation(label: int, mask: np.ndarray, image_id: int, identity: int) -> dict:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return dict(
        id=identity,
        image_id=image_id,
        category_id=label,
        bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        area=int(mask.sum()),
        segmentation=run_lengths(mask),
        iscrowd=0,
    )


def make_split(out: Path, split: str, pictures: Pictures, count: int, size: int, seed: int) -> None:
    for kind in ("images", "annotations"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in tqdm(range(count), desc=split, unit="scene"):
        rng = np.random.default_rng([seed, split == "val", i])
        scene, objects = compose(rng, pictures, size)
        labels = np.zeros((size, size), np.uint8)
        for label, mask in objects:
            labels[mask] = label
            annotations.append(coco_annotation(label, mask, i, len(annotations) + 1))
        scene.save(out / "images" / split / f"{i:04}.png")
        Image.fromarray(labels).save(out / "annotations" / split / f"{i:04}.png")
        images.append(dict(id=i, file_name=f"{i:04}.png", width=size, height=size))
    categories = [dict(id=k, name=name) for k, name in enumerate(pictures, 1)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    write_text(out / f"{split}.json", json.dumps(coco))


def check_out(out: Path) -> None:
    """Raises SceneError for a folder with files of other names than those that this tool writes."""
    ours = r"(train|val)\.json|(images|annotations)/(train|val)/\d{4,}\.png|(.*/)?\..*"
    names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    if others := sorted(name for name in names if not re.fullmatch(ours, name)):
        raise SceneError(f"{out} holds other files ({', '.join(others[:3])}): choose another --out")


@guard("the data set is not complete; the same command writes it again")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pictures", type=Path, help="folder of pictures with transparency (default: the samples)")
    parser.add_argument("--train", type=int, default=200, help="number of train scenes (200)")
    parser.add_argument("--val", type=int, default=50, help="number of val scenes (50)")
    parser.add_argument("--size", type=int, default=128, help="side of the scenes in pixels, at least 64 (128)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.size < 64 or options.train < 1 or options.val < 1 or options.seed < 0:
        parser.error("--size must be at least 64, --train and --val at least 1, --seed at least 0")
    check_folder(options.out)
    train, val = read_pictures(options.pictures)
    if missing := sorted(set(train) - set(val)):
        raise SceneError(f"{options.pictures}: no images for validation of the classes {', '.join(missing)}")
    val = {name: val[name] for name in train}
    with hold(options.out), file_errors(options.out):
        check_out(options.out)
        make_split(options.out, "train", train, options.train, options.size, options.seed)
        make_split(options.out, "val", val, options.val, options.size, options.seed)
    print(f"{options.out}: classes {', '.join(train)}")
    if list(train) != list(CLASSES):
        print("in the config: the data sets' metainfo and num_classes must name these classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
