#!/usr/bin/env python
"""Measures this package on your machine, beside what one would use without it. All ratios are within one run.

    python tools/benchmark.py inference                cleandift_sd21 down to us6, 512 x 512, random weights
    python tools/benchmark.py inference --model cleandift_tiny --size 128 256 --batch-size 1 8 --out speed
    python tools/benchmark.py inference --ways whole optimized --threads 1 --clock cpu
    python tools/benchmark.py loading                  a random cleandift_sd21 in 16 bit (1.8 GB, in a temporary folder)
    python tools/benchmark.py loading --file my.safetensors --model cleandift_sd15 --repeat 5
    python tools/benchmark.py training                 a step of the distillation: cleandift_tiny at 128 px, batch 8
    python tools/benchmark.py training --model cleandift_sd21 --size 128 --batch-size 1
    python tools/benchmark.py matching                 keypoints of 12,234 pairs, the size of SPair-71k's test split

`inference` runs one map of the same weights and images in several ways, in turn, on the GPU if there is one:
  whole          diffusers' whole UNet in float32 with a hook, and the VAE (what the public CleanDIFT code computes)
  whole-compile  the same UNet under torch.compile
  dift           DIFT as published: the image encoded once per noise, eight noises, the UNet up to the map's block
  timm           this package, as timm.create_model gives it
  optimized      the same after cleandift_backbones.optimize
  direct         the same without Winograd's algorithm
  light          optimized, with the light latent encoder (latent_encoder="tiny")
  bf16, fp16, light-bf16        optimized in 16 bit
  compile, compile-bf16         optimized and compiled, one graph for all sizes
  graphs-bf16                   optimized and compiled, with CUDA graphs
It tells latency, images/s, peak memory, bytes of weights, GFLOP (torch's counter, on what really runs), GFLOP/s and
their share of a matrix product's speed at that moment, and how far the map is from the first way's. With --clock cpu a
busy machine does no harm: seconds are those that one thread of the processor worked (give --threads 1 too). Several
sizes are measured at the first batch size, further batch sizes at the first size. On a CPU all ways keep freed memory
for the next pass, as tools/extract.py does; with --return-memory none does, as torch does otherwise.

`loading` compares, each in a process of its own, cold (the file is dropped from the page cache) and warm:
  safetensors   safetensors.torch.load_file, then every page of every tensor read
  this package  timm.create_model(MODEL, pretrained=True, dtype="auto"), then the same
  float32       the same with the default dtype
  plain         random float32 weights built, load_state_dict of the whole file, .half()
Loading time is without imports. Memory is what the process holds more than after them, mapped file pages included.

`training` compares forward and backward of one batch, random weights, in turn, on the GPU if there is one:
  plain         the public recipe: the student runs once per noise level
  this package  one student pass per image serves all noise levels; also with gradient checkpointing, LoRA, bf16 (GPU)
All take cached latents; "encoding pictures" is the cost without a cache. Loss (between -1 and 1, absolutely) and
gradients (relatively) are compared with plain's; activations are the tensors that autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from cleandift_backbones.utils.guard import guard, importing

with importing(__name__):
    from cleandift_backbones.data.images import check_folder
    from cleandift_backbones.models.architectures import model_of, spec_of
    from cleandift_backbones.utils.atomic import write_text
    from cleandift_backbones.utils.errors import needs, resource_errors

    sys.path.insert(0, str(Path(__file__).parent))  # for those who run this file by its path

    from benchmarks import inference, loading, matching, training


def check_inference(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Finds what `inference` cannot measure, and leaves out what is given twice."""
    arch = spec_of(options.model).arch
    plain, least = model_of(arch, "clean"), arch.defaults.min_side
    if plain != options.model:
        parser.error(f"--model {options.model}: give {plain}; --ways dift is the noisy baseline, --map takes its maps")
    if min(options.size) < least:
        parser.error(f"--size {min(options.size)}: the models take pictures of {least} pixels or more")
    for name in ("size", "batch_size", "ways"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name) or [])))


@guard("nothing was written; a new run starts from the beginning")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("inference", "loading", "training", "matching"), help="what to measure")
    parser.add_argument("--model", help="timm model name (default: cleandift_sd21; training: cleandift_tiny)")
    parser.add_argument("--file", help="loading: native file of the model (default: a random one)")
    parser.add_argument("--temporary", help="loading: folder for the random file")
    parser.add_argument("--map", default="us6", help="inference: the map to compute (default: us6)")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=inference.WAYS,
        help="inference: (default: all on a GPU, else what a CPU does well)",
    )
    parser.add_argument("--threads", type=int, help="inference, matching: CPU threads (default: torch's)")
    parser.add_argument("--pairs", type=int, default=matching.PAIRS, help="matching: (default: %(default)s)")
    parser.add_argument(
        "--return-memory", action="store_true", help="inference: freed memory goes back to the kernel after each pass"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="inference: (default: wall)")
    parser.add_argument("--size", type=int, nargs="+", help="sides of the images in pixels (512; training: one, 128)")
    parser.add_argument("--batch-size", type=int, nargs="+", help="images a pass (1), or a step (training: one, 8)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--out", type=Path, help="folder for WHAT.md and WHAT.json, and inference.png")
    options = parser.parse_args(arguments)
    options.model = options.model or ("cleandift_tiny" if options.what == "training" else "cleandift_sd21")
    options.size = options.size or [128 if options.what == "training" else 512]
    options.batch_size = options.batch_size or [8 if options.what == "training" else 1]
    if min(*options.size, *options.batch_size, options.repeat, options.pairs) < 1:
        parser.error("--size, --batch-size, --repeat and --pairs must be at least 1")
    if options.what == "training":
        if len(options.size) + len(options.batch_size) > 2:
            parser.error("training takes one --size and one --batch-size")
        options.size, options.batch_size = options.size[0], options.batch_size[0]
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread's work: give --threads 1 with it")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.out:
        check_folder(options.out)
        if options.what == "inference":
            with needs("eval"):
                import matplotlib  # noqa: F401
    if options.what != "matching":
        spec_of(options.model)
    if options.file and not os.path.isfile(options.file):
        parser.error(f"--file {options.file}: no such file")
    if options.what == "inference":
        check_inference(parser, options)
    room = dict(inference=inference, loading=loading, training=training, matching=matching)[options.what]
    with resource_errors("lower --size or --batch-size"):
        found = getattr(room, options.what)(options)
    text = getattr(room, f"{options.what}_table")(found, options)
    print("\n" + text)
    if options.out:
        write_text(options.out / f"{options.what}.md", text)
        write_text(options.out / f"{options.what}.json", json.dumps(found, indent=1) + "\n")
        if options.what == "inference":
            inference.plot(found, options.out / "inference.png")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["loading-once"]:
        print(json.dumps(loading.load_once(*sys.argv[2:])))
    else:
        sys.exit(main())
