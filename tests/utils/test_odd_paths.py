"""Paths that the system refuses to look at, and files that are none: one error of the package, and no waiting."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from extract_runs import RANDOM, ROOT, extract
from PIL import Image
from safetensors.torch import save

from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints.hub import parse_source
from cleandift_backbones.data.decoding import ImageError, read_image
from cleandift_backbones.data.images import check_folder
from cleandift_backbones.data.listing import SPECIAL, list_folder
from cleandift_backbones.data.shards import scan, shards_of
from cleandift_backbones.data.sources import list_training_sources
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.evaluation.items import require_folder
from cleandift_backbones.evaluation.tasks.pairs import read_pairs
from cleandift_backbones.features import Features
from cleandift_backbones.features.store import check_out
from cleandift_backbones.utils.atomic import open_tensors
from cleandift_backbones.utils.errors import CleanDIFTError, FileError, InputError
from cleandift_backbones.utils.records import read_bytes

LONG = "n" * 300  # more than any file system takes
DOORS = {
    "output": check_folder,
    "features": check_out,
    "images": list_training_sources,
    "recipe": load_recipe,
    "weights": checkpoints.open_checkpoint,
    "weights file": checkpoints.open_weights,
    "source": parse_source,
    "data set": lambda path: require_folder(path, [], "anything"),
    "pairs": read_pairs,
    "image": read_image,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_name_that_is_too_long_is_an_error_of_the_package(door, tmp_path):
    with pytest.raises(CleanDIFTError, match=f"{LONG}.*too long"):
        DOORS[door](tmp_path / LONG)


def test_an_image_that_cannot_be_looked_at_is_one_broken_image(tmp_path):
    for name in (LONG, "a\0b"):
        with pytest.raises(ImageError, match="cannot be opened"):
            read_image(tmp_path / name)


def test_folders_whose_names_are_no_utf8(tmp_path, capfd):
    (place := tmp_path / os.fsdecode(b"\xff")).mkdir()
    for number in range(2):
        Image.new("RGB", (70, 70)).save(place / f"{number}.png")
    (place / "2.png").write_bytes(b"no image")
    extract(place, tmp_path / "out", "--pool", "mean")
    assert "out holds the features of 2 images" in capfd.readouterr().out
    (failure,) = Features(tmp_path / "out").failures
    assert failure["path"] == str(place / "2.png")
    with pytest.raises(FileError, match="no UTF-8"):
        check_folder(place / "out")
    (place / "w.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(FileError, match="no UTF-8"):  # and not a DamagedFileError, after which files are set aside
        open_tensors(place / "w.safetensors")
    with pytest.raises(InputError, match=r"no UTF-8; rename"):
        load_recipe("configs/finetune/cleandift_tiny.yaml", [f"data.path={place}", "output_dir=r"])


def test_names_that_a_terminal_cannot_show_stop_no_command(tmp_path):
    name = tmp_path / "фото"
    name.mkdir()
    Image.new("RGB", (70, 70)).save(name / "a.png")
    given = [*RANDOM, "--data", name, "--out", tmp_path / "out-é", "--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, ROOT / "tools/extract.py", *given], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert r"out-\xe9 holds the features of 1 image" in found.stdout


@pytest.mark.parametrize("door", ["weights", "source"])
def test_the_home_of_a_user_that_does_not_exist(door):
    with pytest.raises(CleanDIFTError, match="~no-such-user"):
        DOORS[door]("~no-such-user/x")


def test_pipes_and_sockets_are_left_out_and_counted(tmp_path):
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    for name in ("a.txt", "p.png", "metadata.jsonl", "p.tar"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.png"))
        found = list_folder(tmp_path)
        assert found.left_out == {SPECIAL: 5}
    assert found.images == [tmp_path / "a.png"] and not found.captions and not found.metadata
    assert shards_of(tmp_path) == [], "the pipe p.tar is no shard"
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    found = list_folder(tmp_path).images
    assert {tmp_path / "gone.png", tmp_path / "self.png"} < {*found}, "links to nothing count as broken images"


def test_a_pipe_that_is_named_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(pipe := tmp_path / "list.txt")
    with pytest.raises(FileError, match=r"list\.txt is a pipe"):
        read_bytes(pipe)
    with pytest.raises(ImageError, match="a pipe"):
        read_image(pipe)
    assert "is a pipe" in scan(pipe).damage


def test_a_list_from_the_shell_may_be_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"a.png\n")
    os.close(writer)
    assert read_bytes(f"/dev/fd/{reader}") == b"a.png\n"
    os.close(reader)
