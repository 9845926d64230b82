"""Files and folders on disk: written aside, and nothing of others is lost."""

import os

import pytest
import torch
from disk_faults import no_more_files
from safetensors.torch import save_file

from cleandift_backbones.utils.atomic import DamagedFileError, leftovers, open_tensors, replacing, set_aside
from cleandift_backbones.utils.errors import FileError, FileTakenError, MissingFileError


def test_damage_is_told_from_what_cannot_be_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(9)}, path)
    with no_more_files(), pytest.raises(FileError, match="a.safetensors cannot be read .Too many open files.") as error:
        open_tensors(path)
    assert not isinstance(error.value, FileNotFoundError) and path.exists()
    with pytest.raises(MissingFileError, match="nowhere does not exist"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(FileError, match="cannot be read"):
        open_tensors(tmp_path)
    for cut in (0, 5, 40, path.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DamagedFileError, match="cut is damaged"):
            open_tensors(tmp_path / "cut")


def test_set_aside_overwrites_nothing(tmp_path):
    for number in range(3):
        (tmp_path / "a").write_text(str(number))
        set_aside(tmp_path / "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a.damaged": "0", "a.damaged-2": "1", "a.damaged-3": "2"
    }  # fmt: skip
    set_aside(tmp_path / "a")  # another process was faster


def test_what_others_put_into_a_folder_is_kept(tmp_path):
    folder = tmp_path / "native"
    for name in ("config.json", "notes.txt", "model-1.safetensors", "sub/mine", "unet/weights", "unet/mine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "link").symlink_to(tmp_path)
    with replacing(folder, written=lambda name: name.startswith("model-")) as aside:
        (aside / "unet").mkdir(parents=True)
        for name in ("config.json", "unet/weights"):
            (aside / name).write_text("new")
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    new = {"config.json": "new", "unet/weights": "new"}
    assert found == new | {"notes.txt": "old", "sub/mine": "old", "unet/mine": "old"}
    assert (folder / "link").is_symlink() and os.listdir(tmp_path) == ["native"]


def test_a_file_does_not_give_way_to_a_folder(tmp_path):
    (tmp_path / "encoder").write_text("mine")
    with pytest.raises(FileTakenError, match="encoder is a file"), replacing(tmp_path / "encoder") as aside:
        aside.mkdir()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileTakenError, match="folder is a folder"), replacing(tmp_path / "folder") as aside:
        aside.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["encoder", "folder"] and (tmp_path / "encoder").read_text() == "mine"


def test_leftovers_are_known_by_name(tmp_path):
    names = [".a-1.png.0123456789ab.part", ".b-1.png.0123456789ab.part", ".a-1.png.part", "a-1.png"]
    for name in names:
        (tmp_path / name).write_text("x")
    assert [path.name for path in leftovers(tmp_path, r"a-\d\.png")] == names[:1]


def test_sizes_are_readable():
    from cleandift_backbones.utils.atomic import readable_size

    sizes = {0: "0 bytes", 640: "640 bytes", 1_400_000: "1.4 MB", 9_960: "10 kB", 999_600: "1.0 MB", 23e9: "23 GB"}
    assert {size: readable_size(size) for size in sizes} == sizes
