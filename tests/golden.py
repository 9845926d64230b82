#!/usr/bin/env python
"""Records what a refactoring must not change, and compares. A check for developers: it needs one machine for both.

    python tests/golden.py record BEFORE.json --emoji data/emoji     some ten minutes and 8 GB of memory on one thread
    python tests/golden.py compare BEFORE.json --emoji data/emoji    exit code 1 if something differs
    python tests/golden.py compare BEFORE.json --only models help    some of the parts

FILE lies outside of the repository. Numbers are compared to the last digit and weights and maps by their SHA-256, so
processor, torch, diffusers and the number of threads must be the same: `compare` reports it if they are not. The code
of the package is reached through timm, hubconf.py, tools/ and documented import paths alone, so that it may move.

Parts:
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ALL = tuple(range(11))
STEPS = 20
CONCEPTS = 12


# --- means ---


def sha256(tensor) -> str:
    """Of a tensor's dtype, shape and bytes."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data if data.ndim else data.numpy().tobytes())
    return digest.hexdigest()


def generator(*parts: object):
    import torch

    seed = int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)
    return torch.Generator().manual_seed(seed)


def images(height: int, width: int, batch: int = 1):
    """Smooth images B x 3 x H x W in [-1, 1]."""
    import torch

    coarse = torch.rand(batch, 3, 5, 5, generator=generator("images", height, width))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True) * 2 - 1


def run(*words: object) -> str:
    """Output of a Python process on one thread; stops with what it wrote on stderr if it fails."""
    command = [sys.executable, *map(str, words)]
    found = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {found.returncode}:\n{found.stdout}\n{found.stderr}")
    return found.stdout


def models() -> list[str]:
    """Every name that the package registers with timm, those for tests included."""
    import timm
    from timm.models import _registry

    import cleandift_backbones  # noqa: F401

    names = sorted(_registry._model_entrypoints)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith("cleandift_backbones")]


def build(name: str, **kwargs):
    """A model on the meta device."""
    import timm
    import torch

    import cleandift_backbones  # noqa: F401

    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def random_state(name: str, **kwargs) -> dict:
    """Seeded weights for every key of a model; each depends on its key and shape alone."""
    import torch

    state = {}
    for key, empty in build(name, **kwargs).state_dict().items():
        if key == "timestep":
            state[key] = torch.tensor(261.0)
            continue
        one = torch.randn(empty.shape, generator=generator(key))
        if one.ndim > 1 and key.endswith("weight"):
            one /= (one[0].numel()) ** 0.5
        elif one.ndim == 1:
            one = one / 10 + key.endswith("weight")
        state[key] = one
    return state


def hashes(name: str, x, optimized: bool = False, **kwargs) -> dict[str, str]:
    """SHA-256 of every map of a pretrained model."""
    import timm
    import torch

    import cleandift_backbones

    model = timm.create_model(name, pretrained=True, features_only=True, **kwargs).eval()
    if optimized:
        model = cleandift_backbones.optimize(model)
    with torch.no_grad():
        maps = model(x)
    if not all(one.isfinite().all() for one in maps):
        raise SystemExit(f"{name}: maps are not finite, and their hashes tell nothing")
    return dict(zip([info["name"] for info in model.feature_info.get_dicts()], map(sha256, maps), strict=True))


# --- parts ---


