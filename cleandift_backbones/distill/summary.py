"""What a run prints before its first step and after its last, and warnings about its data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.decoding import ImageError, opened
from ..data.listing import counted
from ..data.shards import open_shard, read_member, scan, shards_of
from ..utils.errors import InputError
from .distributed import half_of
from .export import final_losses
from .recipe import Recipe

if TYPE_CHECKING:
    from .setup import Data
    from .train import Training

LOOKED_AT = 200  # images whose size is looked at, spread over the data


def header(training: Training) -> list[str]:
    """What is trained, on what, how, and where the results go."""
    recipe, accelerator, data = training.recipe, training.accelerator, training.data
    sizes = {name: parameter.numel() for name, parameter in training.parameters.items()}
    heads = sum(size for name, size in sizes.items() if name.startswith("heads."))
    lora = f"LoRA of rank {recipe.lora.rank}, " if recipe.lora.rank else ""
    trained = f"student ({lora}{sum(sizes.values()) - heads:,} parameters)"
    trained += f", projection heads ({heads:,} parameters)" if heads else ""
    device, count = accelerator.device, accelerator.num_processes
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    precision = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[half_of(accelerator)]
    batch = f"{recipe.batch_size}" + "".join(
        f" x {number} {what}"
        for number, what in ((recipe.gradient_accumulation, "batches a step"), (count, "processes"))
        if number > 1
    )
    begin = f"from step {training.step:,} " if training.step else ""
    folders = ["log.jsonl", *["samples/"] * bool(recipe.sample_every)]
    folders += ["tensorboard/"] * ("tensorboard" in training.trackers)
    cached = f", latents from {recipe.cache_dir}" if recipe.cache_dir else ""
    return [
        f"model: {recipe.model}, a student of {recipe.teacher}",
        f"trained: {trained}; maps {', '.join(training.module.maps)}",
        *data.summary.lines(),
        f"input: {training.size} px, {recipe.data.crop} crop{cached}; text={recipe.text}",
        f"run: {begin}to step {recipe.max_steps:,}, batch size {batch}; {where}, {precision}",
        f"output: {training.out} with {', '.join(folders)}, native/ at the end, and checkpoints/ "
        f"({recipe.keep_checkpoints} of {checkpoint_bytes(training) / 1e6:.0f} MB)",
    ]


def checkpoint_bytes(training: Training) -> int:
    """Size of a checkpoint: the trained weights, their average if there is one, and AdamW's two moments."""
    kept = 3 + (training.ema is not None)
    return kept * 4 * sum(p.numel() for p in training.parameters.values())


def data_warnings(data: Data, recipe: Recipe) -> list[str]:
    """Sentences about data that train, but not as one expects."""
    found = []
    if both := _also_trained_on(data, recipe):
        found.append(
            f"{both} of {counted(len(data.heldout), 'validation image')} are also trained on: the validation loss says "
            "little about other images; give data.heldout=FOLDER, or more images"
        )
    if warning := data.summary.warning(recipe.text):
        found.append(warning)
    sizes = list(_sizes(data))
    if small := sum(min(size) < data.options.size for size in sizes):
        found.append(
            f"{small} of {counted(len(sizes), 'image')} looked at are smaller than {data.options.size} px, and are "
            "enlarged: give larger images, or a smaller data.size"
        )
    return found


def _also_trained_on(data: Data, recipe: Recipe) -> int:
    """How many validation images are of the training images, or lie in shards that are trained on."""
    if not data.streamed:
        trained = {picture.source for picture in data.pictures}
        return sum(picture.source in trained for picture in data.heldout)
    trained = {os.path.realpath(path) for path in data.pictures}
    shared = tuple(f"{path}:" for path in shards_of(recipe.data.heldout) if os.path.realpath(path) in trained)
    return sum(picture.name.startswith(shared) for picture in data.heldout)


def _sizes(data: Data) -> Iterator[tuple[int, int]]:
    """Width and height of some images, from their headers; those that cannot be read are reported later."""
    every = max(1, len(data.pictures) // LOOKED_AT)
    files = _members(data.pictures[0]) if data.streamed else (p.source for p in data.pictures[::every][:LOOKED_AT])
    for file in files:
        with suppress(ImageError), opened(file, load=False) as image:
            yield image.size


def _members(shard: str) -> Iterator[bytes]:
    """The first images of a shard."""
    with suppress(InputError, OSError), open_shard(shard) as file:
        for sample in scan(shard, LOOKED_AT).samples:
            yield read_member(file, sample.image)


def footer(recipe: Recipe, state: dict[str, Tensor], seconds: float, kept: int) -> list[str]:
    """What came out, and the line that loads it.

    Args:
        state: of `export.student_state`.
        seconds: of this command.
        kept: bytes of the checkpoints that are left.
    """
    out = Path(recipe.output_dir)
    losses = final_losses(out / "log.jsonl")
    change = f"validation loss: {' -> '.join(losses.values())}; " if losses else ""
    minutes, rest = divmod(round(seconds), 60)
    return [
        f"{change}learned timestep {float(state['timestep']):.2f}; {minutes} min {rest} s",
        f"wrote {out / 'native'} after {counted(recipe.max_steps, 'step')}; only continuing needs the checkpoints "
        f"({kept / 1e6:.0f} MB in {out / 'checkpoints'})",
        f'load it: import timm, cleandift_backbones; timm.create_model("local-dir:{out / "native"}", pretrained=True, '
        "features_only=True)",
    ]
