#!/usr/bin/env python3
"""Make the emoji picture folder that the small models are trained and measured on.

Five picture sets under licences that allow it (see NOTICE) are taken from their npm packages, at pinned versions, and
every emoji is rendered as a square RGBA PNG with a transparent background:

    OUT/train/STYLE/KEY.png    OUT/train/metadata.jsonl
    OUT/heldout/STYLE/KEY.png  OUT/heldout/metadata.jsonl

KEY is the emoji's code points in upper-case hexadecimal, joined by hyphens, without FE0F. Each line of metadata.jsonl
is a picture: file_name, text (the emoji's English name), style, concept (= KEY), subgroup (Unicode's), family (the key
that near-duplicates share). Flags, symbols and skin tones are left out. The split is by family of concepts and is read
from cleandift_backbones/evaluation/emoji_split.json. A stopped run goes on where it was; metadata.jsonl comes last.

    python tools/tiny/make_pictures.py --out data/emoji
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from multiprocessing import resource_tracker
from pathlib import Path

from cleandift_backbones.utils.guard import blocked, guard, importing

with importing(__name__):
    import numpy as np
    from PIL import Image

    from cleandift_backbones.data.decoding import opened
    from cleandift_backbones.utils.atomic import replacing, write_text
    from cleandift_backbones.utils.errors import file_errors, needs
    from cleandift_backbones.utils.locks import hold
    from cleandift_backbones.utils.progress import tqdm

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that it also loads from elsewhere, as in the tests
    from emoji_concepts import (
        EYES_FILE,
        OLD_NAMES,
        SPLIT_FILE,
        PictureError,
        family,
        make_split,
        read_concepts,
        read_json,
        read_split,
        slug,
        to_key,
        write_json,
    )

# package -> (version, members that are needed; the rest of the archive is not unpacked)
PACKAGES = {
    "@iconify-json/noto": ("1.2.9", r"package/(package|icons|chars)\.json"),
    "@iconify-json/noto-v1": ("1.2.5", r"package/(package|icons|chars)\.json"),
    "@iconify-json/twemoji": ("1.2.5", r"package/(package|icons|chars)\.json"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", r"package/(package|icons|chars)\.json"),
    "@lobehub/fluent-emoji-3d": ("1.1.0", r"package/(package\.json|assets/[^/]+\.webp)"),
    "emojibase-data": ("17.0.0", r"package/(package\.json|en/data\.json|meta/groups\.json)"),
}
NAMES_PACKAGE = "emojibase-data"  # Unicode's names, groups and subgroups; emoji-datasource-google has the same in 74 MB
STYLES = {
    "noto": "@iconify-json/noto",
    "notov1": "@iconify-json/noto-v1",
    "twemoji": "@iconify-json/twemoji",
    "fluentflat": "@iconify-json/fluent-emoji-flat",
    "fluent3d": "@lobehub/fluent-emoji-3d",
}


# ---------------------------------------------------------------------------------------------------------- packages


def fetch_packages(names: list[str], cache: Path) -> dict[str, Path]:
    """Fetch pinned packages with `npm pack` into the folder `cache` and unpack what is needed; package -> folder."""
    folders = {}
    for name in tqdm(names, desc="packages", unit="package"):
        version, members = PACKAGES[name]
        folder = cache / f"{name.replace('@', '').replace('/', '-')}-{version}"
        folders[name] = folder
        if folder.is_dir():
            continue
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            remedy = "or unpack the packages elsewhere and pass --packages FOLDER_WITH_node_modules"
            if (npm := shutil.which("npm")) is None:
                raise PictureError(f"npm was not found: install Node.js with npm to fetch {name}@{version}, {remedy}")
            command = [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", temporary]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            except subprocess.TimeoutExpired:
                raise PictureError(f"`npm pack {name}@{version}` hangs; check the network, {remedy}") from None
            except subprocess.CalledProcessError as error:
                tail = (error.stderr or error.stdout or "no output").strip()[-500:]
                raise PictureError(f"`npm pack {name}@{version}`: {tail}; check the network, {remedy}") from None
            (archive,) = Path(temporary).glob("*.tgz")
            unpacked = Path(temporary) / "unpacked"
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar.getmembers() if m.isfile() and re.fullmatch(members, m.name)]
                tar.extractall(unpacked, members=wanted, filter="data")
            os.replace(unpacked / "package", folder)
    return folders


def find_packages(names: list[str], root: Path) -> dict[str, Path]:
    """Find the pinned packages under root/node_modules or root; package -> folder."""
    base = root / "node_modules" if (root / "node_modules").is_dir() else root
    folders = {}
    for name in names:
        version = PACKAGES[name][0]
        try:
            found = json.loads((base / name / "package.json").read_text(encoding="utf-8"))["version"]
        except FileNotFoundError:
            raise PictureError(f"{base / name} does not exist: run `npm install {name}@{version}` in {root}") from None
        if found != version:
            raise PictureError(f"{base / name} is version {found}: run `npm install {name}@{version}` in {root}")
        folders[name] = base / name
    return folders


# ---------------------------------------------------------------------------------------------------------- rendering


def icon_svg(icons: dict, name: str) -> str:
    """An iconify icon (or alias) as a standalone SVG; boxes, flips and quarter turns of icon and alias are honoured.

    `currentColor` is black, as in a browser.
    """
    box = {side: icons.get(side, default) for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))}
    chain = [name]
    while chain[-1] not in icons["icons"]:
        alias = icons.get("aliases", {}).get(chain[-1])
        if alias is None or len(chain) > 8:
            raise PictureError(f"icon {name!r} is not in the set {icons.get('prefix')!r}: fetch the package again")
        chain.append(alias["parent"])
    h_flip = v_flip = False
    turns = 0
    for link in reversed(chain):  # the icon first, then the aliases that change it
        entry = icons["icons"].get(link) or icons["aliases"][link]
        box.update({side: entry[side] for side in box if side in entry})
        h_flip, v_flip = h_flip != entry.get("hFlip", False), v_flip != entry.get("vFlip", False)
        turns = (turns + entry.get("rotate", 0)) % 4
    left, top, width, height = box["left"], box["top"], box["width"], box["height"]
    middle = f"{left + width / 2} {top + height / 2}"
    moves = f"translate({middle}) rotate({90 * turns}) scale({-1 if h_flip else 1} {-1 if v_flip else 1})"
    body = icons["icons"][chain[-1]]["body"].replace("currentColor", "#000")
    if h_flip or v_flip or turns:
        body = f'<g transform="{moves} translate({-left - width / 2} {-top - height / 2})">{body}</g>'
    side = max(width, height)  # a square box around the icon's own, whatever its shape
    view = f"{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{view}" width="{side}" height="{side}">{body}</svg>'


def render_svg(svg: str, size: int) -> Image.Image:
    """SVG text -> RGBA picture, size x size, straight alpha."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def resize_rgba(image: Image.Image, size: int) -> Image.Image:
    """LANCZOS on premultiplied colours, so that what lies under full transparency does not bleed into the edges."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(4)]
    small = np.stack([plane.resize((size, size), Image.Resampling.LANCZOS) for plane in planes], axis=-1)
    alpha = small[..., 3:]  # divided by as it is, overshoot included: clipping comes last
    colour = np.where(alpha > 1 / 512, small[..., :3] / np.maximum(alpha, 1 / 512), 0)
    return Image.fromarray((np.clip(np.concatenate([colour, alpha], -1), 0, 1) * 255 + 0.5).astype(np.uint8))


def render(source: tuple[str, str], size: int) -> Image.Image:
    """("svg", text) or ("file", path of a picture) -> RGBA picture, size x size."""
    kind, value = source
    if kind == "svg":
        return render_svg(value, size)
    with opened(value) as image:
        side = max(image.size)  # a few are a little taller than wide: centred on a transparent square
        square = Image.new("RGBA", (side, side))
        square.paste(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
        return resize_rgba(square, size)


def _render_job(job: tuple[tuple[str, str], str, int]) -> None:
    source, target, size = job
    with replacing(target) as aside:
        render(source, size).save(aside, format="PNG", optimize=True)


def find_sources(style: str, folder: Path, concepts: dict, name_to_key: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Key -> source of every kept emoji that the style draws; `name_to_key` serves a set without a chars.json."""
    if style == "fluent3d":
        found = {to_key(path.stem): ("file", str(path)) for path in sorted((folder / "assets").glob("*.webp"))}
        return {key: found[key] for key in concepts if key in found}
    icons, chars = read_json(folder / "icons.json"), read_json(folder / "chars.json")
    names = {}
    for code_points, name in chars.items():
        names.setdefault(to_key(code_points), name)
    if not chars:
        for name, alias in {**dict.fromkeys(icons["icons"]), **icons.get("aliases", {})}.items():
            if name in name_to_key and (alias is None or alias["parent"] not in name_to_key):  # one key per drawing
                names.setdefault(name_to_key[name], name)
    return {key: ("svg", icon_svg(icons, names[key])) for key in concepts if key in names}


