"""Keypoint pairs: the readers on folders that follow the data sets' layouts, matching and PCK against plain loops."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_evaluation import plain_match

from cleandift_backbones.data.images import ImageError
from cleandift_backbones.evaluation.items import DataError
from cleandift_backbones.evaluation.tasks import matching, pairs
from cleandift_backbones.features.correspondence import interpolation_matrix, window_matrix

SPAIR = [  # category, source, its (w, h), target, its (w, h), points in both, box
    ("aeroplane", "2008_002719", (50, 37), "2008_004100", (50, 33),
     [[[5, 6], [40, 30]], [[7, 5], [44, 20]]], [4, 3, 46, 22]),
    ("aeroplane", "2008_004100", (50, 33), "2008_002719", (50, 37), [[[7, 5]], [[5, 6]]], [2, 2, 47, 33]),
    ("cat", "2009_000001", (30, 41), "2009_000002", (36, 48),
     [[[1, 2], [29, 40], [11, 12]], [[0, 0], [35, 47], [8, 9]]], [0, 0, 35, 47]),
]  # fmt: skip


def save_picture(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(path)


@pytest.fixture
def spair(tmp_path):
    """Three pairs in SPair-71k's own layout and annotation fields."""
    root = tmp_path / "SPair-71k"
    names = []
    for number, (category, source, source_size, target, target_size, points, box) in enumerate(SPAIR):
        name = f"{number:06d}-{source}-{target}:{category}"
        names.append(name)
        annotation = {
            "pair_id": number, "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg",
            "src_imsize": [*source_size, 3], "trg_imsize": [*target_size, 3],
            "src_bndbox": [0, 0, source_size[0], source_size[1]], "trg_bndbox": box, "category": category,
            "src_pose": "Unspecified", "trg_pose": "Left", "viewpoint_variation": 1, "scale_variation": 0,
            "truncation": 0, "occlusion": 0, "mirror": 0, "filename": name, "src_kps": points[0], "trg_kps": points[1],
            "kps_ids": [str(i) for i in range(len(points[0]))],
        }  # fmt: skip
        path = root / "PairAnnotation" / "test" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(annotation))
        for image, size in ((source, source_size), (target, target_size)):
            save_picture(root / "JPEGImages" / category / f"{image}.jpg", size, number)
            note = root / "ImageAnnotation" / category / f"{image}.json"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps({"image_width": size[0], "image_height": size[1], "kps": {"0": None}}))
    (root / "Layout" / "large").mkdir(parents=True)
    (root / "Layout" / "large" / "test.txt").write_text("\n".join(names) + "\n")
    return root


def test_spair_is_read(spair):
    data = pairs.read_pairs(spair)
    assert data.name == "SPair-71k" and len(data.pairs) == 3 and len(data.items) == 4
    first, back, cat = data.pairs
    assert (first.source, first.target) == (back.target, back.source) and data.sizes[first.source] == (37, 50)
    assert first.source_points.tolist() == [[5, 6], [40, 30]] and first.target_points.tolist() == [[7, 5], [44, 20]]
    assert (first.box, back.box, cat.box) == (42, 45, 47) and cat.category == "cat"
    assert data.items[cat.target].key == "JPEGImages/cat/2009_000002.jpg"
    assert data.items[cat.target].caption == "A photo of a cat." and data.items[0].read().size == (50, 37)


def test_spair_says_what_is_missing(spair):
    with pytest.raises(DataError, match=r"val\.txt is missing \(found test\.txt there\); expected SPair-71k"):
        pairs.read_spair(spair, "val")
    (spair / "JPEGImages/cat/2009_000001.jpg").unlink()
    said = r"1 of 4 pictures are missing, first .*cat/2009_000001\.jpg, listed in 00000.*json"
    with pytest.raises(DataError, match=said):
        pairs.read_spair(spair)
    annotation = next((spair / "PairAnnotation/test").glob("000001-*"))
    annotation.write_text(json.dumps({"category": "cat"}))
    with pytest.raises(DataError, match=r"000001-.*not a pair annotation of SPair-71k \(KeyError\('src_imname'\)"):
        pairs.read_spair(spair)
    annotation.unlink()
    with pytest.raises(DataError, match=r"1 of 3 pair annotations are missing, first .*000001-"):
        pairs.read_spair(spair)
    with pytest.raises(DataError, match=r"JPEGImages has no JPEGImages and no PairAnnotation .*found aeroplane, cat"):
        pairs.read_spair(spair / "JPEGImages")
    with pytest.raises(DataError, match="no pairs .found nothing.; expected one of"):
        pairs.read_pairs(spair / "nowhere")


