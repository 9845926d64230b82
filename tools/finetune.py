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
import os
import sys

from cleandift_command import guard, importing


@guard("checkpoints written so far are kept, and the same command continues")
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, unknown = parser.parse_known_intermixed_args(arguments)
    with importing(__name__, "loading PyTorch and diffusers ..." if os.environ.get("RANK", "0") == "0" else ""):
        from cleandift_backbones.distill.recipe import describe_fields, field_names, load_recipe
        from cleandift_backbones.distill.train import distill
        from cleandift_backbones.publish.push import check_push
        from cleandift_backbones.utils.errors import InputError
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        if (name := name.replace("-", "_")) not in field_names():
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        given = [*(sys.argv if arguments is None else arguments), "VALUE"]
        value = value or given[given.index(unknown[0]) + 1]
        raise InputError(f"{unknown[0]}: fields of the recipe are given without dashes, {name}={value}")
    if options.fields:
        print(describe_fields(options.recipe))
        return 0
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.push_to_hub = options.push_to_hub or recipe.push_to_hub
    recipe.resume = options.resume or recipe.resume
    if recipe.push_to_hub:
        check_push(recipe.push_to_hub)
    return distill(recipe)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see configs/finetune/")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. data.path=DIR max_steps=400")
    parser.add_argument("--fields", action="store_true", help="print all fields of the recipe, what they are, and stop")
    parser.add_argument("--resume", choices=("auto", "never"), help="the same as resume=...")
    parser.add_argument("--push-to-hub", metavar="USER/REPO", help="publish the result there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
