"""Packed training sets, and the command that trains teacher and student on one within a time."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from test_training import tool, write_split

from cleandift_backbones.data.captioned import sources_of
from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.utils.errors import FileTakenError, InputError, MissingFileError, StateError
from cleandift_backbones.utils.locks import hold
from cleandift_backbones.utils.seeding import step_generator
from tools.tiny.emoji_folder import load_pictures
from tools.tiny.picture_sets import PictureSets
from tools.tiny.training import CHECKPOINT

pack, tiny = tool("pack_pictures"), tool("train_tiny")


def photo(number: int, size: tuple[int, int], form: str) -> bytes:
    """Smooth colours that differ between images."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 12 * number)], -1).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, form, **dict(quality=90) if form == "WEBP" else {})
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """photos.tar: WebP of 48 x 32, 32 x 48, 32 x 32; heldout/: PNG of 64 x 40; emoji/: RGBA of 32 x 32."""
    folder = tmp_path_factory.mktemp("sources")
    with wds.TarWriter(str(folder / "photos.tar")) as writer:
        for number, size in enumerate([(48, 32), (32, 48), (32, 32)] * 4):
            told = {"text": f"a photo of thing {number}", "label": "thing"}
            writer.write({"__key__": f"{number:06}", "webp": photo(number, size, "WEBP"), "json": told})
    (folder / "heldout").mkdir()
    for number in range(4):
        (folder / f"heldout/{number}.png").write_bytes(photo(number, (64, 40), "PNG"))
        (folder / f"heldout/{number}.txt").write_text(f"held out, {number}")
    write_split(folder / "emoji/train", 8, 32, 0)
    write_split(folder / "emoji/heldout", 4, 32, 1)
    return folder