def test_a_picture_of_another_size_is_told(spair):
    save_picture(spair / "JPEGImages/cat/new.jpg", (31, 41))
    (spair / "JPEGImages/cat/new.jpg").rename(spair / "JPEGImages/cat/2009_000001.jpg")
    data = pairs.read_spair(spair)
    with pytest.raises(ImageError, match=r"2009_000001\.jpg: 31x41 pixels, but its annotation says 30x41"):
        data.items[data.pairs[2].source].read()


def write_json_pairs(folder, entries):
    save_picture(folder / "a.png", (40, 30), 1)
    save_picture(folder / "b.png", (20, 50), 2)
    (folder / "pairs.json").write_text(json.dumps(entries))
    return folder / "pairs.json"


def test_the_same_position_keeps_its_part_of_the_sides(tmp_path):
    points = [[0, 0], [39, 29], [19.5, 14.5]]  # corners and the middle of 40 x 30, in 20 x 50
    entry = dict(source="a.png", target="b.png", source_points=points, target_points=points[:1] * 3)
    data = pairs.read_pairs(write_json_pairs(tmp_path, [entry]))
    (found,) = matching.same_position(data)
    torch.testing.assert_close(found, torch.tensor([[-0.25, 1 / 3], [19.25, 49 - 1 / 3], [9.5, 24.5]]))


def test_json_pairs(tmp_path):
    entry = dict(source="a.png", target="b.png", source_points=[[1, 2]], target_points=[[3, 4.5]])
    data = pairs.read_pairs(write_json_pairs(tmp_path, [entry, dict(entry, category="x", target_box=[0, 5, 9, 45])]))
    assert data.pairs[0].box is None and data.pairs[1].box == 40 and data.sizes == [(30, 40), (50, 20)] * 2
    assert data.pairs[0].target_points.tolist() == [[3, 4.5]] and data.items[0].caption == ""
    for change, words in (
        (dict(target_points=[[25, 3]]), r"1 keypoints lie outside .*pair 0: target keypoint \(25\.0, 3\.0\) in 20x50"),
        (dict(target_points=[[1, 1], [2, 2]]), "1 source and 2 target keypoints"),
        (dict(target_points=["x"]), "not lists of"),
        (dict(target="c.png"), r"1 of 2 pictures are missing, first .*c\.png, listed in pairs\.json, pair 0"),
        (dict(target_box=[3, 3, 3, 3]), "box has no area"),
        (dict(target_box=[3]), "pair 0: IndexError"),
        (dict(source_points=[], target_points=[]), "no pair has a keypoint in common"),
    ):
        with pytest.raises(DataError, match=words):
            pairs.read_pairs(write_json_pairs(tmp_path, [entry | change]))
    outside = entry | dict(source_points=[[1, 2], [9, 9]], target_points=[[25, 3], [4, 5]])
    data = pairs.read_json_pairs(write_json_pairs(tmp_path, [outside]), skip_outside=True)
    assert data.skipped == 1 and data.pairs[0].source_points.tolist() == [[9, 9]]
    edge = entry | dict(source_points=[[40, 30]])  # counted from 1
    assert pairs.read_json_pairs(write_json_pairs(tmp_path, [edge])).pairs[0].source_points.tolist() == [[39, 29]]


def test_json_pairs_may_lie_anywhere(tmp_path):
    save_picture(tmp_path / "elsewhere" / "b.png", (20, 50), 2)
    (tmp_path / "here").mkdir()
    for path in (str(tmp_path / "elsewhere" / "b.png"), "../elsewhere/b.png"):
        entry = dict(source="a.png", target=path, source_points=[[1, 2]], target_points=[[3, 4.5]])
        data = pairs.read_pairs(write_json_pairs(tmp_path / "here", [entry]))
        assert data.items[1].read().size == (20, 50) and len({item.key for item in data.items}) == 2


def test_a_folder_of_images_with_a_list_of_pairs(tmp_path):
    """The lone JSON file is taken whatever its name; of several one must be chosen."""
    entry = dict(source="a.png", target="a.png", source_points=[[1, 2]], target_points=[[3, 4]])
    made = write_json_pairs(tmp_path, [entry])
    (tmp_path / "JPEGImages").mkdir()  # a folder of this name alone is not PF-PASCAL
    (tmp_path / "._test_pairs.json").write_text("of a file manager")
    for name in ("x.json", "test_pairs.json", "my_Pairs.JSON"):
        made = made.rename(tmp_path / name)
        data = pairs.read_pairs(tmp_path)
        assert data.name == made.stem and len(data.pairs) == 1
    (tmp_path / "info.json").write_text("{}")  # a name with "pairs" goes before others
    assert pairs.read_pairs(tmp_path).name == "my_Pairs"
    (tmp_path / "train_pairs.json").write_text("[]")
    with pytest.raises(DataError, match=r"2 JSON files \(my_Pairs.JSON, train_pairs.json\): choose one, as in --data"):
        pairs.read_pairs(tmp_path)
    made.unlink()
    (tmp_path / "train_pairs.json").unlink()
    with pytest.raises(DataError, match=r"info\.json: expected a JSON list"):
        pairs.read_pairs(tmp_path)


