"""Unusual and malicious image files: decoded, or reported by name, in every tool; bounded time and memory."""

import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from extract_runs import extract, noise
from finetune_runs import finetune, refused
from picture_bytes import encoded
from PIL import Image, PngImagePlugin

from cleandift_backbones.data.batches import DecodeOptions, decode, is_transparent, read_rgba
from cleandift_backbones.data.images import ImageError, read_image, to_input
from cleandift_backbones.data.loading import Resize
from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.evaluation import items
from cleandift_backbones.evaluation.tasks import depth, segmentation
from cleandift_backbones.visualize.pictures import open_picture
from tools.tiny.emoji_folder import load_pictures


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width=20_000, height=20_000, colours=6):
    """A PNG of less than a hundred bytes whose header declares width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- too many pixels ---


def test_an_image_of_400_megapixels_is_reported_and_left_out(tmp_path, caplog, capsys):
    """Also where headers are read to find transparent images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        noise(number, 64, 64, "RGBA").save(folder / f"{number}.png")
    (folder / "01bomb.png").write_bytes(bomb())
    options = ["max_steps=2", "batch_size=4", "data.background=random"]
    finetune(folder, tmp_path / "run", *options)
    assert "01bomb.png: too large to be safe" in caplog.text
    refused(folder, tmp_path / "none", capsys, "more than data.max_broken=0", "data.max_broken=0", *options)


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_reported_by_name_in_every_reader(tmp_path, strict):
    path = tmp_path / "bomb.png"
    # With warnings as errors the limit is half as high.
    path.write_bytes(bomb(10_000, 10_000) if strict else bomb())
    picture = ImageSource("bomb.png", str(path))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "bomb.png", "text": "", "style": "", "concept": "", "subgroup": ""}\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        for call in (
            lambda: read_image(path),
            lambda: read_image(path.read_bytes(), name="bomb.png"),
            lambda: decode(picture, DecodeOptions(64), torch.Generator()),
            lambda: read_rgba(picture, 64),
            lambda: load_pictures(tmp_path, 64),
            lambda: items.picture_size(path),
            lambda: items.check_answers([(path, path)], "masks"),
            lambda: segmentation.read_mask(path, 3),
            lambda: depth.read_depth(path),
            lambda: open_picture(path),
        ):
            with pytest.raises(ValueError, match="bomb.png: too large to be safe"):
                call()
        assert not is_transparent(picture)


def test_out_of_memory_is_reported_by_name(tmp_path, monkeypatch):
    noise(0, 64, 64).save(tmp_path / "a.png")

    def full(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 14155776000 bytes.")

    monkeypatch.setattr(torch.nn.functional, "interpolate", full)
    with pytest.raises(ImageError, match="a.png: too large for this machine's memory"):
        decode(ImageSource("a.png", str(tmp_path / "a.png")), DecodeOptions(32), torch.Generator())
    with pytest.raises(SystemExit):
        extract(tmp_path, tmp_path / "out", "--size", "32", "--strict")


def test_uploads_have_a_lower_limit():
    """Checked before any pixel is decoded."""
    with pytest.raises(ImageError, match=r"mine.png: too large: 13000 x 13000 pixels are more than the 134 million"):
        open_picture(bomb(13_000, 13_000), "mine.png")


@pytest.mark.slow
@pytest.mark.parametrize("mode, copies", [("RGB", 1.3), ("RGBA", 2.6)])
def test_memory_for_a_large_image(tmp_path, mode, copies):
    """Peak memory, in copies of the decoded image at 4 bytes per pixel."""
    side = 8000
    Image.new(mode, (side, side), (90, 80, 70, 60)[: len(mode)]).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from cleandift_backbones.data.decoding import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); image = read_image(sys.argv[1]); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < copies * 4 * side * side


