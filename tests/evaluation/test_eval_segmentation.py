"""The segmentation probe: layouts to the letter, and counts per cell against predictions at full size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_eval_features import picture
from torch import nn

from cleandift_backbones.evaluation import items, probes, tasks
from cleandift_backbones.evaluation.items import DataError
from cleandift_backbones.evaluation.tasks import segmentation


def save_palette(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(bytes((i * 67 + c * 31) % 256 for i in range(256) for c in range(3)))  # sets mode P
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(["2007_000032", "2007_000039", "2007_000063"]):
        picture(root / "JPEGImages" / f"{name}.jpg", number, (50, 40))
        mask = np.zeros((40, 50), np.uint8)
        mask[5:20, 10:30] = 1 + number
        mask[5:7] = 255
        save_palette(root / "SegmentationClass" / f"{name}.png", mask)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000039\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000063\n")
    return tmp_path


def test_voc_is_read(voc):
    train, val = (segmentation.read_scenes(voc, split) for split in ("train", "val"))
    assert [item.key for item in train.items] == ["JPEGImages/2007_000032.jpg", "JPEGImages/2007_000039.jpg"]
    mask = val.masks[0]()
    assert val.classes == 21 and mask.shape == (40, 50) and sorted(np.unique(mask)) == [0, 3, 255]
    root = voc / "VOCdevkit" / "VOC2012"
    with pytest.raises(DataError, match=r"trainaug\.txt is missing \(found train\.txt, val\.txt there\)"):
        segmentation.read_scenes(voc, "trainaug")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(root / "SegmentationClass/2007_000032.png")
    with pytest.raises(DataError, match="colour mode RGB; expected a palette or grey PNG"):
        train.masks[0]()
    save_palette(root / "SegmentationClass/2007_000032.png", np.full((4, 4), 21, np.uint8))
    with pytest.raises(DataError, match="class 21 of 21 does not exist"):
        train.masks[0]()
    (root / "SegmentationClass/2007_000032.png").write_bytes(b"x")
    with pytest.raises(DataError, match="the mask cannot be read"):
        train.masks[0]()
    (root / "SegmentationClass/2007_000032.png").unlink()
    said = r"1 of 2 masks are missing, first .*2007_000032\.png, listed in .*train\.txt; expected VOC"
    with pytest.raises(DataError, match=said):
        segmentation.read_scenes(voc, "train")
    with pytest.raises(DataError, match=r"neither layout \(found train\.txt, val\.txt\)"):
        segmentation.read_scenes(root / "ImageSets/Segmentation", "train")


def test_masks_are_checked_before_the_work(voc):
    folder = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    for root in (voc, voc / "VOCdevkit", voc / "VOCdevkit" / "VOC2012"):
        train, val = (items.limit_scenes(segmentation.read_scenes(root, s), 1, 0) for s in ("train", "val"))
        tasks.Segmentation(train, val, probes.ProbeSettings())
    save_palette(folder / "2007_000063.png", np.zeros((40, 60), np.uint8))
    with pytest.raises(DataError, match=r"1 of 2 masks .*000063\.png: 60x40 pixels, but its picture has 50x40"):
        tasks.Segmentation(train, val, probes.ProbeSettings())
    save_palette(folder / "2007_000063.png", np.zeros((40, 50), np.uint8))
    (folder / "2007_000063.png").write_bytes((folder / "2007_000063.png").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"1 of 2 masks cannot be used, first .*000063\.png: truncated"):
        tasks.Segmentation(train, val, probes.ProbeSettings())


def test_ade20k_is_read(tmp_path):
    for split, folder in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations"):
            (tmp_path / kind / folder).mkdir(parents=True)
        picture(tmp_path / "images" / folder / f"ADE_{split}_00000001.jpg", 1)
        mask = np.array([[0, 1, 150]], np.uint8)
        Image.fromarray(mask).save(tmp_path / "annotations" / folder / f"ADE_{split}_00000001.png")
    scenes = segmentation.read_scenes(tmp_path, "val")
    assert scenes.classes == 150 and scenes.items[0].key == "images/validation/ADE_val_00000001.jpg"
    assert scenes.masks[0]().tolist() == [[255, 0, 149]]
    Image.fromarray(np.array([[151]], np.uint8)).save(tmp_path / "annotations/validation/ADE_val_00000001.png")
    with pytest.raises(DataError, match="class 151 of 150 does not exist"):
        scenes.masks[0]()


@pytest.fixture
def pets(tmp_path):
    """Two classes in VOC's layout, which colour alone tells apart; names in classes.txt."""
    root = tmp_path / "pets"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for split, count in (("train", 6), ("val", 3)):
        names = [f"{split}_{i}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for i, name in enumerate(names):
            mask = np.zeros((64, 64), np.uint8)
            mask[8 * i : 8 * i + 16] = 1
            pixels = np.where(mask[..., None] == 1, (250, 10, 10), (10, 10, 250)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=100, subsampling=0)
            mask[0] = 255
            save_palette(root / f"SegmentationClass/{name}.png", mask)
    (root / "classes.txt").write_text("background\npet\n")
    return root


def test_classes_come_from_the_data(pets):
    """Names in classes.txt; the argument is stronger; VOC's 21 are for VOC alone."""
    scenes = segmentation.read_scenes(pets, "val")
    assert (scenes.classes, scenes.names, scenes.origin) == (2, ["background", "pet"], "classes.txt")
    (pets / "classes.txt").write_bytes(b"\xef\xbb\xbf a b \r\nc\r\n\r\n")  # by an editor on Windows
    assert segmentation.read_scenes(pets, "train").names == ["a b", "c"]
    scenes = segmentation.read_scenes(pets, "val", classes=3)
    assert (scenes.classes, scenes.names, scenes.origin) == (3, [], "--classes")
    (pets / "classes.txt").unlink()
    assert segmentation.read_scenes(pets, "val", classes=2).classes == 2
    with pytest.raises(DataError, match=r"pets: .*how many classes.*classes\.txt.*--classes N"):
        segmentation.read_scenes(pets, "val")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no names"),
        ("pet\n", "1 class; a probe needs 2 to 255"),
        ("a\n\nb\n", "line 2 is empty"),
        ("a\nb\na\n", "line 3: the name 'a' is there already"),
        ("".join(f"{i}\n" for i in range(256)), "256 classes; a probe needs 2 to 255"),
    ],
)
def test_bad_names_of_classes(pets, text, words):
    (pets / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=rf"classes\.txt.*{words}"):
        segmentation.read_scenes(pets, "val")