@pytest.mark.parametrize("points_in_table", [False, True])
def test_pf_pascal_is_read(tmp_path, points_in_table):
    savemat = pytest.importorskip("scipy.io").savemat
    base = tmp_path / "PF-dataset-PASCAL"
    marks = {  # class 8 is the cat
        "2008_000008": ([[3.0, 4.0], [math.nan, math.nan], [20.5, 10.0]], [2.0, 3.0, 33.0, 21.0]),
        "2008_000009": ([[5.0, 6.0], [7.0, 8.0], [11.0, 12.0]], [1.0, 1.0, 21.0, 29.0]),
    }
    for name, (points, box) in marks.items():
        save_picture(base / "JPEGImages" / f"{name}.jpg", (40, 30), 3)
        (base / "Annotations" / "cat").mkdir(parents=True, exist_ok=True)
        savemat(base / "Annotations" / "cat" / f"{name}.mat", {"kps": np.array(points), "bbox": np.array([box])})
    row = dict(source_image="PF-dataset-PASCAL/JPEGImages/2008_000008.jpg")
    row |= dict(target_image="PF-dataset-PASCAL/JPEGImages/2008_000009.jpg")
    row |= {"class": 8}
    name = "test_pairs.csv"
    if points_in_table:
        row |= dict(XA="3.0;20.5", YA="4.0;10.0", XB="5.0;11.0", YB="6.0;12.0")
        name = "test_pairs_pf_pascal.csv"
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (pair,) = pairs.read_pairs(tmp_path).pairs
    assert pair.source_points.tolist() == [[3, 4], [20.5, 10]] and pair.target_points.tolist() == [[5, 6], [11, 12]]
    assert pair.box == 28 and pair.category == "cat"
    (tmp_path / "short_pairs.csv").write_text("source_image,target_image,class\n2008_000008.jpg\n")
    with pytest.raises(DataError, match=r"short_pairs\.csv, line 2: nothing in column target_image; expected PF"):
        pairs.read_pf_pascal(tmp_path, "short")
    with pytest.raises(
        DataError, match=r"no trn_pairs\.csv and no trn_pairs_pf_pascal\.csv \(found short_pairs\.csv, test_pairs"
    ):
        pairs.read_pf_pascal(tmp_path, "trn")
    if not points_in_table:
        (base / "Annotations/cat/2008_000009.mat").unlink()
        with pytest.raises(DataError, match="1 of 2 annotations are missing"):
            pairs.read_pf_pascal(tmp_path)


def maps_of(data, channels=9, cells=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *cells, generator=generator) for _ in data.items]


class Counted(list):
    """Maps that say how often each was read."""

    def __getitem__(self, index):
        self.reads = [*getattr(self, "reads", []), index]
        return super().__getitem__(index)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_matching_equals_the_protocol_pair_by_pair(spair, monkeypatch, chunk):
    monkeypatch.setattr(matching, "CHUNK", chunk)
    data = pairs.read_pairs(spair)
    maps = Counted(maps_of(data))
    found = matching.match_pairs(maps, data, progress=False)
    assert max(map(maps.reads.count, range(4))) == 2  # once as a source, once as a target, however many pairs
    for pair, points in zip(data.pairs, found, strict=True):
        source, target = maps[pair.source], maps[pair.target]
        sizes = data.sizes[pair.source], data.sizes[pair.target]
        expected, scores = plain_match(source, target, pair.source_points, *sizes)
        at = torch.stack([s[int(y), int(x)] for s, (x, y) in zip(scores, points.tolist(), strict=True)])
        assert torch.allclose(at, scores.flatten(1).amax(1), atol=1e-5)  # plateaus at the border: any pixel of them
        inner = ((expected > 5) & (expected < torch.tensor([sizes[1][1] - 6, sizes[1][0] - 6]))).all(1)
        assert torch.equal(points[inner], expected[inner])


