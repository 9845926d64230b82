#!/usr/bin/env python
"""What a light latent encoder saves, and what it changes: work, time, and maps beside the first model's.

    python tools/tiny/compare_encoders.py cleandift_tiny cleandift_tiny+tiny local-dir:runs/light/native --data heldout
    python tools/tiny/compare_encoders.py cleandift_sd21 cleandift_sd21+tiny --size 512 --work-only

`NAME+tiny` is NAME with latent_encoder="tiny". GFLOP are those of torch's counter for one picture, down to the map
--map, of the whole model and of its encoder; times are medians over --rounds, the models taking turns; similarities are
means of the cosine over positions and pictures. --work-only needs no weights and no pictures.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    import timm
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    import cleandift_backbones  # noqa: F401
    from cleandift_backbones.data.batches import DecodeOptions, plain_images
    from cleandift_backbones.data.sources import list_training_sources
    from cleandift_backbones.features.extractor import resolve_device
    from cleandift_backbones.models.architectures import spec_of
    from cleandift_backbones.utils.errors import file_errors, missing_weights

    sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who run this file by its path

    from benchmarks.inference import flop_counter

SHOWN = ("us9", "us6", "us3", "mid")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        help="timm names, local-dir:FOLDER, NAME+tiny; the others are held against the first",
    )
    add("--data", help="folder of pictures")
    add("--limit", type=int, default=64, help="pictures used, spread over the folder (default: 64)")
    add("--size", type=int, help="side in pixels (default: the first model's)")
    add("--map", default="us6", help="the finest map that is computed when work and time are measured (default: us6)")
    add("--rounds", type=int, default=15, help="timed passes of each model (default: 15)")
    add("--batch-size", type=int, default=1, help="pictures of a timed pass (default: 1)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--work-only", action="store_true", help="count GFLOP alone, on models without weights")
    options = parser.parse_args(arguments)
    if not options.work_only and not options.data:
        parser.error("--data FOLDER is needed, but for --work-only")
    if min(options.rounds, options.limit, options.batch_size) < 1:
        parser.error("--rounds, --limit and --batch-size must be at least 1")
    if options.size is not None and options.size < 64:
        parser.error("--size must be at least 64")
    return options


def build(model: str, pretrained: bool) -> nn.Module:
    """The model with all its maps."""
    name, _, encoder = model.partition("+")
    kwargs = dict(latent_encoder=encoder) if encoder else {}
    if ":" not in name:
        spec_of(name)
    remedy = "Give local-dir:FOLDER, a folder of tools/convert.py, or --work-only"
    with missing_weights(remedy), file_errors(name):
        made = timm.create_model(name, pretrained=pretrained, final_map="us10", **kwargs)
    return made.eval().requires_grad_(False)


def work(model: nn.Module, last: str, images: Tensor) -> tuple[float, float]:
    """GFLOP a picture: of everything down to a map, and of the latent encoder."""
    totals = []
    for run in (lambda: model._maps(images, [last]), lambda: model.vae(images)):
        with flop_counter() as counter, torch.no_grad():
            run()
        totals.append(counter.get_total_flops() / 1e9 / len(images))
    return totals[0], totals[1]


def times(models: list[nn.Module], last: str, images: Tensor, rounds: int) -> list[list[float]]:
    """Seconds of each model's passes; the models take turns, in alternating order."""
    found: list[list[float]] = [[] for _ in models]
    order = list(range(len(models)))
    for number in range(rounds + 2):
        for i in order if number % 2 else order[::-1]:
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                models[i]._maps(images, [last])[last].sum().item()
            if number >= 2:  # warm
                found[i].append(time.perf_counter() - start)
    return found


@torch.inference_mode()
def similarities(models: list[nn.Module], images: Tensor, batch_size: int = 16) -> list[dict[str, float]]:
    """Mean cosine similarity of each model's maps to the first one's, by map."""
    sums = [dict.fromkeys(SHOWN, 0.0) for _ in models]
    for batch in images.split(batch_size):
        first = models[0]._maps(batch, SHOWN)
        for model, total in zip(models, sums):
            for name, x in model._maps(batch, SHOWN).items():
                total[name] += F.cosine_similarity(x.float(), first[name].float(), dim=1).mean((1, 2)).sum().item()
    return [{name: total / len(images) for name, total in each.items()} for each in sums]


@guard("it writes no files; a new run starts from the beginning")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    if options.work_only:
        with torch.device("meta"):
            models = [build(name, False) for name in options.models]
            models[0].unet.check_maps([options.map])
            size = options.size or models[0].pretrained_cfg["input_size"][-1]
            counts = [work(model, options.map, torch.zeros(1, 3, size, size)) for model in models]
        print(f"{size} px, down to {options.map}\n\n| model | GFLOP | of them its encoder |\n| --- | ---: | ---: |")
        for name, (total, encoder) in zip(options.models, counts):
            print(f"| {name} | {total:.4g} | {encoder:.4g} |")
        return 0
    device = resolve_device(options.device)
    models = [build(name, True).to(device, memory_format=torch.channels_last) for name in options.models]
    models[0].unet.check_maps([options.map])
    size = options.size or models[0].pretrained_cfg["input_size"][-1]
    pictures = list_training_sources(options.data)
    chosen = pictures[:: max(1, len(pictures) // options.limit)][: options.limit]
    images, kept = plain_images(chosen, DecodeOptions(size, background="random"))
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    alike = similarities(models, images)
    part = images[: options.batch_size]
    counts = [work(model, options.map, part) for model in models]
    spent = times(models, options.map, part, options.rounds)
    base = statistics.median(spent[0])
    print(
        f"{size} px, {len(kept)} pictures, work and time down to {options.map} with a batch of {len(part)}; "
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
        f"| model | GFLOP | of them its encoder | time | spread | {' | '.join(SHOWN)} |\n"
        f"| --- | ---: | ---: | ---: | ---: |{' ---: |' * len(SHOWN)}"
    )
    for name, (total, encoder), seconds, found in zip(options.models, counts, spent, alike):
        low, median, high = (f(seconds) / base for f in (min, statistics.median, max))
        cells = " | ".join(f"{found[key]:.3f}" for key in SHOWN)
        print(f"| {name} | {total:.3g} | {encoder:.3g} | {median:.2f} | {low:.2f} to {high:.2f} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
