"""Listing of images, shards and captions: the same in training, extraction and evaluation."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter

import pytest
from extract_runs import extract, noise
from finetune_runs import finetune, refused
from picture_bytes import encoded
from PIL import Image, features

from cleandift_backbones.data.batches import DecodeOptions
from cleandift_backbones.data.sources import SourceError, list_sources, list_training_sources
from cleandift_backbones.data.streaming import ShardBatches, find_shards
from cleandift_backbones.evaluation import labelled
from cleandift_backbones.evaluation.tasks import segmentation
from cleandift_backbones.features import Features

SEPARATOR = "\u2028"


def png(number=0, side=64):
    return encoded(Image.new("RGB", (side, side), (20 * number, 90, 200)))


def pack(path, files):
    """Writes a tar of {name: bytes}, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def trained(path, count):
    """(captions of the first `count` images, errors) in training."""
    batches = iter(ShardBatches(find_shards(path), DecodeOptions(64), 0, 1, buffer=1))
    found = [next(batches) for _ in range(count)]
    return [batch.captions[0] for batch in found], [reason for batch in found for reason in batch.broken]


def keys(path, **kwargs):
    return [entry.key for entry in list_sources(str(path), **kwargs)[0]]


# --- shards ---


def test_names_with_dots_in_shards(tmp_path):
    files = {"img_0.5.png": png(), "img_0.5.txt": b"half", "img_0.75.png": png(1), "img_0.75.json": b'"three quarters"'}
    files |= {"x.left.png": png(2), "x.right.png": png(3), "x.txt": b"both", "plain.jpg": png(4), "plain.txt": b"plain"}
    shard = pack(tmp_path / "a.tar", files)
    assert keys(shard) == ["img_0.5", "img_0.75", "x.left", "x.right", "plain"]
    captions, broken = trained(shard, 5)
    assert captions == ["half", "three quarters", "both", "both", "plain"] and not broken


def test_masks_of_a_sample_are_not_taken_as_images(tmp_path):
    files = {"a.jpg": png(), "a.seg.png": png(1), "a.png": png(2), "a.txt": b"one", "b.jpg": png(3), "b.cls": b"7"}
    shard, left_out = pack(tmp_path / "a.tar", files), Counter()
    assert keys(shard, left_out=left_out) == ["a", "b"]
    assert left_out == {"further images of a sample": 2, ".cls": 1}
    assert trained(shard, 2) == (["one", ""], [])


def test_captions_anywhere_in_a_shard_are_paired(tmp_path):
    files = {"a.png": png(), "b.png": png(1), "a.txt": b"first", "b.caption": b"second"}
    assert trained(pack(tmp_path / "a.tar", files), 2) == (["first", "second"], [])


def test_concatenated_shards_are_read_to_the_end(tmp_path):
    one = pack(tmp_path / "1.tar", {"a.png": png(), "a.txt": b"a", "b.png": png(1), "b.txt": b"b"})
    two = pack(tmp_path / "2.tar", {"c.png": png(2), "c.txt": b"c", "d.png": png(3), "d.txt": b"d"})
    both = tmp_path / "both" / "c.tar"
    both.parent.mkdir()
    both.write_bytes(one.read_bytes() + two.read_bytes())
    entries, told = list_sources(str(both))
    assert [entry.key for entry in entries] == list("abcd") and not told
    assert [entry.read().getpixel((0, 0))[0] for entry in entries] == [0, 20, 40, 60]
    assert trained(both, 4) == (list("abcd"), [])


