"""`cleandift extract --model NAME --data PATH --out FOLDER`."""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

import torch

from ..data.images import check_folder
from ..data.listing import left_out_report
from ..data.loading import Resize
from ..data.sources import Entry, SourceError, list_entries
from ..features.engines.local import Report, run
from ..features.extractor import Extractor, ModelError, list_maps, load_extractor, resolve_device
from ..features.formats import DTYPES, FORMATS
from ..features.options import check_noise, check_ranges, load_model, model_arguments, pick_maps
from ..features.store import FAILURES, Store, check_out, list_shards
from ..optimization.cpu_malloc import keep_freed_memory
from ..utils.atomic import is_file, readable_size
from ..utils.errors import InputError, MissingFileError, needs, resource_errors
from ..utils.guard import command_line, guard
from ..utils.locks import hold
from ..utils.progress import tqdm
from ..version import __version__
from .arguments import command_parser, option

ABOUT = "Started again, the same command goes on where it stopped, with any number of processes."
EXAMPLES = [
    ("--model cleandift_sd21 --map us6 --data photos --out features", "the maps of a folder's images"),
    ("--model cleandift_sd21 --map mid --pool mean --data 'shards/{0000..0099}.tar' --out vectors", "a vector each"),
    ("--model dift_sd21 --timesteps 100 --data list.txt --out noisy", "the noisy baseline's, of a list of files"),
]


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


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("extract", EXAMPLES, ABOUT)
    what = result.add_argument_group("what to compute")
    option(what, "--model", "random:NAME has random weights", required=True)
    option(what, "--data", "a folder, .tar shards (pattern), or a list", required=True)
    option(what, "--out", "a folder for the features", required=True)
    option(what, "--map", "us6, or else the last by default")
    what.add_argument("--pool", choices=["none", "mean"], default="none", help="mean: a vector per picture and map")
    what.add_argument("--prompt", metavar="TEXT", help="for models that take text; none: the empty one")
    option(what, "--timesteps", "one, for dift_* models", type=int, dest="timestep")
    what.add_argument("--ensemble", type=int, metavar="N", help="noises averaged by dift_* models")
    option(what, "--weights")
    what.add_argument(
        "--model-arg", nargs="+", type=_model_arg, action="extend", default=[], metavar="KEY=VALUE",
        help="for timm.create_model",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    what.add_argument("--seed", type=int, default=0, help="of random weights")
    sizes = result.add_argument_group("sizes")
    sizes.add_argument("--size", type=int, metavar="N", help="side of the model's input; default the model's own")
    sizes.add_argument(
        "--resize", choices=["squash", "pad", "crop"], default="squash", help="how pictures become squares"
    )
    sizes.add_argument("--keep-size", action="store_true", help="pictures as they come, batched by size")
    sizes.add_argument("--multiple", type=int, default=1, metavar="N", help="with --keep-size: round sides to it")
    sizes.add_argument("--max-side", type=int, metavar="N", help="with --keep-size: shrink longer sides to N")
    output = result.add_argument_group("output")
    output.add_argument("--format", choices=list(FORMATS), default="safetensors", help="of the shards")
    output.add_argument("--store-dtype", choices=list(DTYPES), default="float16", help="of the features")
    output.add_argument("--shard-size", type=int, default=256, metavar="MB", help="of a shard")
    output.add_argument("--shard-items", type=int, default=50_000, metavar="N", help="pictures per shard")
    output.add_argument("--shard-names", action="store_true", help="keys of .tar shards: SHARD/KEY instead of KEY")
    output.add_argument("--strict", action="store_true", help="stop at a picture that cannot be read")
    machine = result.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures per pass")
    option(machine, "--dtype", choices=list(DTYPES), default="float32")
    machine.add_argument(
        "--no-optimize", dest="optimize", action="store_false",
        help="leave out what makes this package's models faster with the same maps to rounding; docs/performance.md",
    )  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="also torch.compile: minutes at first, then faster")
    option(machine, "--device")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that read pictures; 0: a thread does")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads of the model")
    machine.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="this machine takes part I of N")
    return result


