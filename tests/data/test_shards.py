"""WebDataset shards really written and streamed: order, resuming, processes, workers, damage; and folders."""

import io
import json

import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from cleandift_backbones.data.batches import (
    DecodeOptions,
    FolderBatches,
    decode,
    decode_batch,
    plain_images,
    read_rgba,
)
from cleandift_backbones.data.captioned import read_shard, sources_of, spread
from cleandift_backbones.data.images import ImageError
from cleandift_backbones.data.sources import ImageSource, list_training_sources
from cleandift_backbones.data.streaming import ShardBatches, find_shards
from cleandift_backbones.utils.errors import InputError

OPTIONS = DecodeOptions(64)
COUNT, PER_SHARD = 40, 8


def jpeg(number, size=(70, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (6 * number, 255 - 6 * number, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five shards as img2dataset writes them: .jpg, .txt, .json with the caption."""
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=PER_SHARD, verbose=False) as writer:
        for number in range(COUNT):
            sample = {"__key__": f"{number:09}", "jpg": jpeg(number), "json": {"caption": f"picture {number}"}}
            if number % 2:
                sample["txt"] = f"picture {number}"
            writer.write(sample)
    return tmp_path


def batches(folder, count, workers=0, **kwargs):
    options = dict(seed=3, batch_size=2, buffer=8)
    dataset = ShardBatches(find_shards(folder), OPTIONS, **{**options, **kwargs})
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
    return [next(loader) for _ in range(count)]


def captions(found):
    return [caption for batch in found for caption in batch.captions]


def test_every_sample_comes_once_an_epoch_and_in_another_order(folder):
    # The buffer carries a few samples from one epoch into the next: with none the epochs are apart.
    found = captions(batches(folder, COUNT, buffer=1))
    first, second = found[:COUNT], found[COUNT:]
    assert sorted(first) == sorted(second) == sorted(f"picture {number}" for number in range(COUNT))
    assert first != second
    shuffled = captions(batches(folder, COUNT // 2))
    assert shuffled != first and shuffled == captions(batches(folder, COUNT // 2))
    assert shuffled != captions(batches(folder, COUNT // 2, seed=4))
    (batch, *_) = batches(folder, 1)
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.abs().max() <= 1 and not batch.broken


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 12])
def test_a_resumed_stream_goes_on(folder, workers, start):
    whole = batches(folder, start + 6, workers)
    parts = batches(folder, 6, workers, start=start)
    assert captions(whole[start:]) == captions(parts)
    for one, other in zip(whole[start:], parts):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [2, 5, 7])
def test_processes_and_workers_share_the_samples(folder, workers, world):
    """Also where there are fewer shards than workers in all."""
    per_rank = COUNT // world
    found = [
        captions(batches(folder, per_rank, workers, rank=r, world=world, batch_size=1, buffer=1)) for r in range(world)
    ]
    first = [set(part[: per_rank // 2]) for part in found]
    assert not any(a & b for i, a in enumerate(first) for b in first[:i])


def test_broken_pictures_and_a_corrupt_shard(folder):
    with wds.TarWriter(str(folder / "00005.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"9{number:08}", "jpg": b"no picture" if number < 2 else jpeg(number), "txt": "x"})
    shard = folder / "00001.tar"
    shard.write_bytes(b"no tar" * 1000)
    found = batches(folder, 60)
    reasons = [reason for batch in found for reason in batch.broken]
    assert any("00005.tar" in reason for reason in reasons)
    assert any("00001.tar is damaged" in reason for reason in reasons)
    assert all(len(batch.images) == 2 == len(batch.captions) for batch in found)
    (folder / "only").mkdir()
    with wds.TarWriter(str(folder / "only/0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b"no picture"})
    with pytest.raises(ImageError, match="no picture of a batch can be read"):
        batches(folder / "only", 1, buffer=1)
    (folder / "empty").mkdir()
    wds.TarWriter(str(folder / "empty/0.tar")).close()
    with pytest.raises(ValueError, match="no samples in the shards"):
        batches(folder / "empty", 1)


def test_find_shards(folder, tmp_path):
    assert len(find_shards(folder)) == len(find_shards(f"{folder}/*.tar")) == 5
    assert find_shards(f"{folder}/{{00001..00002}}.tar") == [f"{folder}/00001.tar", f"{folder}/00002.tar"]
    with pytest.raises(ValueError, match="no shard .*00005.tar"):
        find_shards(f"{folder}/{{00001..00009}}.tar")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no .tar shards in"):
        find_shards(tmp_path / "nothing")


def test_training_from_shards(folder, tmp_path):
    from finetune_runs import FAST, RECIPE
    from safetensors.torch import load_file

    from tools.finetune import main

    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout/a.jpg").write_bytes(jpeg(3))
    given = [RECIPE, f"data.path={folder}", *FAST, "max_steps=3", "text=distilled"]
    with pytest.raises(SystemExit):
        main([*given, f"output_dir={tmp_path / 'run'}"])  # shards need held-out pictures
    given.append(f"data.heldout={tmp_path / 'heldout'}")
    assert main([*given, f"output_dir={tmp_path / 'run'}"]) == 0
    assert main([*given, f"output_dir={tmp_path / 'parts'}", "stop_after=2"]) == 0
    assert main([*given, f"output_dir={tmp_path / 'parts'}"]) == 0
    one, other = (load_file(tmp_path / name / "native/model.safetensors") for name in ("run", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- folders ---


def test_captions_of_a_folder(tmp_path):
    for name in "abcd":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(" from text\n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "from json"}))
    (tmp_path / "c.json").write_text(json.dumps({"text": "also"}))
    assert [p.caption for p in list_training_sources(tmp_path)] == ["from text", "from json", "also", ""]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "imagefolder"}\n')
    assert [(p.source.name, p.caption) for p in list_training_sources(tmp_path)] == [("b.png", "imagefolder")]


def test_linked_folders_are_trained_on(tmp_path):
    """As extraction reads folders: links are followed, files whose names begin with a dot are not taken."""
    Image.new("RGB", (64, 64)).save(tmp_path / "elsewhere.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/set").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "data/._a.png").write_bytes(b"of another system")
    assert [p.source.name for p in list_training_sources(tmp_path / "data")] == ["elsewhere.png"]


def test_pictures_are_resized_and_cut_never_squashed(tmp_path):
    """A circle stays a circle."""
    image = Image.new("RGB", (300, 150))
    for x in range(300):
        for y in range(150):
            if (x - 150) ** 2 + (y - 75) ** 2 < 50**2:
                image.putpixel((x, y), (255, 255, 255))
    image.save(tmp_path / "circle.png")
    picture = ImageSource("circle", str(tmp_path / "circle.png"))
    found = decode(picture, DecodeOptions(64, flip=False), torch.Generator()).mean(0) > 0
    assert found.any(0).sum() == found.any(1).sum() and 42 <= found.any(0).sum() <= 44
    generator = torch.Generator().manual_seed(0)
    wanders = {decode(picture, DecodeOptions(64, "random", False), generator).sum().item() for _ in range(6)}
    assert len(wanders) > 1


def test_processes_share_the_joint_batch_of_a_folder(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(jpeg(number))
    pictures = list_training_sources(tmp_path / "pictures")
    one = FolderBatches(pictures, OPTIONS, seed=0, batch_size=4, batches=5)
    two = [FolderBatches(pictures, OPTIONS, seed=0, batch_size=2, batches=5, rank=rank, world=2) for rank in range(2)]
    for number in range(5):
        joint = torch.cat([part[number].images for part in two])
        assert torch.equal(one[number].images, joint)
    resumed = FolderBatches(pictures, OPTIONS, seed=0, batch_size=4, batches=5, start=3)
    assert len(resumed) == 2 and torch.equal(resumed[0].images, one[3].images)


def test_a_sample_with_a_wrong_caption_is_told_and_kept_without_one(tmp_path):
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=False) as writer:
        for number in range(4):
            caption = {"caption": 3} if number == 1 else {"caption": "fine"}
            writer.write({"__key__": f"{number:09}", "jpg": jpeg(number), "json": caption})
    found = batches(tmp_path, 4)
    assert any("000000001" in told and "must be a string" in told for batch in found for told in batch.broken)
    assert set(captions(found)) == {"fine", ""}


def test_a_batch_without_a_readable_picture_takes_another(tmp_path):
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=False) as writer:
        for number in range(4):
            data = b"no picture" if number == 2 else jpeg(number)
            writer.write({"__key__": f"{number:09}", "jpg": data, "json": {"caption": str(number)}})
    found = batches(tmp_path, 8, batch_size=1, buffer=1, seed=0)
    assert len(found) == 8 and sum(bool(batch.broken) for batch in found) == 2


def test_transparent_pictures_are_not_squashed(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "wide.png")
    rgba = read_rgba(ImageSource("wide", str(tmp_path / "wide.png")), 64)
    opaque = rgba[3] > 127
    assert rgba.shape == (4, 64, 64)
    assert abs(int(opaque.any(0).sum()) - 2 * int(opaque.any(1).sum())) <= 2  # still twice as wide as high


def write(path, count, broken=()):
    with wds.TarWriter(str(path)) as writer:
        for number in range(count):
            data = b"no picture" if number in broken else jpeg(number)
            writer.write({"__key__": f"{number:09}", "jpg": data, "txt": str(number)})


def test_a_worker_whose_shards_hold_nothing_takes_images_of_others(tmp_path):
    write(tmp_path / "0.tar", 0)
    write(tmp_path / "1.tar", 3)
    assert set(captions(batches(tmp_path, 12, workers=2))) == {"0", "1", "2"}


def test_one_image_is_enough_for_several_workers(tmp_path):
    write(tmp_path / "0.tar", 1)
    assert set(captions(batches(tmp_path, 4, workers=3))) == {"0"}


def test_shards_without_any_image_are_refused(tmp_path):
    write(tmp_path / "0.tar", 0)
    with pytest.raises(InputError, match=r"no samples in the shards, e\.g\. .*0\.tar \(no images\); give shards"):
        batches(tmp_path, 1)


def test_broken_images_at_the_very_start_stop_nothing(tmp_path):
    write(tmp_path / "0.tar", 6, broken=range(3))
    found = batches(tmp_path, 3, batch_size=1, buffer=1)
    assert captions(found)[0] == "3" and [len(batch.broken) >= 1 for batch in found] == [True] * 3
    assert all("0.tar" in told for batch in found for told in batch.broken)


# --- held-out shards ---


def run_of(path, heldout, out, *more):
    from finetune_runs import finetune, log

    finetune(path, out, f"data.heldout={heldout}", "max_steps=1", "checkpoint_every=1", *more)
    return log(out, "validation")


def test_held_out_shards_are_those_images(folder, tmp_path, caplog):
    """The validation loss is that of the same images in a folder; a shard that is also trained on is reported."""
    (tmp_path / "images").mkdir()
    for number in range(PER_SHARD):
        (tmp_path / f"images/{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "train").mkdir()
    for number in range(1, 3):
        (folder / f"0000{number}.tar").rename(tmp_path / f"train/{number}.tar")
    one = run_of(tmp_path / "train", tmp_path / "images", tmp_path / "one")
    assert one == run_of(tmp_path / "train", folder / "00000.tar", tmp_path / "two") and len(one) == 2
    assert "also trained on" not in caplog.text
    run_of(tmp_path / "train/*.tar", f"{tmp_path}/train/../{{00000,train/2}}.tar", tmp_path / "three")
    assert "8 of 16 validation images are also trained on" in caplog.text


def test_damage_in_held_out_shards_is_told(folder, tmp_path, caplog):
    (tmp_path / "held").mkdir()
    cut = (folder / "00000.tar").read_bytes()
    (tmp_path / "held/0.tar").write_bytes(cut[: len(cut) // 2])
    write(tmp_path / "held/1.tar", 4, broken=[2])
    assert len(run_of(folder / "00001.tar", tmp_path / "held", tmp_path / "run")) == 2
    assert "0.tar is damaged" in caplog.text and "left out of validation: " in caplog.text
    assert "1.tar:000000002" in caplog.text and caplog.text.count("0.tar is damaged") == 1
    write(tmp_path / "held/0.tar", 0)
    write(tmp_path / "held/1.tar", 0)
    with pytest.raises(InputError, match="the shards hold no images"):
        sources_of(tmp_path / "held")


def test_pictures_of_shards_are_spread_and_read_in_order(folder, tmp_path):
    every = sources_of(folder)
    assert [p.caption for p in every] == [f"picture {number}" for number in range(COUNT)]
    assert every[9].name == f"{folder}/00001.tar:{9:09}" and every[9].source == jpeg(9)
    assert [p.caption for p in sources_of(folder, 4)] == [f"picture {number}" for number in (0, 10, 20, 30)]
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / f"images/{number}.jpg").write_bytes(jpeg(number))
    assert [p.source.name for p in sources_of(tmp_path / "images", 2)] == ["0.jpg", "2.jpg"]
    for items, most, chosen in [("abcde", None, "abcde"), ("abcde", 9, "abcde"), ("abcdef", 3, "ace"), ("", 2, "")]:
        assert spread(list(items), most) == list(chosen)


def test_chosen_images_of_a_shard(folder, tmp_path):
    notes = []
    found = list(read_shard(str(folder / "00002.tar"), notes, [1, 6]))
    assert [p.caption for p in found] == ["picture 17", "picture 22"] and not notes
    lost = tmp_path / "lost.tar"
    lost.write_bytes((folder / "00002.tar").read_bytes())
    assert len(list(read_shard(str(lost), notes))) == PER_SHARD
    lost.write_bytes(lost.read_bytes()[:9000])
    assert len(list(read_shard(str(lost), notes))) < PER_SHARD and "lost.tar is damaged" in notes[0]


# --- several sets ---


def test_folders_and_shards_are_mixed(folder, tmp_path, capsys):
    from finetune_runs import RECIPE, finetune, refused

    from cleandift_backbones.distill.recipe import load_recipe
    from cleandift_backbones.distill.setup import list_data

    (tmp_path / "images").mkdir()
    for number in range(50, 53):
        (tmp_path / f"images/{number}.jpg").write_bytes(jpeg(number % 40))
        (tmp_path / f"images/{number}.txt").write_text(f"picture {number}")
    shards, more = f"{folder}/{{00000..00001}}.tar", f"data.more=[{tmp_path / 'images'},{folder / '00003.tar'}]"
    data = list_data(load_recipe(RECIPE, [f"data.path={shards}", more, f"output_dir={tmp_path / 'run'}"]), 64)
    told = [picture.caption for picture in [*data.pictures, *data.heldout]]
    numbers = [*range(16), *range(50, 53), *range(24, 32)]
    assert not data.streamed and sorted(told) == sorted(f"picture {number}" for number in numbers)
    assert [p.caption for p in data.heldout] == ["picture 0", "picture 25"]  # the first, and 20 further on
    assert finetune(shards, tmp_path / "run", "max_steps=1", more)
    refused(shards, tmp_path / "other", capsys, "cache_dir needs folders of pictures", more, f"cache_dir={tmp_path}/c")


# --- transparent images ---


def png(size, alpha):
    buffer = io.BytesIO()
    image = Image.new("RGBA", size, (0, 200, 0, 255))
    image.putalpha(alpha)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_transparent_images_in_shards_get_random_backgrounds(tmp_path):
    """As those of a folder do, also beside photographs in a batch; they are no longer put on white."""
    options = DecodeOptions(64, flip=False, background="random")
    clear, photo = (ImageSource(name, data=data) for name, data in [("a", png((64, 64), 0)), ("b", jpeg(3))])
    (tmp_path / "a.png").write_bytes(clear.source)
    one = decode_batch([clear] * 6, options, 0, 0)
    two = decode_batch([ImageSource("a", str(tmp_path / "a.png"))] * 6, options, 0, 0)
    assert torch.equal(one.images, two.images) and one.images.amin((1, 2, 3)).min() < 0
    broken = ImageSource("c", data=b"no image")
    mixed = decode_batch([photo, *[clear] * 6, broken], options, 0, 0)
    assert torch.equal(mixed.images[0], decode(photo, options, torch.Generator())) and len(mixed.images) == 8
    assert torch.equal(mixed.images[1:7], one.images) and len(mixed.broken) == 1
    (plain,), _ = plain_images([clear], options)
    assert (plain == 1).all()
