"""`cleandift demo`: draws what the features of images match."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import InputError, resource_errors
from ..utils.guard import guard, importing
from .arguments import command_parser, option

ABOUT = """
Per pair it writes matches_*.png (points of one image, where each is found in the other, and how similar every place
there is), pca_*.png (three strongest directions of each map as colours) and, for cleandift_* models,
clean_vs_noisy_*.png (the same from the untouched diffusion model fed with noise); and overview.png.
"""
EXAMPLES = [
    ("", "the sample images that come with the package"),
    ("--data a.jpg b.jpg", "points of a.jpg found in b.jpg"),
    ("--model resnet18 --map layer3", "any timm model"),
]


@guard("the figures written so far are kept")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws. See `utils.guard.guard` for exit codes."""
    started = time.perf_counter()
    args = parser().parse_args(arguments)
    points = _check(args)
    logging.getLogger("timm").setLevel(logging.ERROR)
    with importing():
        import torch

        from ..data.images import check_folder
        from ..features.options import model_arguments
        from ..optimization.cpu_malloc import keep_freed_memory
        from ..publish.training_data import training_data
        from ..utils.atomic import save_png
        from ..visualize import demo
    check_folder(args.out)
    keep_freed_memory()  # of the whole process, which is this command's
    pairs = demo.pairs_of(args.data, torch.tensor(points) if points else None) if args.data else demo.sample_pairs()
    name = args.model.removeprefix("random:")
    pretrained = name == args.model and not args.random_weights
    weights = model_arguments(weights=args.weights)
    models = demo.load_models(name, args.map, args.match_map, args.size, args.device, pretrained, **weights)
    if args.threads:
        torch.set_num_threads(args.threads)
    with resource_errors("lower --size"):
        demo.compute(pairs, models)
    for file, image in demo.draw(pairs, models):
        save_png(image, Path(args.out, file))
        print(f"wrote {Path(args.out, file)}  ({image.width} x {image.height})", flush=True)
    seconds = time.perf_counter() - started
    print(f"{name}: {len(pairs)} pairs, points matched on {models.matched}, {seconds:.1f} s in all")
    if pretrained and not args.weights and (known := training_data(name)):
        print(f"{name} is trained on {known}")


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("demo", EXAMPLES, ABOUT)
    option(result, "--model", "or 'pixels'; random:NAME has random weights", default="cleandift_tiny")
    option(
        result, "--data", "files of yours: the first is compared with each of the others (default: the samples)",
        nargs="+", metavar="FILE",
    )  # fmt: skip
    result.add_argument(
        "--points", nargs="+", metavar="X,Y",
        help="points in the first file of --data, as fractions of its width and height; without them a few are chosen "
        "where both images agree",
    )  # fmt: skip
    option(result, "--map", "those that are shown (default: up to three)", default=[])
    result.add_argument(
        "--match-map", metavar="MAP", help="map to match points on (default: the model's, or the middle one shown)"
    )
    result.add_argument("--size", type=int, help="side of the model's input in pixels (default: the model's own)")
    option(result, "--weights")
    option(result, "--out", "a folder for the figures", default="demo")
    option(result, "--device")
    result.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    # An earlier spelling of --model random:NAME.
    result.add_argument("--random-weights", action="store_true", help=argparse.SUPPRESS)
    return result


def _check(args: argparse.Namespace) -> list[tuple[float, float]] | None:
    """Finds what is wrong with the options before any long work; returns the points, fractions of the first image."""
    if args.size is not None and args.size < 64:
        raise InputError(f"--size {args.size} is too small; give at least 64")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads} is too small; give at least 1")
    if args.data and len(args.data) < 2:
        raise InputError(f"--data got only {args.data[0]}; give two files or more")
    if args.points and not args.data:
        raise InputError("--points belong to images of your own; give --data too")
    return [_point(text) for text in args.points] if args.points else None


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--points {text!r} is no point; give x,y such as 0.4,0.55") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"--points {text} lies outside the image; give fractions from 0 to 1")
    return x, y


if __name__ == "__main__":
    sys.exit(main())