def packed(sources: Path, out: Path, *options: str) -> Path:
    given = ["--photos", sources / "photos.tar", "--photos-heldout", sources / "heldout", "--data", sources / "emoji"]
    assert pack.main([*map(str, given), "--out", str(out), "--size", "32", *options]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_of_the_right_size_are_copied_and_keep_their_captions(sources, tmp_path, capsys):
    out = packed(sources, tmp_path / "out", "--keep-aspect")
    before, after = (sources_of(place) for place in (sources / "photos.tar", out / "photos/train/*.tar.gz"))
    assert [(p.caption, p.source) for p in before] == [(p.caption, p.source) for p in after]
    said = capsys.readouterr().out
    assert "12 images, 12 copied unchanged" in said and "4 images, " in said
    heldout = sources_of(out / "photos/heldout/*.tar.gz")
    assert [p.caption for p in heldout] == [f"held out, {number}" for number in range(4)]
    assert {Image.open(io.BytesIO(p.source)).size for p in heldout} == {(48, 32)}  # 64 x 40 is longer than 1.5 : 1
    assert sorted(files(out)) == [f"{name}/0000.tar.gz" for name in
                                  ("emoji/heldout", "emoji/train", "photos/heldout", "photos/train")]  # fmt: skip


def test_squares_are_the_middle_of_the_image(sources, tmp_path):
    out = packed(sources, tmp_path / "out", "--quality", "100")
    before, after = (sources_of(place) for place in (sources / "photos.tar", out / "photos/train/*.tar.gz"))
    for one, other in zip(before, after, strict=True):
        whole, square = (Image.open(io.BytesIO(picture.source)).convert("RGB") for picture in (one, other))
        left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
        assert np.array_equal(np.asarray(whole)[top : top + 32, left : left + 32], np.asarray(square))


def test_equal_inputs_give_equal_bytes_in_parts_of_limited_size(sources, tmp_path):
    options = ["--keep-aspect", "--part-mb", "0.006"]
    one, other = (files(packed(sources, tmp_path / name, *options)) for name in ("one", "other"))
    assert one == other and max(map(len, one.values())) <= 6000
    parts = sorted(name for name in one if name.startswith("photos/train"))
    assert len(parts) > 1 and parts[:2] == ["photos/train/0000.tar.gz", "photos/train/0001.tar.gz"]
    both = sources_of(sources / "photos.tar"), sources_of(tmp_path / "one/photos/train/*.tar.gz")
    assert [p.caption for p in both[0]] == [p.caption for p in both[1]]
    with tarfile.open(tmp_path / "one" / parts[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_packed_emoji_are_read_like_the_folder(sources, tmp_path):
    out = packed(sources, tmp_path / "out", "--quality", "100", "--heldout", "2")
    rgba, entries = load_pictures(sources / "emoji/train")
    other, told = load_pictures(out / "emoji/train")
    assert entries == told and torch.equal(rgba[:, 3], other[:, 3])
    assert torch.equal(rgba[:, :3] * (rgba[:, 3:] > 0), other[:, :3] * (other[:, 3:] > 0))  # what one sees of them
    assert len(load_pictures(out / "emoji/heldout", size=16)[0]) == 2
    assert len(sources_of(out / "photos/heldout/*.tar.gz")) == 2
    for told, message in [
        ("{broken", "no JSON"),
        ('{"text": 3}', "has no file_name, text"),
        (None, "has no file_name"),
    ]:
        with wds.TarWriter(str(out / "emoji/train/0000.tar")) as writer:
            beside = {} if told is None else {"json": told.encode()}
            writer.write({"__key__": "0", "png": photo(0, (32, 32), "PNG")} | beside)
        with pytest.raises(InputError, match=f"0000.tar:0.*{message}"):
            load_pictures(out / "emoji/train")
    (out / "emoji/train/0000.tar.gz").unlink()
    wds.TarWriter(str(out / "emoji/train/0000.tar")).close()
    with pytest.raises(InputError, match="hold no pictures"):
        load_pictures(out / "emoji/train")
    (out / "emoji/train/0000.tar.gz").write_bytes(b"damage")
    with pytest.raises(InputError, match=r"0000.tar.gz is damaged"):
        load_pictures(out / "emoji/train")


def test_unreadable_images_are_left_out_and_counted(sources, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo(1, (40, 40), "PNG"))
    (folder / "b.png").write_bytes(b"no image")
    assert pack.main(["--photos", str(folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "1 image, 1 left out" in said.out and "b.png: not an image" in said.err
    (folder / "a.png").unlink()
    assert_refused(["--photos", str(folder), "--out", str(tmp_path / "none")], "none of 1 image can be read", capsys)
    assert not files(tmp_path / "none")


def assert_refused(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        pack.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_packing_refuses(sources, tmp_path, capsys):
    given = ["--photos", str(sources / "photos.tar"), "--out", str(tmp_path / "out")]
    assert_refused(given[2:], "nothing to pack", capsys)
    assert_refused([*given, "--quality", "0"], "--quality 0", capsys)
    assert_refused([*given, "--part-mb", "0.001"], "give a larger --part-mb", capsys)
    with hold(tmp_path / "out"):
        assert_refused(given, "is in use", capsys)
    own = tmp_path / "out/photos/train"
    own.mkdir(parents=True)
    (own / "0000.tar.gz").write_bytes(b"somebody's")
    assert_refused(given, "photos/train exists", capsys)
    assert files(tmp_path / "out") == {"photos/train/0000.tar.gz": b"somebody's"}


def test_autocast_changes_no_training_image(sources, tmp_path):
    """In bf16 the places that an emoji is sampled at would be off by half a pixel."""
    sets = PictureSets(str(sources / "emoji"), str(sources / "photos.tar"), str(sources / "heldout"))
    sets.to(torch.device("cpu"))
    plain = sets.batch(0, 8, 0, step_generator(torch.device("cpu"), 0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        other = sets.batch(0, 8, 0, step_generator(torch.device("cpu"), 0))[0]
    assert other.dtype == torch.float32 and torch.equal(plain, other)


# ------------------------------------------------------------------------------------------------- training in time


@pytest.fixture(scope="module")
def vae(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    where = ["--data", str(sources / "emoji"), "--out", str(out), "--device", "cpu"]
    assert tool("train_vae").main([*where, "--crop", "16", "--max-steps", "1", "--batch-size", "2"]) == 0
    path = out / "vae/config.json"
    config = json.loads(path.read_text()) | {"scaling_factor": ARCHITECTURES["tiny"].vae["scaling_factor"]}
    path.write_text(json.dumps(config))
    return out / "vae"


def command(place: Path, vae: Path, out: Path) -> list[str]:
    student = ["data.size=64", "batch_size=2", "num_workers=0", "max_steps=4", "checkpoint_every=1", "sample_every=0"]
    teacher = ["--batch-size", "4", "--eval-steps", "100", "--max-steps", "3", "--sample-rows", "2"]
    where = ["--packed", str(place), "--vae", str(vae), "--out", str(out), "--device", "cpu", "--file-mb", "16"]
    return [*where, "--minutes", "30", "--student", *student, "validate_every=100", "--teacher", " ".join(teacher)]


def inside(calls: list[list[str]], stop: bool):
    """`train_tiny.run` in this process; with `stop` the first run of each training is stopped after a step or two."""

    def run(name: str, *arguments: object, minutes: float | None = None) -> int:
        given = [name, *map(str, arguments)]
        if stop and name not in [call[0] for call in calls]:
            given += {"train_teacher": ["--stop-minutes", "1e-6"], "finetune": ["stop_after=2"]}.get(name, [])
        calls.append(given)
        return tool(name).main(given[1:])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_teacher_and_student_of_a_packed_set(sources, vae, tmp_path, monkeypatch, stop):
    import timm

    place, out, calls = packed(sources, tmp_path / "packed"), tmp_path / "out", []
    monkeypatch.setattr(tiny, "run", inside(calls, stop))
    assert tiny.main(command(place, vae, out)) == 0
    trainings = ["train_teacher"] * (1 + stop), ["finetune"] * (1 + stop)
    assert [call[0] for call in calls] == [*trainings[0], "convert", *trainings[1], "convert"]
    last = [json.loads(line)["step"] for line in (out / "teacher/log.jsonl").open()][-1]
    assert last == (1 if stop else 3)  # stopped after its first step, and written as it was then
    for name in ("dift_tiny", "cleandift_tiny"):
        sources_ = dict(unet=str(out / f"{name}.safetensors"))
        model = timm.create_model(name, pretrained=True, features_only=True, sources=sources_)
        assert torch.isfinite(model(torch.zeros(1, 3, 64, 64))[-1]).all()
    parts = sorted((out / "results").iterdir())
    assert [path.name for path in parts] == [f"results.tar.{n:03}" for n in range(len(parts))] and len(parts) <= 8
    assert max(path.stat().st_size for path in parts) <= 16e6
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in parts))) as tar:
        names = set(tar.getnames())
    assert {"teacher/unet", "teacher/samples.png", "student/log.jsonl", "cleandift_tiny.safetensors"} <= names
    assert f"teacher/{CHECKPOINT}" not in names
    assert tiny.main(command(place, vae, out)) == 0 and len(calls) == 4 + 2 * stop  # nothing is left to do


def test_a_training_that_fails_is_an_error_and_what_there_is_is_kept(sources, vae, tmp_path, monkeypatch, capsys):
    place, out = packed(sources, tmp_path / "packed"), tmp_path / "out"
    (out / "teacher").mkdir(parents=True)
    (out / "teacher/log.jsonl").write_text("{}\n")
    monkeypatch.setattr(tiny, "run", lambda *_, **__: 2)
    with pytest.raises(SystemExit):
        tiny.main(command(place, vae, out))
    assert "train_teacher ended with 2" in capsys.readouterr().err
    with tarfile.open(out / "results/results.tar.000") as tar:
        assert tar.getnames() == ["teacher/log.jsonl"]
    with pytest.raises(StateError, match="ended with 2"):
        tiny.check(2, out, "finetune")
    with pytest.raises(StateError, match="no time is left for the student: the same command goes on"):
        tiny.train_student(tiny.parse(command(place, vae, out)), -0.1)


def test_a_tool_that_takes_too_long_is_stopped(monkeypatch, tmp_path):
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(tiny, "TOOLS", tmp_path)
    assert tiny.run("wait", minutes=0.005) == -15


def test_what_the_training_command_refuses(sources, tmp_path, capsys):
    where = ["--vae", "vae", "--out", str(tmp_path / "out"), "--packed"]
    with pytest.raises(SystemExit):
        tiny.main([*where, str(sources), "--minutes", "4"])
    assert "leaves the teacher no time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tiny.main([*where, str(sources), "--teacher", "--lr '1e-3"])
    assert "No closing quotation" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="neither photos/ nor emoji/"):
        tiny.sets(tmp_path / "empty")
    assert not (tmp_path / "out").exists() and issubclass(FileTakenError, OSError)