def part_models(args: argparse.Namespace, recorded: object) -> dict:
    """names, default_cfgs, feature_info, hubconf entrypoints, keys and shapes of state dicts"""
    import timm

    sys.path.insert(0, str(ROOT))
    hubconf = importlib.import_module("hubconf")
    entrypoints = {n: f for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    found = {"hubconf": {n: str(inspect.signature(f)) for n, f in sorted(entrypoints.items())}}
    found["dependencies"] = hubconf.dependencies
    found["listed"] = [name for name in models() if name in timm.list_models()]
    for name in models():
        tags = timm.list_pretrained(f"{name}.*") or [name]
        told = found[name] = {tag: timm.get_pretrained_cfg(tag).to_dict() for tag in tags}
        variants = dict(default={}, features=dict(features_only=True), classifier=dict(num_classes=7))
        variants |= dict(tiny_encoder=dict(latent_encoder="tiny"))
        if "pyramid" not in name:
            variants |= dict(whole=dict(final_map="us10"), us6=dict(features_only=True, out_indices=("us6",)))
        if name.startswith("cleandift") and "pyramid" not in name:
            variants |= dict(heads=dict(final_map="us10", projected_timestep=100))
        for variant, kwargs in variants.items():
            model = build(name, **kwargs)
            told[f"{variant}: state"] = {key: list(t.shape) for key, t in model.state_dict().items()}
            told[f"{variant}: parameters"] = sum(p.numel() for p in model.parameters())
            info = model.feature_info
            told[f"{variant}: maps"] = info.get_dicts() if hasattr(info, "get_dicts") else list(info)
    return found


def part_help(args: argparse.Namespace, recorded: object) -> dict:
    """--help of every script of tools/, of the tasks and suites of evaluation, and the fields of a recipe"""
    calls = [[f"tools/{path.name}", "--help"] for path in sorted((ROOT / "tools").glob("*.py"))]
    tasks = ("correspondence", "knn", "retrieval", "segmentation", "depth", "noise")
    calls += [["tools/evaluate.py", task, "--help"] for task in tasks]
    calls += [["tools/evaluate.py", "--suite", suite, "--help"] for suite in ("emoji", "photos")]
    calls += [["tools/finetune.py", "configs/finetune/cleandift_tiny.yaml", "--fields"]]
    return {" ".join(call): run(*call).splitlines() for call in calls}


def part_imports(args: argparse.Namespace, recorded: dict | None) -> dict:
    """import paths in README.md and docs/; `compare` tries those that were recorded"""
    if recorded is None:
        public = ("CleanDIFT", "DIFT", "FeatureUNet", "optimize", "registry.MODELS", "registry.HOOKS", "mm.CleanDIFT")
        paths = {f"cleandift_backbones.{name}" for name in public}
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
            text = page.read_text()
            for module, names in re.findall(r"^\s*from (cleandift_backbones[\w.]*) import ([\w, ]+)", text, re.M):
                paths |= {f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
            paths |= set(re.findall(r"\bcleandift_backbones(?:\.[A-Za-z_]\w*)+", text))
        recorded = dict.fromkeys(sorted(paths))
    code = (
        "import json, pkgutil, sys\nfound = {}\n"
        "for path in json.load(sys.stdin):\n"
        "    try:\n        found[path] = 'found' if pkgutil.resolve_name(path) is not None else 'None'\n"
        "    except Exception as error:\n        found[path] = type(error).__name__\n"
        "print(json.dumps(found))"
    )
    given = json.dumps(list(recorded))
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=ENVIRONMENT, input=given, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(out.stdout.splitlines()[-1])


def part_flops(args: argparse.Namespace, recorded: object) -> dict:
    """FLOPs of a 512 px image down to each map, by torch's counter, attention included"""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *_, **__):
        return sdpa_flop_count(query, key, value)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    found: dict[str, dict] = {}
    for name in models():
        chosen = [{}] if "pyramid" in name else [dict(out_indices=(index,)) for index in ALL]
        for kwargs in chosen:
            model = build(name, features_only=True, **kwargs).eval()
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
                model(torch.empty(1, 3, 512, 512, device="meta"))
            found.setdefault(name, {})[",".join(info["name"] for info in model.feature_info.get_dicts())] = (
                counter.get_total_flops()
            )
    return found


def part_maps(args: argparse.Namespace, recorded: object) -> dict:
    """SHA-256 of all maps: sd15 and sd21 at full size with random weights, the tiny models with the included ones"""
    x = images(128, 128)
    found = {}
    for name in ("cleandift_sd15", "cleandift_sd21"):
        state = random_state(name, final_map="us10")
        overlay = dict(state_dict=state)
        found[name] = hashes(name, x, out_indices=ALL, pretrained_cfg_overlay=overlay)
        if name == "cleandift_sd15":
            noisy = dict(ensemble_size=1, noise_seed=3, timestep=100)
            found["dift_sd15"] = hashes("dift_sd15", x, out_indices=ALL, pretrained_cfg_overlay=overlay, **noisy)
        del state, overlay
    x = images(131, 90, 2)
    for name in ("cleandift_tiny", "dift_tiny"):
        found[name] = hashes(name, x, out_indices=ALL)
        found[f"{name}, optimised"] = hashes(name, x, True, out_indices=ALL)
        found[f"{name}, light encoder"] = hashes(name, x, out_indices=ALL, latent_encoder="tiny")
    found["cleandift_tiny, prompt"] = hashes("cleandift_tiny", x, out_indices=ALL, prompt="a red apple")
    found["cleandift_tiny_pyramid"] = hashes("cleandift_tiny_pyramid", x)
    return found


def drawings(folder: Path) -> None:
    """Sixteen captioned images of 150 px: discs of seeded colours on transparency."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:150, :150] / 150 - 0.5
    for number in range(16):
        rgba = np.zeros((150, 150, 4), np.uint8)
        rgba[..., :3] = rng.integers(0, 256, 3)
        rgba[np.hypot(x - 0.1, y) < 0.15, :3] = rng.integers(0, 256, 3)
        rgba[..., 3] = 255 * (np.hypot(x, y) < rng.uniform(0.3, 0.5))
        Image.fromarray(rgba).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"red disc {number}")


def part_finetune(args: argparse.Namespace, recorded: object) -> dict:
    """losses and SHA-256 of the weights after 20 steps of the recipe of cleandift_tiny.emoji on one thread"""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work, "data"), Path(work, "run")
        data.mkdir()
        drawings(data)
        run(
            "tools/finetune.py", "configs/finetune/cleandift_tiny.yaml", f"data.path={data}", f"output_dir={out}",
            f"max_steps={STEPS}", "batch_size=4", "num_workers=0", "device=cpu", "mixed_precision=no",
            "save_dtype=float32", "tensorboard=false", "sample_every=0", "validate_every=10", "log_every=1",
            "warmup_steps=5",
        )  # fmt: skip
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        noted = ("step", "loss", "validation", "timestep", "lr")
        log = [{key: line[key] for key in noted if key in line} for line in lines]
        state = load_file(out / "native/model.safetensors")
        each = {name: sha256(tensor) for name, tensor in sorted(state.items())}
        total = hashlib.sha256(json.dumps(each).encode()).hexdigest()
        config = json.loads((out / "native/config.json").read_text())
    return dict(log=log, weights=total, tensors=each, config=config)


def part_emoji(args: argparse.Namespace, recorded: object) -> dict | None:
    """rows of the emoji table: dift_tiny at t=100 with one noise, its clean twin, cleandift_tiny (needs --emoji)"""
    if args.emoji is None:
        return None
    with tempfile.TemporaryDirectory() as work:
        run(
            "tools/evaluate.py", "--suite", "emoji", "--data", args.emoji.resolve(), "--out", work, "--device", "cpu",
            "--threads", "1", "--models", "pixels", "dift_tiny", "cleandift_tiny", "--timesteps", "100", "--ensemble",
            "1", "--limit-concepts", CONCEPTS,
        )  # fmt: skip
        result = json.loads(Path(work, "results.json").read_text())
    # A random network depends on the order in which layers are initialised, which may change.
    runs = [one for one in result["runs"] if "random" not in one["label"]]
    return {one["label"]: one["maps"] for one in runs}


PARTS = {name.removeprefix("part_"): found for name, found in list(globals().items()) if name.startswith("part_")}


# --- record and compare ---


def machine() -> dict:
    """What the numbers depend on besides the code."""
    import torch

    cpu = (
        re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    )
    packages = ("torch", "timm", "diffusers", "transformers", "numpy", "pillow")
    facts = {name: version(name) for name in packages}
    return facts | dict(cpu=cpu[1] if cpu else platform.processor(), capability=torch.backends.cpu.get_cpu_capability())


def plain(value: object) -> object:
    """As JSON gives it back, with paths of the checkout relative to it."""
    text = json.dumps(value, default=str)
    return json.loads(text.replace(json.dumps(str(ROOT) + os.sep)[1:-1], ""))


def differences(old: object, new: object, path: str = "") -> Iterator[str]:
    """A line for every place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            where = f"{path} / {key}" if path else str(key)
            if key not in new:
                yield f"{where}: is missing"
            elif key not in old:
                yield f"{where}: is new"
            else:
                yield from differences(old[key], new[key], where)
        if list(old) != list(new) and set(old) == set(new):
            yield f"{path}: another order"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new)):
            yield from differences(*pair, f"{path} [{number}]")
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(one, str) for one in [*old, *new]):
        changed = [line for line in difflib.unified_diff(old, new, "was", "is", n=0) if line[:1] in "+-"]
        yield "\n    ".join([f"{path}:", *changed[2:]])
    elif old != new:
        yield f"{path}: was {str(old)[:200]}, is {str(new)[:200]}"