def read_names(concepts: dict, folders: dict[str, Path]) -> dict[str, str]:
    """Icon name -> key: Unicode's names, then the names (and aliases) of the sets that have a table of code points."""
    names = {slug(concept["text"]): key for key, concept in concepts.items()} | OLD_NAMES
    for style in ("noto", "twemoji"):
        if style not in folders:
            continue
        icons, chars = read_json(folders[style] / "icons.json"), read_json(folders[style] / "chars.json")
        for code_points, name in chars.items():
            if to_key(code_points) in concepts:
                names.setdefault(name, to_key(code_points))
        for alias, entry in icons.get("aliases", {}).items():
            if entry["parent"] in names:
                names.setdefault(alias, names[entry["parent"]])
    return names


# -------------------------------------------------------------------------------------------------------------- main


def is_own_metadata(path: Path) -> bool:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError:
        return False
    return all(isinstance(line, dict) and {"style", "concept", "family"} <= line.keys() for line in lines)


def check_folder(out: Path, wanted: set[Path], size: int, overwrite: bool) -> set[Path]:
    """What of `wanted` is already there; an error for pictures that do not belong there or have another size."""
    there = set(out.glob("*/*/*.png"))
    if foreign := sorted(there - wanted):
        raise PictureError(
            f"{out} holds {len(foreign)} pictures that this command would not make, first {foreign[0]}: remove them or "
            "choose an empty folder"
        )
    for path in sorted(out.glob("*/metadata.jsonl")):
        if not is_own_metadata(path):
            raise PictureError(f"{path} was not written by this command: move it away, or choose an empty folder")
    if overwrite:
        return set()
    for path in sorted(there):
        with opened(path, load=False) as image:
            if image.size != (size, size) or image.mode != "RGBA":
                what = f"{path} is {image.mode} {image.width}x{image.height}"
                raise PictureError(f"{what}, wanted RGBA {size}x{size}: add --overwrite")
    return there