@pytest.mark.parametrize("cut", [700, 1024, 1536, 20_480 - 512])
def test_a_truncated_shard_is_reported(tmp_path, cut):
    """Also if only the end-of-archive blocks are missing."""
    shard = pack(tmp_path / "a.tar", {"a.png": png(), "b.png": bytes(10_000), "a.txt": b"a"})
    data = shard.read_bytes()
    end = 512 * 2 + 512 * 21 + 512 * 2 if cut > 2000 else cut
    shard.write_bytes(data[:end])
    (tmp_path / "whole").mkdir()
    shutil.copy(pack(tmp_path / "whole.tar", {"w.png": png(), "w.txt": b"w"}), tmp_path / "whole" / "w.tar")
    shutil.move(shard, tmp_path / "whole" / "a.tar")
    _, told = list_sources(str(tmp_path / "whole"))
    assert len(told) == 1 and "a.tar is damaged" in told[0]
    _, broken = trained(tmp_path / "whole", 3)
    assert any("a.tar is damaged" in reason for reason in broken)


def test_equal_names_in_concatenated_shards_are_not_dropped_silently(tmp_path):
    one = pack(tmp_path / "1.tar", {"0.png": png(), "0.txt": b"first"})
    two = pack(tmp_path / "2.tar", {"0.png": png(1), "0.txt": b"second"})
    both = tmp_path / "c.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(SourceError, match="two pictures have the key '0'.*give each file in it a name of its own"):
        list_sources(str(both))
    assert trained(both, 2) == (["first", "second"], [])


def test_compressed_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(pack(tmp_path / "inner.tar", {"a": b""}), "unused.bin")
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    assert trained(tmp_path / "*.tar.gz", 1) == ([""], [])
    with pytest.raises(SourceError, match="a.tar.gz is compressed"):
        list_sources(str(tmp_path / "a.tar.gz"))


# --- hidden ---


def test_hidden_files_and_folders_are_left_out_everywhere(tmp_path):
    names = ["cat/1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/._1.png", "dog/2.png", ".git/3.png"]
    names += [".ipynb_checkpoints/4.png", "__MACOSX/cat/._1.png", "__MACOSX/5.png", "@eaDir/1.jpg"]
    root = tmp_path / ".named" / "data"  # hidden itself, but named
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    assert keys(root) == ["cat/1.png", "dog/2.png"]
    assert [p.source.relative_to(root).as_posix() for p in list_training_sources(root)] == ["cat/1.png", "dog/2.png"]
    assert labelled.read_image_folder(root).classes == ["cat", "dog"]
    shard = pack(tmp_path / "a.tar", {f"./{name}": png() for name in names})
    assert keys(shard) == ["./cat/1", "./dog/2"] and trained(shard, 2) == (["", ""], [])
    (root / "list.txt").write_text(".git/3.png\n")
    assert keys(root / "list.txt") == [".git/3.png"]  # named, so taken


def test_hidden_shards_and_flat_folders(tmp_path):
    pack(tmp_path / "a.tar", {"a.png": png()})
    (tmp_path / "._a.tar").write_bytes(b"of another system")
    assert find_shards(tmp_path) == [str(tmp_path / "a.tar")]
    scenes = tmp_path / "ade"
    for part in ("images", "annotations"):
        (scenes / part / "training").mkdir(parents=True)
    (scenes / "images/training/._a.jpg").write_bytes(b"of another system")
    (scenes / "images/training/ADE_train_00000001.jpg").write_bytes(png())
    Image.new("L", (64, 64), 1).save(scenes / "annotations/training/ADE_train_00000001.png")
    assert len(segmentation.read_scenes(scenes, "train").items) == 1


# --- paths and patterns ---


