"""The command line of the extraction: `tools/extract.py --model NAME --data PATH --out FOLDER`."""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import fields

from cleandift_command import guard

from ..features.config import POOLS, RESIZES, ExtractConfig
from ..features.engines.local import ExtractReport
from ..features.extraction import extract
from ..features.extractor import load_extractor
from ..features.formats import DTYPES, FORMATS
from ..features.options import load_model
from ..utils.errors import resource_errors

ABOUT = """Features of many pictures, once, into a folder of shards.

  python tools/extract.py --model cleandift_sd21 --map us6 --data photos --out features
  python tools/extract.py --model cleandift_sd21 --map mid --pool mean --data 'shards/{0000..0099}.tar' --out vectors
  torchrun --nproc-per-node 8 tools/extract.py --model cleandift_sd21 --dtype bfloat16 --data list.txt --out features

Started again, the same command goes on where it stopped, with any number of processes. docs/extract.md tells more."""


# What `load` gives the model itself.
_OWN = {*inspect.signature(load_model).parameters, *inspect.signature(load_extractor).parameters}
_OWN |= {"features_only", "out_indices"}


def _model_arg(text: str) -> tuple[str, object]:
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    if key in _OWN:
        raise argparse.ArgumentTypeError(f"{text!r}: that is for options of this command, see --help")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I in 0..N-1, such as 0/4")
    return int(match[1]), int(match[2])


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(prog=prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = result.add_argument_group("what to compute")
    what.add_argument("--model", required=True, metavar="NAME", help="any timm model; random:NAME has random weights")
    what.add_argument("--data", required=True, metavar="PATH", help="a folder, .tar shards (pattern), or a list")
    what.add_argument("--out", required=True, metavar="FOLDER", help="where the features go")
    what.add_argument(
        "--map", nargs="+", metavar="MAP", help="maps by name or index, with spaces or commas; us6, or else the last"
    )
    what.add_argument("--pool", choices=POOLS, default="none", help="mean: a vector per picture and map")
    what.add_argument("--prompt", metavar="TEXT", help="for models that take text; none: the empty one")
    what.add_argument("--timestep", type=int, metavar="T", help="of dift_* models, 0..999")
    what.add_argument("--ensemble", type=int, metavar="N", help="noises averaged by dift_* models")
    what.add_argument("--weights", metavar="FILE", help="safetensors instead of the model's published ones")
    what.add_argument(
        "--model-arg", nargs="+", type=_model_arg, action="extend", default=[], metavar="KEY=VALUE",
        help="for timm.create_model",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    what.add_argument("--seed", type=int, default=0, help="of random weights")
    sizes = result.add_argument_group("sizes")
    sizes.add_argument("--size", type=int, metavar="N", help="side of the model's input; default the model's own")
    sizes.add_argument("--resize", choices=RESIZES, default="squash", help="how pictures become squares (squash)")
    sizes.add_argument("--keep-size", action="store_true", help="pictures as they come, batched by size")
    sizes.add_argument("--multiple", type=int, default=1, metavar="N", help="with --keep-size: round sides to it")
    sizes.add_argument("--max-side", type=int, metavar="N", help="with --keep-size: shrink longer sides to N")
    output = result.add_argument_group("output")
    output.add_argument("--format", choices=list(FORMATS), default="safetensors", help="of the shards (safetensors)")
    output.add_argument("--store-dtype", choices=list(DTYPES), default="float16", help="of the features (float16)")
    output.add_argument("--shard-size", type=int, default=256, metavar="MB", help="of a shard (256)")
    output.add_argument("--shard-items", type=int, default=50_000, metavar="N", help="pictures per shard (50000)")
    output.add_argument("--shard-names", action="store_true", help="keys of .tar shards: SHARD/KEY instead of KEY")
    output.add_argument("--strict", action="store_true", help="stop at a picture that cannot be read")
    machine = result.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures per pass (8)")
    machine.add_argument("--dtype", choices=list(DTYPES), default="float32", help="to compute in (float32)")
    machine.add_argument(
        "--no-optimize", dest="optimize", action="store_false",
        help="leave out what makes this package's models faster with the same maps to rounding; docs/performance.md",
    )  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="also torch.compile: minutes at first, then faster")
    machine.add_argument("--device", default="auto", help="cpu, cuda, ... or auto")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that read pictures; 0: a thread does")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads of the model")
    machine.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="this machine takes part I of N")
    return result


def config_of(args: argparse.Namespace) -> ExtractConfig:
    """The options as settings of `features.extract`."""
    given = vars(args) | dict(maps=tuple(args.map or ()), model_args=dict(args.model_arg))
    return ExtractConfig(**{field.name: given[field.name] for field in fields(ExtractConfig) if field.name in given})


@guard("what was computed is stored, the same command goes on")
def main(arguments: Sequence[str] | None = None) -> ExtractReport | None:
    """Extracts. See `cleandift_command.guard` for exit codes."""
    args = parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    config = config_of(args)
    with resource_errors("lower --batch-size, --workers or --shard-size, or give --max-side"):
        report = extract(args.data, args.out, config, note=print)
    print(*report.lines, sep="\n")
    return report