def main() -> int:
    about = __doc__ + "\n".join(f"  {name:10} {part.__doc__}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON file outside of the repository")
    parser.add_argument(
        "--emoji", type=Path, help="folder made by tools/tiny/make_pictures.py; without it no emoji rows"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--lines", type=int, default=20, help="differences to show of each part (default: 20)")
    args = parser.parse_args()
    if args.file.resolve().is_relative_to(ROOT):
        parser.error(f"{args.file} lies in the repository; give a file outside of it")
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    old = json.loads(args.file.read_text()) if args.file.is_file() else {}
    if args.action == "compare":
        if not old:
            parser.error(f"{args.file} does not exist; make it with: record {args.file}")
        for line in differences(old["machine"], plain(machine())):
            print(f"machine: {line}; numbers may differ without a change of the code")
    new, differ = {**old, "machine": plain(machine())}, False
    for name in args.only:
        print(f"{name} ...", flush=True)
        found = plain(PARTS[name](args, old.get(name) if args.action == "compare" else None))
        if found is None:
            print(f"{name}: left out, it needs --emoji")
        elif args.action == "record":
            new[name] = found
            args.file.write_text(json.dumps(new, indent=1) + "\n")
        elif name not in old:
            print(f"{name}: not in {args.file}")
            differ = True
        else:
            lines = list(differences(old[name], found))
            differ = differ or bool(lines)
            print(*[f"{name}: {line}" for line in lines[: args.lines]], sep="\n", end="\n" * bool(lines))
            print(f"{name}: {f'{len(lines)} differences' if lines else 'equal'}")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
