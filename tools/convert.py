#!/usr/bin/env python
"""Turns a folder in diffusers' layout into a native checkpoint, one safetensors file.

    python tools/convert.py runs/teacher --model dift_tiny --out dift_tiny.safetensors

The file holds the UNet as deep as the finest map, the VAE's encoder, the empty prompt's embedding and the timestep.
Configs that differ from the model's (widths, schedule, the latents' scaling factor) are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch

import cleandift_backbones  # noqa: F401
from cleandift_backbones import checkpoints
from cleandift_backbones.models import ARCHITECTURES, load_weights
from cleandift_backbones.prompts import PromptEncoder


def check_configs(folder: Path, cfg: dict) -> None:
    """Raises ValueError where a config of the folder differs from the architecture's."""
    for part, name in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        found = json.loads((folder / part / name).read_text())
        for key, value in cfg[part].items():
            if key in found and json.dumps(found[key]) != json.dumps(value):
                raise ValueError(f"{folder / part / name}: {key} is {found[key]}, the model has {value}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with unet/, vae/, scheduler/, text_encoder/, tokenizer/")
    names = [f"{kind}_{arch}" for kind in ("cleandift", "dift") for arch in ARCHITECTURES if arch != "test"]
    parser.add_argument("--model", required=True, choices=names, help="what the folder holds")
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    options = parser.parse_args(arguments)
    try:
        cfg = ARCHITECTURES[options.model.split("_")[1]]
        weights = checkpoints.open_diffusers(options.source)
        check_configs(options.source, cfg)
        with torch.device("meta"):
            model = timm.create_model(options.model, final_map="us10")
        given = {"prompt_embeds": PromptEncoder(options.source)(""), "timestep": torch.tensor(261.0)}
        load_weights(model, weights, given)
        state = model.state_dict()
        checkpoints.save_native(state, options.out, {"model": options.model}, getattr(torch, options.dtype))
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    count = sum(t.numel() for t in state.values())
    print(f"wrote {options.out}: {count / 1e6:.2f} M numbers, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