def test_existing_paths_are_not_patterns(tmp_path):
    folder = tmp_path / "photos [2024] {a}"
    folder.mkdir()
    (folder / "x.png").write_bytes(png())
    assert keys(folder) == ["x.png"] and len(list_training_sources(folder)) == 1
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar/y.png").write_bytes(png())
    assert keys(tmp_path / "x.tar") == ["y.png"]
    shards = tmp_path / "shards [1]"
    shards.mkdir()
    for name in ("a[1].tar", "a{2}.tar", "b.tar"):
        pack(shards / name, {f"{name}/{name[0]}.png": png()})
        assert find_shards(shards / name) == [str(shards / name)] and len(keys(shards / name)) == 1
    assert len(find_shards(shards)) == len(find_shards(shards / "*.tar")) == len(keys(shards)) == 3
    assert find_shards(shards / "{a[1],b}.tar") == [str(shards / "a[1].tar"), str(shards / "b.tar")]
    assert len(find_shards(f"{tmp_path}/{{shards [[]1],none}}/*.tar")) == 3
    (tmp_path / "list[1].txt").write_text("x.tar/y.png\n")
    assert keys(tmp_path / "list[1].txt") == ["x.tar/y.png"]
    for pattern, words in (("nothing*.tar", "no .tar shards"), ("{a.tar", "braces do not close"), ("*.txt", "no .tar")):
        with pytest.raises(SourceError, match=words):
            list_sources(str(tmp_path / pattern))


def test_brackets_in_both_tools(tmp_path, pictures):
    folder = shutil.copytree(pictures, tmp_path / "photos [2024]")
    assert extract(folder, tmp_path / "out", "--limit", "2").pictures == 2
    finetune(folder, tmp_path / "run", "max_steps=1", f"data.heldout={folder}")


def test_a_folder_with_shards_and_images_is_refused(tmp_path, capsys):
    pack(tmp_path / "a.tar", {"a.png": png()})
    (tmp_path / "b.png").write_bytes(png())
    with pytest.raises(SourceError, match=r"1 .tar shard and 1 image, such as .*b.png"):
        list_sources(str(tmp_path))
    refused(tmp_path, tmp_path / "out", capsys, "1 .tar shard and 1 image", f"data.heldout={tmp_path}")


# --- captions ---


def test_lines_end_at_newlines_only(tmp_path):
    """U+2028 does not end a line in tables, lists, captions or file names."""
    for name in ("a.png", f"b{SEPARATOR}c.png"):
        (tmp_path / name).write_bytes(png())
    lines = [
        {"file_name": "a.png", "text": f"one{SEPARATOR}two"},
        {"file_name": f"b{SEPARATOR}c.png", "text": "x\x85y"},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8", newline="")
    assert [p.caption for p in list_training_sources(tmp_path)] == [f"one{SEPARATOR}two", "x\x85y"]
    (tmp_path / "metadata.jsonl").rename(tmp_path / "list.jsonl")
    assert keys(tmp_path / "list.jsonl") == ["a.png", f"b{SEPARATOR}c.png"]
    (tmp_path / "list.txt").write_text(f"b{SEPARATOR}c.png\n", encoding="utf-8")
    assert keys(tmp_path / "list.txt") == [f"b{SEPARATOR}c.png"]


def test_lines_of_split_files_end_at_newlines_only(tmp_path):
    from cleandift_backbones.evaluation.items import read_lines
    from cleandift_backbones.evaluation.tasks.depth import read_nyu

    (tmp_path / "val.txt").write_text(f"a{SEPARATOR}b\nc\x85d\r\n", encoding="utf-8", newline="")
    assert read_lines(tmp_path / "val.txt", "lines") == [f"a{SEPARATOR}b", "c\x85d"]
    (tmp_path / "a\u00a0b.png").write_bytes(png())
    Image.new("I;16", (64, 64), 900).save(tmp_path / "d.png")
    (tmp_path / "test.txt").write_text("a\u00a0b.png d.png 518.8\n", encoding="utf-8")
    assert len(read_nyu(tmp_path).items) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files_hold_captions(tmp_path, kind):
    """The imagefolder convention of Hugging Face datasets, in the folder or in subfolders."""
    for name in ("a.png", "b.png", "part/c.png", "part/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())

    def write(path, lines):
        if kind == "csv":
            path.write_text("\ufefffile_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in lines), encoding="utf-8")
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(dict(file_name=n, text=t)) + "\n" for n, t in lines))
        else:
            parquet = pytest.importorskip("pyarrow.parquet")
            table = [dict(file_name=n, text=t) for n, t in lines]
            parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(table), path)

    write(tmp_path / f"part/metadata.{kind}", [("d.png", "a dog, brown\nand white")])
    assert [(p.source.name, p.caption) for p in list_training_sources(tmp_path)] == [
        ("a.png", ""), ("b.png", ""), ("d.png", "a dog, brown\nand white")
    ]  # fmt: skip
    write(tmp_path / f"metadata.{kind}", [("b.png", "bee"), ("part/c.png", "sea")])
    left_out = Counter()
    found = list_training_sources(tmp_path, left_out=left_out)
    assert [p.caption for p in found] == ["bee", "sea", "a dog, brown\nand white"]
    assert left_out == {"not in the metadata file": 1}
    (tmp_path / f"metadata.{'csv' if kind == 'jsonl' else 'jsonl'}").write_text("file_name\n")
    with pytest.raises(ValueError, match="has both metadata.jsonl and metadata"):
        list_training_sources(tmp_path)


