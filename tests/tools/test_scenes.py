"""tools/tiny/make_scenes.py: labels are exact, equal seeds give equal scenes, folders of other people work."""

import json

import numpy as np
import pytest
from PIL import Image

from tools.tiny import make_scenes

FEW = ["--train", "6", "--val", "3", "--size", "64"]


def make(folder, *arguments):
    assert make_scenes.main(["--out", str(folder), *FEW, *arguments]) == 0
    return folder


def decoded(segmentation):
    height, width = segmentation["size"]
    values = np.arange(len(segmentation["counts"])) % 2
    return np.repeat(values, segmentation["counts"]).reshape(width, height).T.astype(bool)


def test_labels_agree(tmp_path):
    folder = make(tmp_path)
    for split, count in (("train", 6), ("val", 3)):
        coco = json.loads((folder / f"{split}.json").read_text())
        assert [c["name"] for c in coco["categories"]] == list(make_scenes.CLASSES)
        assert len(coco["images"]) == count and len(coco["annotations"]) >= count
        for image in coco["images"]:
            labels = np.asarray(Image.open(folder / "annotations" / split / image["file_name"]))
            assert Image.open(folder / "images" / split / image["file_name"]).size == labels.shape[::-1] == (64, 64)
            painted = np.zeros_like(labels)
            for a in (a for a in coco["annotations"] if a["image_id"] == image["id"]):
                mask = decoded(a["segmentation"])
                assert mask.sum() == a["area"] and not painted[mask].any()
                painted[mask] = a["category_id"]
                left, top, width, height = a["bbox"]
                inside = mask[top : top + height, left : left + width]
                assert inside.sum() == a["area"]
                assert all(
                    edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1])
                )  # boxes are tight
            np.testing.assert_array_equal(painted, labels)


def test_equal_seeds_give_equal_scenes(tmp_path):
    first, again, other = (make(tmp_path / name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2")))
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) == 2 * 9 + 2
    assert all((first / f).read_bytes() == (again / f).read_bytes() for f in files)
    assert any((first / f).read_bytes() != (other / f).read_bytes() for f in files)


def test_validation_shows_other_drawings():
    train, val = make_scenes.sample_pictures()
    assert set(train) == set(val) == set(make_scenes.CLASSES)
    assert not {f for files in train.values() for f in files} & {f for files in val.values() for f in files}


def test_folders(tmp_path, capsys):
    train, val = make_scenes.sample_pictures()
    emoji, own = tmp_path / "emoji", tmp_path / "own"
    subgroups = dict(
        face="face-glasses", animal="animal-mammal", food="food-sweet", transport="transport-ground", time="time"
    )
    for half, pictures in (("train", train), ("heldout", val)):  # as tools/tiny/make_pictures.py leaves them
        (emoji / half).mkdir(parents=True)
        entries = [dict(file_name=str(f), subgroup=subgroups[name]) for name, files in pictures.items() for f in files]
        entries.append(dict(file_name="flag.png", subgroup="flag"))
        (emoji / half / "metadata.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert make_scenes.read_pictures(emoji) == (train, val)
    for name in ("cats", "buses"):
        (own / name).mkdir(parents=True)
        for i, file in enumerate([train["animal"][0], val["animal"][0]]):
            (own / name / f"{i}.png").write_bytes(file.read_bytes())
    make(tmp_path / "out", "--pictures", str(own))
    assert "classes buses, cats" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "neither made by"),
        (lambda folder: (folder / "cats").mkdir(), "two pictures per class"),
        (lambda folder: [_opaque(folder / "cats" / f"{i}.png") for i in range(2)], "has no transparency"),
    ],
)
def test_bad_folders(prepare, message, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    prepare(tmp_path / "pictures")
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "out", "--pictures", str(tmp_path / "pictures"))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def _opaque(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
