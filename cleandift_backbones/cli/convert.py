"""`cleandift convert`: weights of any form become a native folder, a UNet folder of diffusers, or an LDM file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..utils.guard import guard, importing
from .arguments import command_parser, option

ABOUT = """
To a native folder (timm), a UNet folder (diffusers), or a single file with LDM's keys. SOURCE is a file, a folder,
OWNER/NAME[@REVISION][/PATH] on the Hub, or the name of a published model. What it lacks (VAE, timestep, empty prompt)
comes from where it is published, or from --vae, --timesteps and --text-encoder. The native folder holds
model.safetensors (in shards over 5 GB) with the whole UNet, the VAE's encoder, the empty prompt's embedding and the
timestep; config.json; README.md. Then: timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True).
"""
EXAMPLES = [
    ("cleandift_sd21 --out sd21", "the published parts, fetched and put together"),
    ("cleandift_sd21_full.safetensors --out sd21", "a file of CompVis (student; --unet teacher)"),
    ("me/my-sd@v2 --model dift_sd15 --out my_sd", "a diffusers folder, here or on the Hub"),
    ("v1-5-pruned.safetensors --out sd15", "a single file of SD 1.x or 2.x (LDM's keys)"),
    ("sd21 --to diffusers --out sd21_unet", "back to diffusers' UNet2DConditionModel"),
    ("sd21 --to ldm --out sd21_ldm.safetensors", "to a single file with LDM's keys"),
]


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+ *[KMGT]B", text, re.I):
        raise argparse.ArgumentTypeError(f"{text!r}: give a size such as 5GB or 500MB")
    return text


def _number(text: str | None) -> float | None:
    """A timestep given as a number; None for none, and for a source."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("convert", EXAMPLES, ABOUT)
    result.add_argument("source", help="file, folder, OWNER/NAME[@REVISION][/PATH], or a model's name")
    option(result, "--out", "a folder, or a .safetensors file", required=True, type=Path)
    option(
        result, "--model", "what the weights are; `cleandift models` lists the names (default: found by their shapes)"
    )
    result.add_argument("--to", choices=("native", "diffusers", "ldm"), default="native", help="format to write")
    result.add_argument("--unet", choices=("student", "teacher"), default="student", help="of a full file of CompVis")
    result.add_argument("--vae", help="source of the VAE, where SOURCE has none")
    result.add_argument(
        "--latent-encoder",
        choices=("default", "tiny"),
        help="tiny: TAESD's form instead of the VAE's encoder (default: the one in SOURCE)",
    )
    result.add_argument("--text-encoder", help="source with text_encoder/ and tokenizer/, for the empty prompt")
    option(result, "--timesteps", "one, or a full file of CompVis that holds it")
    result.add_argument("--fill", help="with --to diffusers or ldm: source of what SOURCE lacks")
    option(
        result, "--dtype", "auto: as SOURCE's UNet", choices=("auto", "float16", "bfloat16", "float32"), default="auto"
    )
    result.add_argument("--cut", action="store_true", help="leave out what runs after the finest map (1 %% of SD)")
    result.add_argument("--no-heads", action="store_true", help="leave out the projection heads of a trained student")
    result.add_argument("--max-shard-size", type=_size, default="5GB", help="of a file in a folder")
    result.add_argument("--overwrite", action="store_true", help="replace what stands at --out")
    return result


@guard("nothing was written: the files are renamed into place at the end")
def main(arguments: Sequence[str] | None = None) -> int:
    """Converts. See `utils.guard.guard` for exit codes."""
    line = parser()
    options = line.parse_args(arguments)
    unused = {
        "native": ("fill",),
        "diffusers": ("vae", "latent_encoder", "text_encoder", "timesteps", "cut", "no_heads"),
        "ldm": ("latent_encoder", "text_encoder", "timesteps", "cut", "no_heads"),
    }[options.to]
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name)]
    if given:
        line.error(f"{', '.join(given)} has no meaning with --to {options.to}")
    with importing():
        import torch

        from ..publish.convert import LDM_PARTS, to_diffusers, to_ldm, to_native
        from ..utils.atomic import readable_size
        from ..utils.errors import InputError
        from ..utils.locks import hold
    number = _number(options.timesteps)
    parts = {
        "vae": options.vae,
        "text_encoder": options.text_encoder,
        "timestep": options.timesteps if number is None else None,
    }
    common = dict(
        model=options.model,
        teacher=options.unet == "teacher",
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
    )
    with hold(options.out.absolute().parent, options.out.name):
        if options.out.exists() and not options.overwrite:
            raise InputError(f"{options.out} exists: choose another --out, or give --overwrite")
        if options.to == "diffusers":
            name, weights = to_diffusers(options.source, options.out, fill=options.fill, **common)
        elif options.to == "ldm":
            name, weights = to_ldm(options.source, options.out, vae=options.vae, fill=options.fill, **common)
        else:
            name, weights = to_native(
                options.source,
                options.out,
                parts={part: source for part, source in parts.items() if source is not None},
                timestep=number,
                cut=options.cut,
                max_shard_size=options.max_shard_size,
                latent_encoder=options.latent_encoder,
                heads=not options.no_heads,
                **common,
            )
    files = sorted(options.out.glob("*.safetensors")) if options.out.is_dir() else [options.out]
    print(f"found {weights.form} with {weights.describe()}, of {name}")
    for file in files:
        print(f"wrote {file}: {readable_size(file.stat().st_size)}")
    if options.to == "ldm":
        parts = zip(("VAE decoder", "text encoder"), (LDM_PARTS[0], LDM_PARTS[-1]))
        lacking = [what for what, part in parts if not weights.has(part)]
        if lacking:
            print(
                f"without {' and '.join(lacking)}: --fill FILE, a single file with LDM's keys, adds what SOURCE lacks"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