def test_side_cars(tmp_path):
    names = {"a.png": "a.caption", "B.PNG": "B.TXT", "c.0.5.png": "c.0.5.txt", "d.png": "d.json", "e.png": "e.text"}
    for picture, caption in names.items():
        (tmp_path / picture).write_bytes(png())
        (tmp_path / caption).write_text('{"prompt": "d"}' if caption == "d.json" else f"\ufeff{caption[0]}\n")
    left_out = Counter()
    assert [p.caption for p in list_training_sources(tmp_path, left_out=left_out)] == ["B", "a", "c", "d", ""]
    assert left_out == {".text": 1}
    shard = tmp_path / "s.tar"
    subprocess.run(["tar", "cf", shard, *sorted(os.listdir(tmp_path))], cwd=tmp_path, check=True)
    assert trained(shard, 5)[0] == ["B", "a", "c", "d", ""]
    (tmp_path / "a.caption").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.caption: .*utf-8"):
        list_training_sources(tmp_path)


def test_prompts_of_a_csv_list(tmp_path):
    (tmp_path / "list.csv").write_text('path,key,prompt\na.png,1,"a cat, sitting"\nb.png,,\n')
    entries, _ = list_sources(str(tmp_path / "list.csv"))
    assert [(e.key, e.caption) for e in entries] == [("1", "a cat, sitting"), ("b.png", "")]


@pytest.mark.parametrize("text", ["caption", "distilled", "empty"])
def test_a_run_without_captions_warns(tmp_path, text):
    from finetune_runs import RECIPE

    from cleandift_backbones.distill.recipe import load_recipe
    from cleandift_backbones.distill.setup import list_data
    from cleandift_backbones.distill.summary import data_warnings

    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / f"data/{number}.png").write_bytes(png(number))
        (tmp_path / f"data/{number}.words").write_text("not seen")
    recipe = load_recipe(RECIPE, [f"data.path={tmp_path / 'data'}", "output_dir=x", f"text={text}"])
    data = list_data(recipe, 64)
    assert any("no image has a caption: prompts are empty" in w for w in data_warnings(data, recipe)) == (
        text != "empty"
    )
    assert data.summary.lines() == [
        "data: 2 images, 0 with captions; 1 held out for validation", "left out: 3 files (.words 3)"
    ]  # fmt: skip
    pack(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"a", "b.png": png(), "b.json": b'{"url": "b"}', "c.heic": b""})
    recipe.data.path, recipe.data.heldout = str(tmp_path / "a.tar"), str(tmp_path / "data")
    data = list_data(recipe, 64)
    assert not any("caption" in warning for warning in data_warnings(data, recipe))
    assert data.summary.lines() == [
        "data: 1 shard, 1 of the first 2 images with captions; 3 held out for validation", "left out: 1 file (.heic 1)"
    ]  # fmt: skip
    recipe.data.path = str(pack(tmp_path / "b.tar", {"a.png": png(), "a.words": b"not seen"}))
    warnings = data_warnings(list_data(recipe, 128), recipe)
    assert any("none of the first 1 image has a caption" in warning for warning in warnings) == (text != "empty")
    assert any("1 of 1 image looked at are smaller than 128 px" in warning for warning in warnings)