def test_padded_pictures_match_as_on_the_whole_canvas(spair):
    """The plain way: upsample the padded input's map to the canvas at the picture's scale, and cut the picture out."""
    data = pairs.read_pairs(spair)
    maps = maps_of(data, cells=(8, 8))
    found, plain, alone = matching.match_pairs(maps, data, "pad", (64, 64), progress=False), [], 0
    for pair, points in zip(data.pairs, found, strict=True):
        shown = []
        for i in (pair.source, pair.target):
            height, width = data.sizes[i]
            ratio = min(64 / height, 64 / width)
            h, w = round(height * ratio), round(width * ratio)
            top, left = (64 - h) // 2, (64 - w) // 2
            fine = []  # the map's value at every pixel centre of the picture, by bilinear sampling on the canvas
            y = (top + (torch.arange(height) + 0.5) * h / height) / 64 * 2 - 1
            x = (left + (torch.arange(width) + 0.5) * w / width) / 64 * 2 - 1
            places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
            fine = F.grid_sample(maps[i][None], places, padding_mode="border", align_corners=False)[0]
            shown.append(fine)
        for (x, y), answer in zip(pair.source_points.long().tolist(), points.long().tolist(), strict=True):
            scores = F.cosine_similarity(shown[1], shown[0][:, y, x, None, None], dim=0)
            rivals = (scores > scores.max() - 1e-5).nonzero().flip(1)  # beyond the outermost cells the map is flat
            assert list(answer) in rivals.tolist()
            alone += len(rivals) == 1
            plain.append(rivals[0] if len(rivals) == 1 else torch.tensor(answer))
            assert scores[answer[1], answer[0]] == pytest.approx(scores.max().item(), abs=1e-5)
    # PCK of both, where ties are decided alike, is the same
    counts = [len(pair.source_points) for pair in data.pairs]
    expected = matching.pck_tallies(torch.stack(plain).float().split(counts), data)
    for key, tally in matching.pck_tallies(found, data).items():
        assert tally.rate == expected[key].rate
    assert alone >= 3


def test_window_matrix_is_torchs_interpolation_where_the_map_shows_the_picture():
    for cells, pixels in ((6, 50), (1, 7), (8, 3)):
        assert torch.allclose(window_matrix(cells, pixels, 0, 64, 64), interpolation_matrix(cells, pixels), atol=1e-6)


def test_soft_argmax_by_hand(spair):
    data = pairs.read_pairs(spair)
    maps = maps_of(data)
    hard = matching.match_pairs(maps, data, progress=False)
    soft = matching.match_pairs(maps, data, window=5, temperature=0.05, progress=False)
    pair, k = data.pairs[2], 2
    _, scores = plain_match(
        maps[pair.source], maps[pair.target], pair.source_points, *(data.sizes[i] for i in (pair.source, pair.target))
    )
    x, y = (int(v) for v in hard[2][k])
    total = mean_x = mean_y = 0.0
    for row in range(max(0, y - 2), min(48, y + 3)):
        for column in range(max(0, x - 2), min(36, x + 3)):
            weight = math.exp(scores[k, row, column].item() / 0.05)
            total, mean_x, mean_y = total + weight, mean_x + weight * column, mean_y + weight * row
    assert soft[2][k].tolist() == pytest.approx([mean_x / total, mean_y / total], abs=1e-3)
    cold = matching.match_pairs(maps, data, window=5, temperature=1e-6, progress=False)
    assert torch.allclose(cold[2][k], hard[2][k], atol=0.51)


def test_pck_by_hand(spair):
    data = pairs.read_pairs(spair)
    # box lengths 42, 45, 47 and pictures' longer sides 50, 50, 48; errors in pixels of each point
    errors = [[4.0, 4.5], [5.0], [0.0, 20.0, 4.75]]
    found = [
        p.target_points + torch.tensor([[e, 0.0] for e in error]) for p, error in zip(data.pairs, errors, strict=True)
    ]
    tallies = matching.pck_tallies(found, data, (0.1, 0.05))
    rates = {key: tally.rate for key, tally in tallies.items()}
    # bbox@0.1 limits: 4.2, 4.5, 4.7; img@0.1 limits: 5, 5, 4.8
    assert rates["bbox@0.1 per point"] == pytest.approx((1 + 0 + 1) / 6)
    assert rates["bbox@0.1 per image"] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)
    assert rates["img@0.1 per point"] == pytest.approx((2 + 1 + 2) / 6)
    assert rates["img@0.1 per image"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert rates["bbox@0.1 per point, aeroplane"] == pytest.approx(1 / 3)
    assert rates["img@0.1 per point, cat"] == pytest.approx(2 / 3)
    assert rates["bbox@0.05 per point"] == pytest.approx(1 / 6)
    assert len(tallies["bbox@0.1 per point"].hits) == 3  # target pictures are what is resampled