def test_names_of_voc_and_ade20k_in_folders_of_others(voc, pets, tmp_path):
    """The layout alone does not tell how many classes there are."""
    for path in [*pets.rglob("train_*.*"), *pets.rglob("val_*.*")]:  # VOC2007's names are plain numbers
        path.rename(path.with_name(path.name.replace("train_", "00000").replace("val_", "00001")))
    for split, count in (("train", "0"), ("val", "1")):
        (pets / f"ImageSets/Segmentation/{split}.txt").write_text(f"0000{count}0\n")
    (pets / "classes.txt").unlink()
    with pytest.raises(DataError, match="how many classes"):
        segmentation.read_scenes(pets, "train")
    pets.rename(tmp_path / "VOC2007")
    assert segmentation.read_scenes(tmp_path / "VOC2007", "train").classes == 21
    (voc / "VOCdevkit" / "VOC2012" / "classes.txt").write_text("a\nb\nc\nd\n")  # e.g. of classes put together
    assert segmentation.read_scenes(voc, "train").classes == 4
    ade = tmp_path / "ade"
    for kind in ("images", "annotations"):
        (ade / kind / "validation").mkdir(parents=True)
    picture(ade / "images/validation/street_1.jpg", 1, (3, 1))
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(ade / "annotations/validation/street_1.png")
    with pytest.raises(DataError, match="how many classes"):
        segmentation.read_scenes(ade, "val")
    (ade / "classes.txt").write_text("road\nsky\n")  # 0 is to ignore in this layout: the first name is of 1
    scenes = segmentation.read_scenes(ade, "val")
    assert scenes.classes == 2 and scenes.masks[0]().tolist() == [[255, 0, 1]]


def test_a_class_beyond_the_last_is_found_before_the_work(pets):
    save_palette(pets / "SegmentationClass/val_1.png", np.full((64, 64), 2, np.uint8))
    train, val = (segmentation.read_scenes(pets, split) for split in ("train", "val"))
    said = r"1 of 9 masks .*val_1\.png: class 2 of 2 does not exist \(classes\.txt\)"
    with pytest.raises(DataError, match=said):
        tasks.Segmentation(train, val, probes.ProbeSettings())


