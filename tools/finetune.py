#!/usr/bin/env python
"""Distils a clean student (CleanDIFT) from a noisy teacher, by a recipe.

    python tools/finetune.py configs/finetune/cleandift_tiny.yaml data.path=emoji/train output_dir=runs/tiny
    python tools/finetune.py configs/finetune/cleandift_sd21.yaml data.path=web output_dir=runs/sd21 cache_dir=cache
    accelerate launch --num_processes 4 tools/finetune.py configs/finetune/cleandift_sd21.yaml ...

Every field of the recipe can be overridden as field=value; `--fields` lists them with their values. The run saves
checkpoints and goes on from the newest whole one when started again; Ctrl-C and SIGTERM save first. It ends with a
native folder, output_dir/native, which timm.create_model("local-dir:OUTPUT_DIR/native", pretrained=True) loads.
"""

from __future__ import annotations

import argparse
import sys

import torch

from cleandift_backbones.distill.recipe import load_recipe, read_yaml
from cleandift_backbones.hub import check_push


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see configs/finetune/")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. data.path=DIR max_steps=400")
    parser.add_argument("--fields", action="store_true", help="print all fields of the recipe and stop")
    parser.add_argument("--resume", choices=("auto", "never"), help="the same as resume=...")
    parser.add_argument("--push-to-hub", metavar="USER/REPO", help="publish the result there")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.fields:
            from omegaconf import OmegaConf

            from cleandift_backbones.distill.recipe import Recipe

            print(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(Recipe), read_yaml(options.recipe))))
            return 0
        recipe = load_recipe(options.recipe, options.overrides)
        recipe.push_to_hub = options.push_to_hub or recipe.push_to_hub
        recipe.resume = options.resume or recipe.resume
        if recipe.push_to_hub:
            check_push(recipe.push_to_hub)
        from cleandift_backbones.distill.train import distill

        return distill(recipe)
    except torch.OutOfMemoryError as error:
        remedy = "set gradient_checkpointing=true, or in a new output_dir a lower batch_size or lora.rank=64"
        parser.exit(2, f"{parser.prog}: error: {error}\n{remedy}; the last checkpoint stands\n")
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
