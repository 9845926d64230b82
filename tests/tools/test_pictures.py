"""tools/tiny/make_pictures.py on a folder of made-up packages, and the evaluation data and samples that ship."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "tiny"))
pytest.importorskip("resvg_py", reason="pip install 'cleandift_backbones[pictures]'")
import emoji_concepts  # noqa: E402
import make_pictures  # noqa: E402

SAMPLES = ROOT / "cleandift_backbones" / "assets" / "samples"
CIRCLE = '<circle cx="8" cy="8" r="6" fill="#fc0"/>'
HALF = '<path d="M0 0h8v16H0z" fill="currentColor"/>'  # the left half
ICONS = {"grinning-face": CIRCLE, "man-cook": CIRCLE, "flag-japan": CIRCLE, "hugging-face": HALF}
CHARS = {"1f600": "grinning-face", "1f468-200d-1f373": "man-cook", "1f1ef-1f1f5": "flag-japan", "1f917": "hugging-face"}
NAMES = [  # hexcode, label, group, subgroup
    ("1F600", "grinning face", 0, 0),
    ("1F917", "smiling face with open hands", 0, 0),
    ("1F468-200D-1F373", "man cook", 1, 1),
    ("2764-FE0F", "red heart", 0, 0),
    ("2660-FE0F", "spade suit", 0, 0),
    ("1F1EF-1F1F5", "flag: Japan", 9, 2),
    ("2757", "red exclamation mark", 8, 2),
]


def write(path: Path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture
def packages(tmp_path):
    """A node_modules with the pinned versions, four icons a set, and a WebP with white under its transparency."""
    base = tmp_path / "npm" / "node_modules"
    for name, (version, _) in make_pictures.PACKAGES.items():
        write(base / name / "package.json", {"version": version})
    for package in list(make_pictures.STYLES.values())[:4]:
        icons = {name: {"body": body} for name, body in ICONS.items()}
        write(base / package / "icons.json", {"prefix": "x", "icons": icons, "width": 16, "height": 16})
        write(base / package / "chars.json", {} if package.endswith("-v1") else CHARS)
    pixels = np.full((40, 32, 4), 255, np.uint8)
    pixels[..., 3] = 0
    pixels[8:32, 4:28] = (200, 0, 0, 255)
    assets = base / make_pictures.STYLES["fluent3d"] / "assets"
    assets.mkdir()
    Image.fromarray(pixels).save(assets / "2764-fe0f.webp", lossless=True, exact=True)
    Image.fromarray(pixels).save(assets / "1f1ef-1f1f5.webp", lossless=True)
    keys = ("hexcode", "label", "group", "subgroup")
    data = [dict(zip(keys, row, strict=True)) for row in NAMES]
    write(base / make_pictures.NAMES_PACKAGE / "en" / "data.json", [*data, {"hexcode": "1F1E6", "label": "regional A"}])
    groups = {"0": "smileys-emotion", "1": "people-body", "8": "symbols", "9": "flags"}
    subgroups = {"0": "face-smiling", "1": "person-role", "2": "other"}
    write(base / make_pictures.NAMES_PACKAGE / "meta" / "groups.json", {"groups": groups, "subgroups": subgroups})
    return base.parent


def main(arguments: list[str]) -> int:
    try:
        return make_pictures.main(arguments)
    except SystemExit as stop:
        return stop.code


def make(out: Path, packages: Path, *more: str) -> int:
    return main(["--out", str(out), "--packages", str(packages), "--workers", "1", "--size", "64", *more])


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_folder(packages, tmp_path, capsys):
    out = tmp_path / "out"
    assert make(out, packages) == 0
    side = make_pictures.read_split()
    drawn = {(style, key) for style in ("noto", "notov1", "twemoji", "fluentflat") for key in ("1F600", "1F917")}
    drawn |= {(style, "1F468-200D-1F373") for style in ("noto", "notov1", "twemoji", "fluentflat")}
    drawn.add(("fluent3d", "2764"))  # not the flag, not the spade
    pictures = {f"{side[key]}/{style}/{key}.png" for style, key in drawn}
    assert files(out) == pictures | {"train/metadata.jsonl", "heldout/metadata.jsonl"}
    assert f"{len(drawn)} pictures" in capsys.readouterr().out
    listed = set()
    for name in ("train", "heldout"):
        for line in (out / name / "metadata.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert set(entry) == {"file_name", "text", "style", "concept", "subgroup", "family"}
            assert entry["file_name"] == f"{entry['style']}/{entry['concept']}.png"
            listed.add(f"{name}/{entry['file_name']}")
    assert listed == pictures


def test_edges_and_shapes(packages, tmp_path):
    make(tmp_path / "out", packages)
    (heart,) = (tmp_path / "out").glob("*/fluent3d/2764.png")
    pixels = np.asarray(Image.open(heart)).astype(int)
    assert pixels.shape == (64, 64, 4)
    seen = pixels[pixels[..., 3] > 8]
    assert np.abs(seen[:, :3] - (200, 0, 0)).max() <= 8  # neither the white below nor black comes into the edges
    rows, columns = np.nonzero(pixels[..., 3] > 128)
    assert (rows.min() + rows.max(), columns.min() + columns.max()) == (63, 63)  # 32 x 40 was centred on a square
    assert len(rows) == pytest.approx((24 * 64 / 40) ** 2, rel=0.05)
    (face,) = (tmp_path / "out").glob("*/noto/1F600.png")
    pixels = np.asarray(Image.open(face)).astype(int)
    edge = pixels[(pixels[..., 3] > 32) & (pixels[..., 3] < 224)]
    assert len(edge) and np.abs(edge[:, :3] - (255, 204, 0)).max() <= 8


def test_resume_and_overwrite(packages, tmp_path, capsys):
    out = tmp_path / "out"
    make(out, packages)
    (kept,) = out.glob("*/noto/1F600.png")
    (gone,) = out.glob("*/twemoji/1F600.png")
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(kept)
    gone.unlink()
    assert make(out, packages) == 0
    assert gone.exists() and Image.open(kept).getpixel((0, 0)) == (1, 2, 3, 255)
    assert make(out, packages, "--overwrite") == 0
    assert Image.open(kept).getpixel((0, 0))[3] == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    assert main(["--out", str(out), "--packages", str(packages), "--size", "32"]) == 2
    assert "64x64, wanted RGBA 32x32: add --overwrite" in capsys.readouterr().err
    Image.new("RGBA", (64, 64)).save(out / "train" / "noto" / "1F98A.png")
    assert make(out, packages) == 2
    assert "1F98A.png" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in before} == before


def test_packages_are_checked(packages, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    path = packages / "node_modules" / "@iconify-json" / "noto" / "package.json"
    write(path, {"version": "0.1.0"})
    assert make(out, packages) == 2
    assert "is version 0.1.0: run `npm install @iconify-json/noto@1.2.9`" in capsys.readouterr().err
    path.unlink()
    assert make(out, packages) == 2
    assert "does not exist: run `npm install @iconify-json/noto@1.2.9`" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["--out", str(out)]) == 2
    assert "npm was not found" in capsys.readouterr().err
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\necho 'getaddrinfo ENOTFOUND' >&2\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:/bin:/usr/bin")
    assert main(["--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "ENOTFOUND" in error and "--packages" in error
    assert not out.exists()


def test_icons_with_aliases_and_boxes():
    icons = {"icons": {"left": {"body": HALF}, "wide": {"body": HALF, "left": 4, "width": 8, "height": 16}}}
    icons |= {"width": 16, "height": 16, "aliases": {"right": {"parent": "left", "hFlip": True}}}
    icons["aliases"] |= {"below": {"parent": "left", "rotate": 3}, "same": {"parent": "right", "hFlip": True}}

    def alpha(name: str) -> np.ndarray:
        return np.asarray(make_pictures.render_svg(make_pictures.icon_svg(icons, name), 16))[..., 3] > 128

    left = alpha("left")
    assert left[:, :8].all() and not left[:, 8:].any()
    assert (alpha("right") == left[:, ::-1]).all() and (alpha("same") == left).all()
    assert alpha("below")[8:].all() and not alpha("below")[:8].any()  # a turn by 270 degrees
    assert (alpha("wide") == left).all()  # the square box around x = 4..12 is 0..16
    with pytest.raises(make_pictures.PictureError, match="'none' is not in the set"):
        make_pictures.icon_svg(icons, "none")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F468-200D-1F373", "1F9D1-200D-1F373"),  # gender
        ("1F46E-200D-2640", "1F46E"),
        ("1F469-200D-1F9B0", "1F468"),  # hair
        ("1F6B6-200D-2642-200D-27A1", "1F6B6"),  # direction
        ("1F468-200D-1F469-200D-1F466", "1F46A"),  # families and couples
        ("1F469-200D-2764-200D-1F468", "1F491"),
        ("1F44B-1F3FD", "1F44B"),  # skin
        ("1F55B", "1F566"),  # clock faces
        ("1F49B", "2764"),
    ],
)
def test_family(one, other):
    assert emoji_concepts.family(one) == emoji_concepts.family(other)


def test_different_things_are_different_families():
    keys = ["1F600", "1F98A", "1F431", "1F9D1", "1F9D1-200D-1F373", "1F46A", "1F550", "2764", "1F468-200D-1F680"]
    assert len({emoji_concepts.family(key) for key in keys}) == len(keys)


def test_make_split_depends_on_nothing_but_the_concepts():
    keys = [f"1F4{i:02X}" for i in range(100)] + ["1F468-200D-1F373", "1F469-200D-1F373"]
    concepts = {key: {"text": key, "subgroup": f"s{int(key[:5], 16) % 3}"} for key in keys}
    styles = {key: {"noto", "twemoji"} for key in keys}
    split = emoji_concepts.make_split(concepts, styles, {"1F468-200D-1F373"})
    again = emoji_concepts.make_split(concepts, dict(reversed(styles.items())), {"1F468-200D-1F373"})
    assert split == again
    assert {"1F468-200D-1F373", "1F469-200D-1F373"} <= set(split["heldout"])  # marked families go first
    assert sorted(split["heldout"] + split["train"]) == sorted(keys)
    single = emoji_concepts.make_split(concepts, {key: {"noto"} for key in keys}, set())
    assert single["heldout"] == []  # nothing to compare across styles


def test_shipped_split():
    split = json.loads(emoji_concepts.SPLIT_FILE.read_text())
    heldout, train = set(split["heldout"]), set(split["train"])
    assert 280 <= len(heldout) <= 320 and len(train) > 1000 and not heldout & train
    families = {side: {emoji_concepts.family(key) for key in split[side]} for side in ("heldout", "train")}
    assert not families["heldout"] & families["train"]
    for key in heldout | train:
        assert key == emoji_concepts.to_key(key)


def test_shipped_eyes():
    eyes = json.loads(emoji_concepts.EYES_FILE.read_text())["eyes"]
    side = emoji_concepts.read_split()
    for key, styles in eyes.items():
        assert len(styles) > 1 and set(styles) <= set(make_pictures.STYLES), key
        for style, ((x1, y1), (x2, y2)) in styles.items():
            assert 0 < x1 < x2 < 1 and 0 < y1 < 1 and 0 < y2 < 1, (key, style)
            assert abs(y1 - y2) < 1.5 * (x2 - x1), (key, style)
    assert 0.4 < sum(side[key] == "heldout" for key in eyes) / len(eyes) < 0.6


def test_shipped_samples():
    pairs = json.loads((SAMPLES / "pairs.json").read_text())["pairs"]
    named = {pair[which] for pair in pairs for which in "ab"}
    assert named == {path.name for path in SAMPLES.iterdir()} - {"pairs.json"}
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 600_000
    for pair in pairs:
        assert 3 <= len(pair["points"]) == len(pair["names"]) <= 5
        assert all(0 < x < 1 and 0 < y < 1 for x, y in pair["points"])
    for path in SAMPLES.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (256, 256) and image.mode == "RGBA"
        assert path.stem.rsplit("_", 1)[1] in make_pictures.STYLES
    assert len(list(SAMPLES.glob("*.png"))) == 12
