"""Mirrors of the Hub that leave out headers, or send files only whole."""

import logging

import pytest
import standins
import timm
import torch

from cleandift_backbones.checkpoints import CheckpointError, memo
from cleandift_backbones.checkpoints.hub import HubError, HubFile
from cleandift_backbones.checkpoints.remote import RemoteFile

FULL = "CompVis/cleandift/cleandift_test_full.safetensors"


@pytest.fixture
def mirror(hub):
    hub.place("CompVis/cleandift", {"cleandift_test_full.safetensors": standins.compvis_full()})
    hub.place("mirror/sd", standins.diffusers_files())
    return hub


def read(**options):
    file = RemoteFile(HubFile("CompVis/cleandift", "cleandift_test_full.safetensors"))
    return file, file.get_tensor("timestep")


@pytest.mark.parametrize(
    "left_out, size",
    [
        ({"HEAD Content-Length", "HEAD X-Linked-Size"}, True),
        ({"HEAD Content-Length", "HEAD X-Linked-Size", "GET Content-Range"}, None),
        ({"HEAD ETag", "HEAD X-Linked-Etag", "HEAD X-Repo-Commit", "GET Accept-Ranges"}, True),
    ],
)
def test_tensors_are_read_where_headers_are_missing(mirror, left_out, size):
    mirror.left_out = left_out
    file, timestep = read()
    assert timestep == standins.TIMESTEP and file.size == (size and len(standins.compvis_full()))


def test_a_model_from_a_mirror_that_gives_no_size(mirror):
    mirror.left_out = {"HEAD Content-Length", "HEAD X-Linked-Size"}
    sources = dict(unet=FULL, text_encoder="mirror/sd")
    model = timm.create_model("test_cleandift", pretrained=True, sources=sources)
    assert model.timestep == standins.TIMESTEP


def test_what_is_no_safetensors_file_is_still_told(mirror):
    mirror.place("me/x", {"x.safetensors": b"<html>" + b"x" * 20_000, "short.safetensors": b"12345678"})
    for left_out in (set(), {"HEAD Content-Length", "HEAD X-Linked-Size", "GET Content-Range"}):
        mirror.left_out = left_out
        with pytest.raises(CheckpointError, match=r"me/x/x.safetensors \(.*bytes\) is not a safetensors file"):
            RemoteFile(HubFile("me/x", "x.safetensors"))


def test_a_mirror_without_ranges_sends_the_file_whole(mirror, caplog):
    mirror.ranges = False
    with pytest.raises(HubError, match="does not serve ranges"):
        read()
    sources = dict(unet=FULL, text_encoder="mirror/sd")
    model = timm.create_model("test_cleandift", pretrained=True, sources=sources)
    assert model.timestep == standins.TIMESTEP and model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_the_timestep_is_not_remembered_for_an_unknown_version(mirror, caplog):
    """Without a commit and an ETag nobody knows whether the file is still the one that was read."""
    place, given = HubFile("CompVis/cleandift", "cleandift_test_full.safetensors"), iter([1.0, 2.0, 3.0, 4.0])

    def remembered():
        return memo.remember_of("number", place, lambda: torch.tensor(next(given))).item()

    mirror.left_out = {"HEAD X-Repo-Commit"}
    with caplog.at_level(logging.WARNING):
        assert [remembered(), remembered()] == [1, 1]  # the ETag says that it is the same file
        mirror.left_out = {"HEAD X-Repo-Commit", "HEAD ETag", "HEAD X-Linked-Etag"}
        assert [remembered(), remembered()] == [2, 3]
