"""Nearest-neighbour classification and retrieval: layouts, scikit-learn's answers, counts by hand."""

import csv
import math

import numpy as np
import pytest
import torch
from test_eval_features import picture

from cleandift_backbones.evaluation import labelled, neighbours
from cleandift_backbones.evaluation.items import DataError


def fill(folder, counts, ending="png"):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(folder / name / f"{name}_{i}.{ending}", i)


def test_image_folders(tmp_path):
    fill(tmp_path / "train", {"cat": 3, "ant": 2})
    fill(tmp_path / "val", {"cat": 1})
    train, val = labelled.read_train_and_val(tmp_path)
    assert train.classes == ["ant", "cat"] and train.labels.tolist() == [0, 0, 1, 1, 1]
    assert val.labels.tolist() == [1] and val.items[0].key == "val/cat/cat_0.png"
    assert len(labelled.read_image_folder(tmp_path / "train", per_class=2).items) == 4
    fill(tmp_path / "val", {"dog": 1})
    with pytest.raises(DataError, match="1 of 2 classes are not in train, first dog"):
        labelled.read_train_and_val(tmp_path)
    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(DataError, match="bee holds no pictures"):
        labelled.read_train_and_val(tmp_path)
    with pytest.raises(DataError, match=r"has no train and no val \(found cat, dog\)"):
        labelled.read_train_and_val(tmp_path / "val")
    with pytest.raises(DataError, match=r"has no folders of classes \(found 1 files\)"):
        labelled.read_image_folder(tmp_path / "val" / "cat")


def test_imagenets_flat_validation_folder(tmp_path):
    fill(tmp_path / "train", {"n01440764": 2, "n01443537": 1}, "JPEG")
    (tmp_path / "val").mkdir()
    for i in (1, 2, 3):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", i)
    with pytest.raises(DataError, match=r"no folders of classes.*LOC_val_solution\.csv"):
        labelled.read_train_and_val(tmp_path)
    rows = [("00000001", "n01443537 85 1 499 272"), ("00000002", "n01440764 1 2 3 4 n01440764 5 6 7 8")]
    rows.append(("00000003", "n01440764 0 0 9 9"))

    def write():
        with (tmp_path / "LOC_val_solution.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["ImageId", "PredictionString"])
            writer.writerows((f"ILSVRC2012_val_{number}", text) for number, text in rows)

    write()
    _, val = labelled.read_train_and_val(tmp_path)
    assert val.labels.tolist() == [1, 0, 0] and val.items[0].key == "val/ILSVRC2012_val_00000001.JPEG"
    found = labelled.read_gallery(tmp_path)  # retrieval needs no train
    assert found.labels.tolist() == [1, 0, 0] and found.classes == ["n01440764", "n01443537"]
    rows.append(("00000004", "n01440764 0 0 9 9"))
    write()
    with pytest.raises(DataError, match=r"1 of 4 pictures of val are missing, first .*00000004\.JPEG"):
        labelled.read_train_and_val(tmp_path)
    rows[-1] = ("00000004", " ")
    write()
    with pytest.raises(DataError, match="line 5: nothing in column PredictionString; expected ImageNet"):
        labelled.read_train_and_val(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text("name,class\na,b\n")
    with pytest.raises(DataError, match=r"no column ImageId, PredictionString \(found name, class\)"):
        labelled.read_gallery(tmp_path)


def test_splits_are_no_classes(tmp_path):
    fill(tmp_path, {"train": 2, "test": 2})
    with pytest.raises(DataError, match=r"holds splits \(test, train\), no classes"):
        labelled.read_gallery(tmp_path)


@pytest.mark.parametrize("weighted", [False, True])
def test_votes_are_scikit_learns(weighted, monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(neighbours, "CHUNK", 200)  # several chunks of queries
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    labels, asked = (torch.randint(0, 4, (n,), generator=generator) for n in (80, 30))
    gallery, queries = (centres[x] + 1.2 * torch.randn(len(x), 6, generator=generator) for x in (labels, asked))
    hits = neighbours.knn_hits(queries, asked, gallery, labels, (1, 3, 10), weighted)
    for k, found in hits.items():
        weights = (lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform"
        classifier = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        predicted = classifier.fit(gallery.numpy(), labels.numpy()).predict(queries.numpy())
        assert found.tolist() == (predicted == asked.numpy()).tolist()
    assert 0 < hits[10].sum() < 30


def test_recall_by_hand():
    # unit vectors at these angles; class of each; the third class has a single picture
    angles, classes = [0, 10, 22, 100, 107, 200], torch.tensor([0, 1, 0, 1, 1, 2])
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])
    hits, possible = neighbours.recall_hits(vectors, classes, vectors, classes, (1, 2), same=True)
    # nearest first: 0: 10, 22; 10: 0, 22; 22: 10, 0; 100: 107, 22; 107: 100, 22; 200: none of its class
    assert hits[1].tolist() == [False, False, False, True, True, False]
    assert hits[2].tolist() == [True, False, True, True, True, False]
    assert possible.tolist() == [True] * 5 + [False]
    assert neighbours.tally(hits[2], possible).rate == pytest.approx(4 / 5)
    with pytest.raises(DataError, match="no query has another picture of its class"):
        neighbours.recall_hits(vectors, torch.arange(6), vectors, torch.arange(6), (1,), same=True)
    with pytest.raises(DataError, match="k = 6 neighbours of 5 pictures"):
        neighbours.recall_hits(vectors, classes, vectors, classes, (6,), same=True)
    with pytest.raises(DataError, match="k = 7 neighbours of 6 pictures; give smaller --k"):
        neighbours.knn_hits(vectors, classes, vectors, classes, (7,))