@guard("what was computed is stored, the same command goes on")
def main(arguments: Sequence[str] | None = None) -> Report | None:
    """Extracts. See `utils.guard.guard` for exit codes."""
    args = parser().parse_args(arguments)
    logging.getLogger("timm").setLevel(logging.ERROR)
    if args.optimize:
        keep_freed_memory()  # of the whole process, which is this command's
    _check(args)
    with resource_errors("lower --batch-size, --workers or --shard-size, or give --max-side"):
        return extract_all(args)


def _check(args: argparse.Namespace) -> None:
    """Finds what is wrong with the options before any long work."""
    check_ranges(args, (
        ("batch_size", 1, None), ("workers", 0, None), ("threads", 1, None), ("limit", 1, None), ("size", 16, 4096),
        ("multiple", 1, 4096), ("max_side", 16, None), ("shard_size", 1, 1024), ("shard_items", 1, None),
        ("timestep", 0, 999), ("ensemble", 1, 1024), ("seed", 0, None),
    ))  # fmt: skip
    if args.keep_size and (args.size or args.resize != "squash"):
        raise InputError("--keep-size takes pictures as they come; leave out --size and --resize")
    if not args.keep_size and (args.multiple > 1 or args.max_side):
        raise InputError("--multiple and --max-side go with --keep-size")
    if args.max_side and args.max_side < args.multiple:
        raise InputError(f"--max-side {args.max_side} is less than --multiple {args.multiple}; give at least as much")
    if args.compile and not args.optimize:
        raise InputError("--compile goes on from what --no-optimize leaves out; give one of them")
    if args.format == "parquet":
        if args.store_dtype == "bfloat16":
            raise InputError("Parquet has no bfloat16; give --store-dtype float16 or float32, or --format safetensors")
        with needs("extract"):
            import pyarrow.parquet  # noqa: F401
    if args.weights and not is_file(args.weights):
        raise MissingFileError(f"--weights {args.weights}: no such file")
    check_noise([args.model], timestep=args.timestep, ensemble=args.ensemble)
    check_folder(args.out)
    check_out(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)