def make_pictures(
    out: Path,
    folders: dict[str, Path],
    styles: list[str],
    size: int,
    workers: int = 1,
    overwrite: bool = False,
    split: dict[str, str] | None = None,
) -> Counter:
    """Render the folder; without `split` (key -> side) the shipped one is read. Returns the counts of (side, style)."""
    concepts, sources = collect(folders, styles)
    split = read_split() if split is None else split
    left_out = sorted({key for found in sources.values() for key in found} - set(split))
    if left_out:
        print(f"not in the split, left out: {len(left_out)} concepts ({', '.join(left_out[:5])} ...); see --make-split")
    jobs, lines = {}, defaultdict(list)
    for style in styles:
        for key, source in sources[style].items():
            if key not in split:
                continue
            path = out / split[key] / style / f"{key}.png"
            jobs[path] = (source, str(path), size)
            line = {"file_name": f"{style}/{key}.png", "text": concepts[key]["text"], "style": style, "concept": key}
            lines[split[key]].append(line | {"subgroup": concepts[key]["subgroup"], "family": family(key)})
    there = check_folder(out, set(jobs), size, overwrite)
    for folder in {path.parent for path in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    todo = [job for path, job in jobs.items() if path not in there]
    resource_tracker.ensure_running()  # its start unblocks SIGINT again, so it must not happen inside `blocked`
    with blocked(signal.SIGINT):
        pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else _Serial()
    with pool:
        for _ in tqdm(pool.imap_unordered(_render_job, todo, 16), total=len(todo), desc="pictures", unit="picture"):
            pass
    for side, entries in lines.items():  # last: a folder with metadata is complete
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write_text(out / side / "metadata.jsonl", text)
    return Counter((side, entry["style"]) for side, entries in lines.items() for entry in entries)


class _Serial:
    """A pool of one, in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    @staticmethod
    def imap_unordered(function, jobs, _chunk):
        return map(function, jobs)


def collect(folders: dict[str, Path], styles: list[str]) -> tuple[dict, dict]:
    """(key -> name and subgroup, style -> key -> source) of all kept emoji."""
    concepts = read_concepts(folders[NAMES_PACKAGE])
    by_style = {style: folders[package] for style, package in STYLES.items() if package in folders}
    names = read_names(concepts, by_style)
    return concepts, {style: find_sources(style, by_style[style], concepts, names) for style in styles}


@guard("the images written so far are kept; the same command continues")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to make or to complete (existing pictures are kept)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: 128)")
    parser.add_argument(
        "--packages", type=Path, metavar="FOLDER", help="folder with node_modules (default: npm fetches)"
    )
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="picture sets (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="render pictures that exist, too")
    parser.add_argument("--make-split", action="store_true", help=f"rewrite {SPLIT_FILE.name} from all styles first")
    args = parser.parse_args(arguments)
    if args.out is None and not args.make_split:
        parser.error("--out DIR is needed (or --make-split)")
    if not 16 <= args.size <= 1024:
        parser.error(f"--size {args.size} is outside 16..1024 pixels")
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    with needs("pictures"):
        import resvg_py  # noqa: F401
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleandift_backbones" / "npm"
    names = list(PACKAGES)
    if args.packages:
        folders = find_packages(names, args.packages)
    else:
        with hold(cache, wait=math.inf, log=print), file_errors(cache):
            folders = fetch_packages(names, cache)
    if args.make_split:
        concepts, sources = collect(folders, list(STYLES))
        styles_of = defaultdict(set)
        for style, found in sources.items():
            for key in found:
                styles_of[key].add(style)
        eyes = read_json(EYES_FILE)
        split = make_split(concepts, styles_of, {*eyes["eyes"], *eyes.get("dropped", [])})
        write_json(SPLIT_FILE, split)
        print(f"{SPLIT_FILE.name}: {len(split['train'])} concepts for training, {len(split['heldout'])} held out")
    if args.out is not None:
        with hold(args.out), file_errors(args.out):
            counts = make_pictures(args.out, folders, args.styles, args.size, args.workers, args.overwrite)
        for (side, style), count in sorted(counts.items()):
            print(f"{side:8} {style:10} {count:5}")
        print(f"{sum(counts.values())} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
