"""Pictures and captions for the distillation: a folder, read in a seeded order that a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..images import ImageError, read_image, to_input
from .compose import Compositor
from .trainer import batch_indices, mix_seed

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def list_pictures(folder: str | Path) -> list[tuple[Path, str]]:
    """(file, caption) of a folder: by metadata.jsonl (Hugging Face imagefolder: file_name, text), else every picture
    below it, sorted, with the text of a side-car .txt as its caption, or "".

    Raises:
        ValueError: no pictures there, or an entry of metadata.jsonl without file_name.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if table.is_file():
        entries = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all("file_name" in entry for entry in entries):
            raise ValueError(f"{table}: every line needs a file_name")
        found = [(folder / entry["file_name"], entry.get("text") or "") for entry in entries]
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        sidecars = [p.with_suffix(".txt") for p in paths]
        found = [(p, s.read_text(encoding="utf-8").strip() if s.is_file() else "") for p, s in zip(paths, sidecars)]
    if not found:
        raise ValueError(f"no pictures in {folder}: give data.path a folder of {', '.join(sorted(SUFFIXES))} files")
    return found


class Batches(Dataset):
    """Training batches by their place in the run: item n is the batch of step start + n.

    A batch depends on the seed and its step alone, so that a resumed run goes on where it stopped, whatever the number
    of workers. Give it to a DataLoader with batch_size=None.

    Args:
        pictures: of `list_pictures`.
        size: side in pixels; the shorter side is resized to it, then the centre is cut out.
        background: "white", or "random" for a `Compositor` (placement, colours, background) on transparent pictures;
            other pictures are mirrored at random.
        steps: length of the run, of which `start` are done.
    """

    def __init__(self, pictures, size: int, background: str, seed: int, batch_size: int, steps: int, start: int = 0):
        self.pictures, self.size, self.seed = pictures, size, seed
        self.batch_size, self.start, self.steps = batch_size, start, steps
        self.compositor = Compositor() if background == "random" else None

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, number: int) -> tuple[Tensor, list[str], list[str]]:
        """Images B x 3 x size x size in [-1, 1], captions, file names."""
        step = number + self.start
        chosen = [
            self.pictures[i] for i in batch_indices(step, self.batch_size, len(self.pictures), self.seed).tolist()
        ]
        generator = torch.Generator().manual_seed(mix_seed(self.seed, step, 7))
        if self.compositor is not None and all(is_transparent(path) for path, _ in chosen):
            rgba = torch.stack([read_rgba(path, self.size) for path, _ in chosen])
            images = self.compositor(rgba, generator)
        else:
            images = torch.stack([load_image(path, self.size) for path, _ in chosen])
            flip = torch.rand(len(images), generator=generator) < 0.5
            images[flip] = images[flip].flip(-1)
        return images, [caption for _, caption in chosen], [str(path) for path, _ in chosen]


def is_transparent(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode in ("RGBA", "LA") or "transparency" in image.info


def read_rgba(path: Path, size: int) -> Tensor:
    """A transparent square picture: uint8 4 x size x size."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{path} is not a readable picture ({error}): replace or remove it") from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_image(path: Path, size: int) -> Tensor:
    """Any picture: 3 x size x size in [-1, 1], shorter side resized, centre cut out."""
    return to_input(read_image(path), size, mode="crop", mean=(0.5,) * 3, std=(0.5,) * 3)