# --- texts in PNGs ---


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "behind"])
def test_long_texts_in_a_png_do_not_hide_its_pixels(tmp_path, kind):
    """ComfyUI writes its workflows like this."""
    image, info = noise(5, 70, 66, "RGBA"), PngImagePlugin.PngInfo()
    words = "workflow " * 200_000
    if kind == "iTXt":
        info.add_itxt("workflow", words, zip=True)
    elif kind == "tEXt":  # several, more than Pillow takes together
        for number in range(4):
            info.add_text(f"part{number}", "x" * 2**24)
        info.add_text("last", "x" * 2**10)
    else:
        info.add_text("workflow", words, zip=True)
    data = encoded(image, pnginfo=info)
    if kind == "behind":  # texts may come after the pixels
        data = encoded(image)
        text = b"workflow\0\0" + zlib.compress(words.encode())
        data = data[:-12] + chunk(b"zTXt", text) + data[-12:]
    path = tmp_path / "comfy.png"
    path.write_bytes(data)
    expected = np.asarray(read_image(encoded(image)))
    assert (np.asarray(read_image(path)) == expected).all()
    assert (np.asarray(read_image(data, name="shard:comfy")) == expected).all()
    picture = ImageSource("comfy.png", str(path))
    assert is_transparent(picture) and torch.equal(
        read_rgba(picture, 32), read_rgba(ImageSource("", data=encoded(image)), 32)
    )
    assert open_picture(data, "comfy.png").note == open_picture(path).note == ""
    assert items.picture_size(path) == (66, 70)
    items.check_answers([(path, path)], "masks")
    with pytest.raises(ImageError, match="comfy.png: truncated"):
        read_image(data[: len(data) // 2 if kind != "behind" else 900], name="comfy.png")


def test_orientation_is_kept_when_texts_are_skipped():
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2**21, zip=True)
    assert read_image(encoded(noise(5, 90, 66), pnginfo=info, exif=exif)).size == (66, 90)


# --- thin pictures ---


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (20_000, 3)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_thin_images_are_cropped_before_they_are_resized(tmp_path, size, crop):
    noise(1, *size).save(tmp_path / "thin.png")
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = ImageSource("thin", str(tmp_path / "thin.png"))
    found = decode(picture, DecodeOptions(768, crop), torch.Generator().manual_seed(0))
    assert found.shape == (3, 768, 768) and found.abs().max() <= 1
    assert Resize("crop", (768, 768))(read_image(tmp_path / "thin.png", min_side=1)).shape == (3, 768, 768)
    assert to_input(read_image(tmp_path / "thin.png", min_side=1), (768, 600), "pad").shape == (3, 768, 600)
    assert time.perf_counter() - clock < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("size", [(1500, 20), (20, 1500), (700, 33), (64, 2000), (1_100_000, 2)])
def test_cut_first_is_the_same_as_resized_first(size):
    """To 5e-4: torch computes sampling positions in float32."""
    image, side = noise(2, *size), 48
    whole = to_input(image, mode="keep", mean=(0, 0, 0), std=(1, 1, 1))
    new = [max(side, round(length * side / min(size))) for length in (size[1], size[0])]
    if max(size) < 10_000:
        wanted = torch.nn.functional.interpolate(whole[None], new, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = ((length - side) // 2 for length in new)
        wanted = wanted[:, top : top + side, left : left + side]
    else:
        wanted = to_input(whole[:, :, 550_000 - 500 : 550_000 + 500], side, "crop", (0, 0, 0), (1, 1, 1))
    found = to_input(image, side, "crop", mean=(0, 0, 0), std=(1, 1, 1))
    assert (found - wanted).abs().max() < 5e-4


def test_a_thin_transparent_image_is_padded_after_resizing(tmp_path):
    Image.new("RGBA", (60_000, 2), (200, 0, 0, 255)).save(tmp_path / "thin.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rgba = read_rgba(ImageSource("thin", str(tmp_path / "thin.png")), 64)
    assert rgba.shape == (4, 64, 64) and rgba[3].float().mean() < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_huge_images_are_resized_in_strips_in_training(tmp_path, monkeypatch):
    """Equal up to rounding."""
    noise(1, 300, 200).save(tmp_path / "a.png")
    picture = ImageSource("a", str(tmp_path / "a.png"))
    plain = decode(picture, DecodeOptions(64), torch.Generator().manual_seed(0))
    monkeypatch.setattr("cleandift_backbones.data.batches.HUGE", 1000)
    strips = decode(picture, DecodeOptions(64), torch.Generator().manual_seed(0))
    assert not torch.equal(plain, strips) and torch.allclose(plain, strips, atol=1e-5)


# --- damaged TIFFs ---


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_a_tiff_that_declares_a_million_rows_is_refused_at_once(tmp_path, dtype):
    """Pillow fills missing rows with zeros, which took 17 s and gigabytes for a file of 30 kB."""
    data = bytearray(encoded(Image.fromarray(np.zeros((80, 96), dtype)), "TIFF"))
    place = data.index(struct.pack("<HHI", 257, 4, 1))  # ImageLength
    data[place + 8 : place + 12] = struct.pack("<I", 1_704_016)
    (tmp_path / "a.tif").write_bytes(data)
    clock = time.perf_counter()
    with pytest.raises(ImageError, match=r"a.tif: truncated or damaged \(96 x 1704016 pixels are declared"):
        read_image(tmp_path / "a.tif")
    assert time.perf_counter() - clock < 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "CMYK"])
def test_whole_tiffs_are_read(compression, mode):
    if compression == "jpeg" and mode in ("1", "P"):
        pytest.skip("JPEG holds neither")
    image = noise(3, 423, 577, "L" if mode == "P" else "RGB").convert(mode)
    data = encoded(image, "TIFF", compression=compression)  # in several strips, but for the smallest
    assert read_image(data).size == (423, 577)


def test_formats_that_run_other_programs_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (64, 64)), "EPS"))
    with pytest.raises(ImageError, match="a.png: not an image in a supported format"):
        read_image(tmp_path / "a.png")