def place(args: argparse.Namespace) -> tuple[int, int, int]:
    """(rank, world, rank on this machine), by --part and by what torchrun and accelerate launch leave behind."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    part, parts = args.part
    # A part is shared by its own machine's processes: entries[part::parts][rank::world], whatever others have.
    return part + parts * rank, parts * world, int(os.environ.get("LOCAL_RANK", 0))


def load(args: argparse.Namespace, device: torch.device) -> tuple[Extractor, Resize]:
    """The model, and how pictures become its input."""
    name = args.model.removeprefix("random:")
    kwargs = dict(args.model_arg) | model_arguments(args.timestep, args.ensemble, args.weights)
    infos = list_maps(name, **kwargs)
    extractor = load_model(
        name, pick_maps(name, infos, args.map or [], infos[-1]["name"]), name == args.model, device, args.size,
        args.seed, DTYPES[args.dtype], args.keep_size, **kwargs,
    )  # fmt: skip
    extractor.name = args.model
    if not args.keep_size:
        return extractor, Resize(args.resize, extractor.size, mean=extractor.mean)
    if extractor.size:
        side = f"{extractor.size[1]}x{extractor.size[0]}"
        raise ModelError(f"{name} takes pictures of one size, {side}; leave out --keep-size")
    config = getattr(extractor.core, "pretrained_cfg", None) or {}
    least = (config.get("min_input_size") or (3, 1, 1))[-1]
    return extractor, Resize("keep", None, args.max_side, args.multiple, least, extractor.mean)


def extract_all(args: argparse.Namespace) -> Report:
    """The whole work of this process, logged on the way."""
    rank, world, _ = place(args)
    # Many processes may write into one folder, but not two that take the same images.
    images = json.dumps([os.path.abspath(args.data), args.limit, args.shard_names])
    share = f"{hashlib.sha256(images.encode()).hexdigest()[:8]}-{rank}-of-{world}"
    with hold(args.out, share):
        return _extract(args)


def _extract(args: argparse.Namespace) -> Report:
    rank, world, local = place(args)
    log = partial(tqdm.write, file=sys.stderr)
    device = resolve_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    left_out: Counter[str] = Counter()
    entries, told = list_entries(args.data, args.shard_names, left_out)
    entries = entries[: args.limit]
    extractor, resize = load(args, device)
    prompt = _prompt(args, extractor, entries)
    if args.compile and prompt is not None:
        raise InputError("--compile is for one prompt for all pictures: each number of prompts would be compiled anew")
    if args.optimize:
        extractor.optimize(prompt is None, args.compile)
    settings = dict(
        model=args.model, model_args={key: repr(value) for key, value in sorted(dict(args.model_arg).items())},
        timestep=args.timestep, ensemble=args.ensemble, prompt=args.prompt, maps=list(extractor.maps),
        weights=extractor.weights_digest()[:16], compute_dtype=args.dtype, optimize=extractor.optimized,
        resize=resize.mode, size=resize.size,
        max_side=args.max_side, multiple=args.multiple, pool=args.pool, store_dtype=args.store_dtype,
        format=args.format, mean=extractor.mean, std=extractor.std,
    )  # fmt: skip
    info = dict(
        command=command_line(), data=args.data, pictures=len(entries), device=_named(device),
        started=time.strftime("%Y-%m-%d %H:%M:%S"), channels=dict(zip(extractor.maps, extractor.channels)),
        versions=dict(
            cleandift_backbones=__version__, python=platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "diffusers", "pillow")},
        ),
    )  # fmt: skip
    store = Store(args.out, settings, info, args.shard_size * 10**6, args.shard_items, rank, log)
    done, damaged = store.done()
    for message in [*([*told, *filter(None, [left_out_report(left_out)])] if rank == 0 else []), *damaged]:
        log(message)
    if told and args.strict:
        raise SourceError(told[0])
    # By place in the list: the same whatever other processes do. What is there already is left out only then.
    mine = [entry for entry in entries[rank::world] if entry.key not in done]
    known = sum(entry.key in done for entry in entries[rank::world])
    if known and mine:
        print(f"{known:,} of {known + len(mine):,} images are in {args.out} already; computing the others")
    report = run(
        mine, extractor, resize, store, args.pool == "mean", args.store_dtype, args.batch_size,
        _workers(args, device), prompt, args.strict, local == 0 and bool(mine), log,
    )  # fmt: skip
    _finish(args, store, entries, report, f"process {rank} of {world}: " if world > 1 else "")
    return report


def _prompt(args: argparse.Namespace, extractor: Extractor, entries: list[Entry]) -> str | None:
    """Sets the one prompt of all pictures; or gives that of pictures without one, where others have their own."""
    if args.prompt == "none":
        return None
    if any(entry.prompt for entry in entries):
        extractor.set_prompts([args.prompt or ""])  # finds out early whether the model takes text
        return args.prompt or ""
    if args.prompt:
        extractor.set_prompts([args.prompt])
    return None


def _workers(args: argparse.Namespace, device: torch.device) -> int:
    if args.workers is not None:
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":  # the model wants the cores
        return 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _finish(args: argparse.Namespace, store: Store, entries: list[Entry], report: Report, who: str) -> None:
    done, failures = store.merge()
    failed = {failure["key"] for failure in failures}
    missing = sum(entry.key not in done and entry.key not in failed for entry in entries)
    if not missing:
        store.clean()
    if not done and not missing:
        raise SourceError(f"none of {len(entries)} images can be read, the first: {failures[0]['error']}")
    size = sum(path.stat().st_size for path in list_shards(store.folder, store.format)[0])
    total = f"{store.folder} holds the features of {len(done):,} images ({readable_size(size)})"
    if report.pictures or report.failed:
        print(f"{who}{report.pictures:,} images in {report.seconds:.1f} s, {report}")
        print(total)
    else:
        print(f"{who}nothing to do: {total}")
    if failed:
        print(f"{len(failed):,} images cannot be read: {store.folder / FAILURES} lists the reasons")
    if missing:
        print(f"{missing:,} are not there yet: other processes have them; if none runs, start this command again")


if __name__ == "__main__":
    main()