def random_masks(count, classes, seed=0):
    rng = np.random.default_rng(seed)
    masks = [rng.integers(0, classes, (17 + i, 23 - i)).astype(np.uint8) for i in range(count)]
    for mask in masks:
        mask[rng.random(mask.shape) < 0.2] = 255
    return masks


def test_miou_equals_counting_pixels_of_upsampled_predictions():
    torch.manual_seed(0)
    masks, classes = random_masks(4, 5), 6  # class 5 never occurs in the masks
    maps = [torch.randn(3, 4, 5) for _ in masks]
    probe = nn.Conv2d(3, classes, 1).requires_grad_(False)
    labels = [segmentation.cell_labels(mask, (4, 5), classes) for mask in masks]
    confusion = np.zeros((classes, classes))
    for mask, x in zip(masks, maps, strict=True):
        predicted = F.interpolate(probe(x[None]), mask.shape, mode="nearest").argmax(1)[0].numpy()
        for truth, guess in zip(mask.ravel(), predicted.ravel(), strict=True):
            if truth != 255:
                confusion[truth, guess] += 1
    unions = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    expected = np.mean([confusion[c, c] / unions[c] for c in range(classes) if unions[c]])
    tally = segmentation.miou(probe, maps, labels, classes)
    assert tally.rate == pytest.approx(expected)
    assert segmentation.accuracy(tally, labels).rate == pytest.approx(confusion.diagonal().sum() / confusion.sum())


def test_the_loss_is_cross_entropy_over_upsampled_pixels(monkeypatch):
    masks = random_masks(3, 4)
    masks[2][:] = 255  # an empty mask among others
    labels = [segmentation.cell_labels(mask, (4, 5), 4) for mask in masks]
    seen = {}
    monkeypatch.setattr(segmentation, "train_probe", lambda features, outputs, loss, *rest: seen.update(loss=loss))
    segmentation.train_segmenter([], labels, 4)
    logits = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    pixels = [
        F.cross_entropy(
            F.interpolate(one[None], mask.shape, mode="nearest"),
            torch.from_numpy(mask).long()[None],
            ignore_index=255,
            reduction="sum",
        )
        for one, mask in zip(logits, masks, strict=True)
    ]
    count = sum(int((mask != 255).sum()) for mask in masks)
    assert seen["loss"](logits, [0, 1, 2]).item() == pytest.approx(sum(pixels).item() / count, rel=1e-5)
    assert seen["loss"](logits[2:], [2]) is None


def test_a_probe_learns_what_is_linear_and_is_seeded():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(8, 6, 6, generator=generator) * 5 + 3 for _ in range(40)]
    direction = torch.randn(8, generator=generator)
    masks = [(torch.einsum("chw,c->hw", x - 3, direction) > 0).byte().numpy() for x in maps]
    labels = [segmentation.cell_labels(mask, (6, 6), 2) for mask in masks]
    recipe = probes.ProbeSettings(epochs=60, learning_rate=0.1)
    probe = segmentation.train_segmenter(maps[:30], labels[:30], 2, recipe, progress=False)
    assert segmentation.miou(probe, maps[30:], labels[30:], 2).rate > 0.93
    again = segmentation.train_segmenter(maps[:30], labels[:30], 2, recipe, progress=False)
    assert torch.equal(probe.weight, again.weight)
    with pytest.raises(DataError, match="all 2 masks are empty"):
        scenes = segmentation.Scenes([], [lambda: np.full((4, 4), 255, np.uint8)] * 2, 2)
        segmentation.all_labels(scenes, (2, 2))


def test_standardisation_is_folded_into_the_convolution():
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(3, 4, 4, generator=generator) * torch.tensor([1.0, 9.0, 0.1])[:, None, None] + 7] * 3
    mean, deviation = probes.statistics(maps)
    stacked = torch.stack(maps).transpose(0, 1).flatten(1)
    assert torch.allclose(mean, stacked.mean(1), atol=1e-4)
    assert torch.allclose(deviation, stacked.std(1, unbiased=False), rtol=1e-4)
    seen, settings = [], probes.ProbeSettings(1, 3, 0.0, 0.0)
    probe = probes.train_probe(
        maps, 2, lambda out, indices: seen.append(out.detach()) or out.square().mean(), settings,
        progress=False,
    )  # fmt: skip
    assert torch.allclose(probe(torch.stack(maps)), seen[0], atol=1e-5)  # learning rate 0: the weights of the start
