"""Latents and prompt embeddings on the disk: computed once, so that later runs load neither VAE nor text encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import CheckpointError, open_weights
from ..checkpoints.save import write_file
from ..data.batches import DecodeOptions, OrderedBatches, decode
from ..data.images import ImageError
from ..data.sources import ImageSource
from ..utils.atomic import is_file, open_tensors, replacing, set_aside, write_text
from ..utils.progress import tqdm
from ..utils.seeding import step_generator

_logger = logging.getLogger(__name__)


class LatentCache:
    """A folder with one small file per picture: its latents, also mirrored, and its caption's embedding.

    Args:
        folder: created when filled.
        kinds: names of the latents held: "latents", and "student_latents" where the student has an encoder of its own.
        identity: what the files depend on besides the picture: digests of VAE and text encoder, size, dtype. A file
            made under another identity is made again.
    """

    def __init__(self, folder: str | Path, identity: dict, kinds: Sequence[str] = ("latents",)):
        self.folder, self.kinds = Path(folder), tuple(kinds)
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, picture: ImageSource) -> Path:
        file = Path(picture.source)
        stat = file.stat() if os.path.exists(file) else None  # a missing one is an error when it is read
        told = f"{self.identity} {file.resolve()} {stat and (stat.st_size, stat.st_mtime_ns)} {picture.caption}"
        digest = hashlib.sha256(told.encode()).hexdigest()[:32]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _is_whole(self, path: Path) -> bool:
        if not is_file(path):
            return False
        try:
            if {*self.kinds, "prompt"} <= set(open_weights(path).keys()):
                return True
            error = f"{path} holds something else"
        except CheckpointError as damage:
            error = str(damage)
        _logger.warning(f"{error}; kept as {set_aside(path).name}, computed again")
        return False

    def missing(self, pictures: Sequence[ImageSource]) -> list[ImageSource]:
        """The pictures without a whole file; damaged ones are kept under another name.

        Raises:
            FileError: a file cannot be opened at the moment.
        """
        return [picture for picture in pictures if not self._is_whole(self.path(picture))]

    def fill(
        self,
        pictures: Sequence[ImageSource],
        options: DecodeOptions,
        encode: Callable[[Tensor], Sequence[Tensor]],
        embed: Callable[[list[str]], Tensor],
        batch_size: int = 8,
        show: bool = True,
    ) -> list[str]:
        """Computes what is missing, batch by batch, with a progress bar; interrupted, it goes on where it stopped.

        Args:
            options: size and centre crop.
            encode: images B x 3 x size x size -> latents of each of the `kinds`. embed: B captions -> B x L x C.

        Returns:
            what could not be read, with the reason.
        """
        todo, broken = self.missing(pictures), []
        plain = DecodeOptions(options.size, flip=False)
        with tqdm(total=len(todo), desc="latents", unit="picture", disable=not show) as bar:
            for start in range(0, len(todo), batch_size):
                images, good = [], []
                for picture in todo[start : start + batch_size]:
                    try:
                        images.append(decode(picture, plain, torch.Generator()))
                        good.append(picture)
                    except ImageError as error:
                        broken.append(str(error))
                if good:
                    both = torch.stack([*images, *(image.flip(-1) for image in images)])
                    latents = [x.to("cpu", torch.float16) for x in encode(both)]
                    prompts = embed([picture.caption for picture in good]).to("cpu", torch.float16)
                    for number, picture in enumerate(good):
                        held = {k: x[[number, number + len(good)]] for k, x in zip(self.kinds, latents, strict=True)}
                        with replacing(self.path(picture)) as aside:
                            write_file({**held, "prompt": prompts[number]}, aside, None)
                bar.update(len(todo[start : start + batch_size]))
        if not (about := self.folder / "README.txt").exists():
            write_text(about, "Latents and prompt embeddings of cleandift_backbones: may be deleted.\n")
        return broken


class CachedBatches(OrderedBatches):
    """Batches of a `LatentCache`: (latents of each kind, prompts, names).

    Args:
        flip: take the mirrored latents for half of them. Others: see `batches.OrderedBatches`.
    """

    def __init__(self, cache: LatentCache, pictures: Sequence[ImageSource], flip: bool, *args, **kwargs):
        super().__init__(pictures, *args, **kwargs)
        self.cache, self.flip = cache, flip

    def batch(self, pictures: Sequence[ImageSource], first: int) -> tuple[list[Tensor], Tensor, list[str]]:
        latents, prompts = [], []
        for offset, picture in enumerate(pictures):
            held = open_tensors(self.cache.path(picture))
            draw = step_generator(torch.device("cpu"), self.seed, 7, first + offset)
            mirrored = int(self.flip and torch.rand((), generator=draw) < 0.5)
            latents.append([held.get_slice(kind)[mirrored] for kind in self.cache.kinds])
            prompts.append(held.get_tensor("prompt"))
        return [torch.stack(x) for x in zip(*latents)], torch.stack(prompts), [picture.name for picture in pictures]
