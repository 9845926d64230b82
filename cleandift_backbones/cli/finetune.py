"""`cleandift finetune`: a clean student (CleanDIFT) is distilled from a noisy teacher, by a config."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .. import configs
from ..utils.guard import guard, importing
from .arguments import command_parser, option

ABOUT = """
Every field of the config can be set as field=value; --fields lists them with their values. The options --data, --out
and so on are the same as in other commands, and each sets the field that its help names. The run saves checkpoints and
goes on from the newest whole one when started again; Ctrl-C and SIGTERM save first. It ends with a native folder,
OUT/native, which timm.create_model("local-dir:OUT/native", pretrained=True) loads.

On several GPUs: accelerate launch --num_processes 4 -m cleandift_backbones.cli.finetune CONFIG ...
"""
EXAMPLES = [
    ("cleandift_tiny --data emoji/train --out runs/tiny", "the small model, by a packaged config"),
    ("cleandift_sd21 --data web --out runs/sd21 cache_dir=cache", "Stable Diffusion 2.1, latents computed once"),
    ("cleandift_sd21_lora --fields", "all fields of a config, with values and meaning"),
    ("mine.yaml data.path=web output_dir=runs/mine max_steps=400", "by a file of yours"),
]
#: option -> field of the config
FIELDS = {
    "data": "data.path",
    "out": "output_dir",
    "model": "model",
    "map": "maps",
    "timesteps": "timestep",
    "weights": "student_weights",
    "device": "device",
    "dtype": "mixed_precision",
}
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # of `mixed_precision`


@guard("checkpoints written so far are kept, and the same command continues")
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains. See `utils.guard.guard` for exit codes."""
    line = parser()
    options, unknown = line.parse_known_intermixed_args(arguments)
    with importing(message="loading PyTorch and diffusers ..." if os.environ.get("RANK", "0") == "0" else ""):
        from ..distill.recipe import describe_fields, field_names, load_recipe
        from ..distill.train import distill
        from ..publish.push import check_push
        from ..utils.errors import InputError
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        if (name := name.replace("-", "_")) not in field_names():
            line.error(f"unrecognized arguments: {' '.join(unknown)}")
        given = [*(sys.argv if arguments is None else arguments), "VALUE"]
        value = value or given[given.index(unknown[0]) + 1]
        raise InputError(f"{unknown[0]}: fields of the recipe are given without dashes, {name}={value}")
    if options.fields:
        print(describe_fields(options.recipe))
        return 0
    recipe = load_recipe(options.recipe, [*_fields(options), *options.overrides])
    recipe.push_to_hub = options.push_to_hub or recipe.push_to_hub
    recipe.resume = options.resume or recipe.resume
    if recipe.push_to_hub:
        check_push(recipe.push_to_hub)
    return distill(recipe)


def _fields(options: argparse.Namespace) -> list[str]:
    """The options that other commands have too, as field=value."""
    given = {name: getattr(options, name) for name in FIELDS}
    given["dtype"] = PRECISIONS.get(given["dtype"])
    for name in ("data", "out", "weights"):  # quoted: values of fields are YAML, in which paths may mean something else
        given[name] = given[name] and json.dumps(given[name], ensure_ascii=False)
    return [f"{FIELDS[name]}={value}" for name, value in given.items() if value is not None]


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("finetune", EXAMPLES, ABOUT)
    packaged = ", ".join(name.removeprefix("finetune/") for name in configs.names("finetune"))
    result.add_argument("recipe", metavar="CONFIG", help=f"a YAML file, or the name of a packaged one: {packaged}")
    result.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. max_steps=400 batch_size=4")
    option(result, "--data", "a folder or .tar shards with captions (data.path)")
    option(result, "--out", "the folder of the run (output_dir)")
    option(result, "--model", "the student (model)")
    option(result, "--map", "those that are trained, with commas (maps)", nargs=None, help="maps")
    option(result, "--timesteps", "one, that of the student at the start (timestep)")
    option(result, "--weights", "of the student at the start (student_weights)")
    option(result, "--device", "(device)", default=None)
    option(result, "--dtype", "in passes; they are kept in float32 (mixed_precision)", choices=list(PRECISIONS))
    result.add_argument("--fields", action="store_true", help="print all fields of the config, what they are, and stop")
    result.add_argument("--resume", choices=("auto", "never"), help="the same as resume=...")
    result.add_argument("--push-to-hub", metavar="USER/REPO", help="publish the result there")
    return result


if __name__ == "__main__":
    sys.exit(main())
