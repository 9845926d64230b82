"""Options that the training scripts share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from cleandift_backbones.utils.errors import InputError
from tools.tiny.picture_sets import PictureSets


def above_zero(kind: type) -> Callable[[str], float]:
    """For `type` of argparse: an int or float above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def whole_numbers(text: str, option: str) -> list[int]:
    """ "24,48,96" -> [24, 48, 96]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"{option} {text}: give whole numbers with commas between them, such as 24,48,96")
    return [int(part) for part in text.split(",")]


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the emoji and the photographs."""
    add = parser.add_argument
    add("--data", help="folder of emoji with train/ and heldout/ (tools/tiny/make_pictures.py writes it)")
    add("--photos", help="photographs with captions to train on: a folder, or .tar shards (folder or pattern)")
    add("--photos-heldout", help="photographs that the held-out figures are taken on, likewise")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `picture_sets.PictureSets`."""
    add_set_arguments(parser)
    add = parser.add_argument
    add("--photo-share", type=float, default=0.75, help="part of each batch that is photographs (default: 0.75)")


def picture_sets(options: argparse.Namespace) -> PictureSets:
    """The images that the options of `add_picture_arguments` name."""
    return PictureSets(options.data, options.photos, options.photos_heldout, options.photo_share, options.size)


def add_run_arguments(parser: argparse.ArgumentParser, *, batch_size: int, lr: float) -> None:
    """The options that all training scripts share."""
    add = parser.add_argument
    add("--out", required=True, help="folder for the result, the checkpoint, the log and the sheets")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--seed", type=int, default=0, help="equal seeds give equal runs on equal machines (default: 0)")
    add("--batch-size", type=above_zero(int), default=batch_size, help=f"pictures a step (default: {batch_size})")
    add("--lr", type=above_zero(float), default=lr, help=f"peak learning rate of AdamW (default: {lr})")
    add("--warmup", type=int, default=500, help="steps of linear warm-up (default: 500)")
    add("--max-steps", type=above_zero(int), help="end of the schedule in steps (default: none, the time decides)")
    add("--max-minutes", type=above_zero(float), help="end of the schedule in minutes of training, over all resumes")
    add(
        "--stop-minutes",
        type=above_zero(float),
        help="save and stop this command after so long",
    )
    add("--stop-after", type=above_zero(int), help="save and stop this command after so many steps in all")
    add("--resume", choices=("auto", "never"), default="auto", help="go on from --out's checkpoint (default: auto)")
    add(
        "--save-steps",
        type=above_zero(int),
        default=1000,
        help="steps between checkpoints; also every 2 minutes (default: 1000)",
    )
    add("--eval-steps", type=above_zero(int), default=500, help="held-out figures every N steps (default: 500)")
    add("--sample-steps", type=above_zero(int), default=2500, help="a sheet of pictures every N steps (default: 2500)")
    add("--save-dtype", choices=("fp32", "fp16"), default="fp32", help="precision of the final folder (default: fp32)")
    add("--ema", type=float, default=0.999, help="decay of the weights' moving average (default: 0.999)")
    add("--size", type=above_zero(int), help="resize the pictures to this side in pixels (default: as they are)")
    add("--compile", action="store_true", help="torch.compile: slower to start, faster to run on a GPU")