# --- formats ---

KINDS = {"jfif": "JPEG", "jpe": "JPEG", "webp": "WEBP", "gif": "GIF", "avif": "AVIF", "jp2": "JPEG2000", "tga": "TGA"}


def test_image_formats_are_the_same_everywhere(tmp_path, capsys):
    have = {"avif": features.check("avif"), "jp2": features.check("jpg_2000"), "webp": features.check("webp")}
    names = {}
    for ending, kind in KINDS.items():
        if have.get(ending, True):
            names[f"{ending}.{ending.upper()}"] = encoded(noise(3, 64, 64), kind)
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    for name, data in names.items():
        (folder / name).write_bytes(data)
    for name in ("a.heic", "b.heic", "notes.md", ".hidden.png", "jfif.txt"):
        (folder / name).write_bytes(b"words")
    expected = sorted(names)
    assert [p.source.name for p in list_training_sources(tmp_path / "data")] == expected
    found = labelled.read_image_folder(tmp_path / "data")
    assert [item.key for item in found.items] == [f"class/{name}" for name in expected]
    shard = pack(tmp_path / "a.tar", names)
    assert sorted(keys(shard)) == [name.partition(".")[0] for name in expected]
    assert not trained(shard, len(names))[1]
    extract(tmp_path / "data", tmp_path / "out", "--size", "64")
    assert Features(tmp_path / "out").keys == [f"class/{name}" for name in expected]
    assert not Features(tmp_path / "out").failures
    assert "left out: 4 files (.heic 2, .md 1, hidden 1)" in capsys.readouterr().err


def test_files_with_holes_are_counted_and_not_read_as_they_lie(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.bmp").write_bytes(encoded(Image.new("RGB", (256, 256)), "BMP"))
    for form in ("gnu", "pax"):
        subprocess.run(["cp", "--sparse=always", "b.bmp", "hole.bmp"], cwd=tmp_path, check=True)
        shard = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "-cSf", shard, "hole.bmp", "a.png"], cwd=tmp_path, check=True)
        with tarfile.open(shard) as tar:
            if not tar.getmember("hole.bmp").issparse():
                pytest.skip("no holes on this file system")
        left_out = Counter()
        entries, told = list_sources(str(shard), left_out=left_out)
        assert [entry.key for entry in entries] == ["a"] and not told and left_out == {"sparse files": 1}


def test_shards_of_one_name_in_two_folders_are_told_with_what_helps(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        pack(tmp_path / name / "0.tar", {"k.png": png()})
    with pytest.raises(SourceError, match="give --shard-names"):
        list_sources(str(tmp_path / "*" / "0.tar"))
    with pytest.raises(SourceError, match="rename one of the shards"):
        list_sources(str(tmp_path / "*" / "0.tar"), shard_names=True)


def test_a_run_trains_on_a_list(tmp_path):
    """The same list as an extraction takes."""
    from cleandift_backbones.distill.recipe import load_recipe
    from cleandift_backbones.distill.setup import list_data

    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png())
    lines = [json.dumps(dict(path=f"{number}.png", caption=f"image {number}")) for number in (2, 0)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    given = [f"data.path={tmp_path / 'list.jsonl'}", f"data.heldout={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    data = list_data(load_recipe("configs/finetune/cleandift_tiny.yaml", given), 64)
    assert [(one.key, one.caption) for one in data.pictures] == [("2.png", "image 2"), ("0.png", "image 0")]
    assert "2 images, 2 with captions; 3 held out" in data.summary.lines()[0]
