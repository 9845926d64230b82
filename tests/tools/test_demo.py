"""The demo: what it draws, what it says, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cleandift_backbones.cli import demo as command
from cleandift_backbones.visualize import demo as drawing
from cleandift_backbones.visualize import figures
from cleandift_backbones.visualize.figures import Mark, Panel


def draw(path, size=(120, 90), seed=0):
    """Coloured blocks on grey."""
    pixels = np.full((size[1], size[0], 3), 225, np.uint8)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        pixels[y : y + 18, x : x + 18] = rng.integers(0, 255, 3)
    Image.fromarray(pixels).save(path)
    return str(path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tools/demo.py", "--device", "cpu", *map(str, arguments)])
    command.main()


def test_own_pictures(monkeypatch, tmp_path, capsys):
    paths = [draw(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    out = tmp_path / "new" / "figures"
    run(
        monkeypatch,
        "--model",
        "test_cleandift",
        "--random-weights",
        "--images",
        *paths,
        "--out",
        out,
        "--size",
        64,
    )
    names = sorted(path.name for path in out.iterdir())
    pairs = [f"{kind}_a_{other}.png" for kind in ("clean_vs_noisy", "matches", "pca") for other in "bc"]
    assert names == sorted(["overview.png", *pairs])
    printed = capsys.readouterr().out
    for name in names:
        assert str(out / name) in printed
        with Image.open(out / name) as image:
            assert image.mode == "RGB" and image.width > 400
    assert "points matched on us6" in printed and " s in all" in printed


def test_it_says_what_the_model_was_trained_on(monkeypatch, tmp_path, capsys):
    paths = [draw(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("ab")]
    run(monkeypatch, "--model", "cleandift_tiny", "--images", *paths, "--maps", "us6", "--out", tmp_path / "out")
    assert "cleandift_tiny is trained on emoji" in capsys.readouterr().out


def test_clean_against_noisy(monkeypatch, tmp_path):
    """A clean model with a noisy twin gets the comparison."""
    paths = [draw(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("ab")]
    run(
        monkeypatch, "--random-weights", "--images", *paths, "--out", tmp_path, "--size", 64,
        "--points", "0.2,0.3", "0.9,1", "--maps", "us3", "mid",
    )  # fmt: skip
    assert (tmp_path / "clean_vs_noisy_a_b.png").is_file()


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "pixels"])
def test_any_model(monkeypatch, tmp_path, model):
    paths = [draw(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("ab")]
    run(monkeypatch, "--model", model, "--random-weights", "--images", *paths, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "matches_a_b.png").is_file()


def test_samples_are_complete():
    pairs = drawing.sample_pairs()
    assert len(pairs) >= 6 and any("photo" in pair.name for pair in pairs)
    assert len({pair.name for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert ((pair.points > 0) & (pair.points < 1)).all() and len(pair.labels) == len(pair.points)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "one.png"], "--data got only one.png; give two files or more"),
        (["--images", "one.png", "missing.png"], "missing.png: no such file"),
        (["--images", "one.png", "text.png"], "text.png: not an image"),
        (["--images", "one.png", "small.png"], "small.png: 40x40 pixels, but both sides must be at least 64"),
        (["--images", "one.png", "one.png", "--points", "0.5"], "--points '0.5' is no point"),
        (["--images", "one.png", "one.png", "--points", "0.5,1.5"], "lies outside the image"),
        (["--points", "0.5,0.5"], "give --data too"),
        (["--model", "resnet19"], "model 'resnet19' is unknown; did you mean"),
        (["--model", "test_resnet", "--random-weights", "--maps", "us6"], "map 'us6' is not one of act1"),
        (["--match-map", "us12"], "map 'us12' is not one of us10"),
        (["--size", "32"], "--size 32 is too small; give at least 64"),
        (["--threads", "0"], "--threads 0 is too small"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--out", "text.png"], "is a file, not a folder; give another folder"),
    ],
)
def test_refuses_in_one_line(monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    draw("one.png")
    draw("small.png", (40, 40))
    Path("text.png").write_text("not a picture")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert error[0].startswith("demo.py: error: ") and words in error[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_chosen_points_are_spread_over_detail():
    pixels = np.full((128, 128, 3), 200, np.uint8)
    for x, y in ((20, 20), (100, 24), (24, 100), (100, 100)):
        pixels[y - 6 : y + 6, x - 6 : x + 6] = (250, 0, 0)
    maps = torch.randn(32, 16, 16, generator=torch.Generator().manual_seed(0))
    points = drawing.choose_points(Image.fromarray(pixels), maps, maps, 4)
    assert points.shape == (4, 2)
    corners = {(round(float(x)), round(float(y))) for x, y in points}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}  # one near each of the four squares


def test_colours_share_a_basis_and_can_be_rotated():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, 7, generator=generator), torch.randn(6, 4, 4, generator=generator)
    images, coordinates = figures.principal_colours([a, a, b])
    assert [image.size for image in images] == [(7, 5), (7, 5), (4, 4)]
    assert (np.asarray(images[0]) == np.asarray(images[1])).all()
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    rotated = [torch.einsum("cd,dhw->chw", turned, m) for m in (a, a, b)]  # the same features in other axes
    again, _ = figures.principal_colours(rotated, coordinates)
    for first, second in zip(images, again, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 2


def test_colours_of_few_channels_and_constant_maps():
    figures.principal_colours([torch.randn(2, 4, 4)])
    image = figures.principal_colours([torch.ones(5, 4, 4)])[0][0]
    assert np.isfinite(np.asarray(image, float)).all()


def test_marks_lie_where_the_points_are():
    marks = figures.mark_points(torch.tensor([[0.0, 0.0], [99.0, 49.0]]), (50, 100))
    assert (marks[0].x, marks[0].y) == pytest.approx((0.005, 0.01)) and (marks[1].x, marks[1].y) == pytest.approx(
        (0.995, 0.99)
    )
    panel = figures.squared(
        Panel(Image.new("RGB", (100, 50)), "", [Mark(0.5, 0.5, 1, "red"), Mark(0.1, 0.5, 2, "red")])
    )
    assert panel.image.size == (50, 50) and [(m.x, m.y, m.number) for m in panel.marks] == [(0.5, 0.5, 1)]
    figure = figures.grid([[Panel(Image.new("RGB", (50, 50), "white"), "", [Mark(0.5, 0.5, None, "red")])]], height=100)
    assert figure.size == (140, 140)


def test_heat_overlay_shows_the_peak():
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1
    pixels = np.asarray(figures.heat_overlay(Image.new("RGB", (80, 80), "white"), heat), int)
    redness = pixels[..., 0] - pixels[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert 18 <= y < 32 and 48 <= x < 62
