"""Reading pictures of every kind, and turning them into model inputs."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from cleandift_backbones.data.images import ImageError, read_image, to_input, to_tensor


def gradient(height=80, width=96):
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), np.full_like(x, 77)], 2).astype(np.uint8)


def test_rgb_is_read_unchanged(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (96, 80)
    assert (np.asarray(image) == gradient()).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_colour_modes(tmp_path, mode):
    source = Image.fromarray(gradient()).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.save(path)
    assert np.abs(np.asarray(read_image(path), float) - np.asarray(source.convert("RGB"), float)).max() == 0


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), float) - gradient()).mean() < 4


def test_transparency_is_composited(tmp_path):
    rgba = np.zeros((70, 70, 4), np.uint8)
    rgba[:, 35:] = (200, 100, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png", background=(0, 0, 255)), float)
    assert (pixels[0, 0] == (0, 0, 255)).all()
    expected = np.array([200, 100, 0]) * 128 / 255 + np.array([0, 0, 255]) * 127 / 255
    assert np.abs(pixels[0, 60] - expected).max() <= 1


def test_palette_and_grey_transparency(tmp_path):
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([10, 20, 30, 200, 210, 220])
    palette.paste(1, (0, 0, 64, 32))
    palette.save(tmp_path / "p.png", transparency=0)
    pixels = np.asarray(read_image(tmp_path / "p.png", background=(1, 2, 3)))
    assert (pixels[63, 0] == (1, 2, 3)).all() and (pixels[0, 0] == (200, 210, 220)).all()
    Image.new("LA", (64, 64), (50, 0)).save(tmp_path / "la.png")
    assert (np.asarray(read_image(tmp_path / "la.png", background=(9, 8, 7))) == (9, 8, 7)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name))
    assert (pixels[..., 0] == np.rint(grey / 257)).all() and (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff(tmp_path, top):
    values = np.linspace(0, top, 64 * 64, dtype=np.float32).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = np.asarray(read_image(tmp_path / "a.tif"))
    assert pixels.min() == 0 and pixels.max() == 255 and pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (-3.0, "scale them"), (999, "scale")]
)
def test_bad_float_pixels(tmp_path, value, words):
    values = np.full((64, 64), 0.5, np.float32)
    values[3, 5] = value
    Image.fromarray(values).save(tmp_path / "bad.tif")
    with pytest.raises(ImageError, match=rf"bad\.tif.*{words}"):
        read_image(tmp_path / "bad.tif")


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be shown rotated by 90 degrees clockwise
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.size == (80, 96) and (np.asarray(image) == np.rot90(gradient(), -1)).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((5, 5)) == (255, 0, 0)


def test_unusable_files_name_themselves_and_the_remedy(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all")
    Image.fromarray(gradient(200, 200)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    Image.new("RGB", (63, 200)).save(tmp_path / "small.png")
    for name, words in {
        "empty.png": "empty",
        "text.png": "not an image",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "small.png": "63x200 .* at least 64",
        "missing.png": "no such file",
    }.items():
        with pytest.raises(ImageError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="folder"):
        read_image(tmp_path)
    assert issubclass(ImageError, ValueError)


def test_to_tensor_takes_all_kinds():
    array = gradient()
    expected = torch.from_numpy(array).permute(2, 0, 1) / 255
    for image in (Image.fromarray(array), array, array / 255.0, expected, torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.allclose(to_tensor(image), expected, atol=1e-6) and to_tensor(image).dtype == torch.float32


@pytest.mark.parametrize(
    "image",
    [
        np.full((64, 64, 3), np.nan),
        np.full((64, 64, 3), 2.0),
        np.zeros((64, 64, 4), np.uint8),
        torch.zeros(1, 64, 64),
        torch.full((3, 64, 64), float("inf")),
        torch.zeros(3, 64, 64, dtype=torch.int64),
    ],
)
def test_to_tensor_refuses(image):
    with pytest.raises(ImageError):
        to_tensor(image)


def test_to_input_modes():
    array = gradient(64, 128)
    assert to_input(array, 32).shape == (3, 32, 32)
    assert to_input(array, (40, 56)).shape == (3, 40, 56)
    keep = to_input(array, mode="keep", mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(keep, to_tensor(array))
    padded = to_input(array, 32, "pad")
    assert padded.shape == (3, 32, 32)
    assert (padded[:, :8] == 0).all() and (padded[:, 24:] == 0).all() and (padded[:, 8:24] != 0).any(0).all()
    cropped = to_input(array, 32, "crop", mean=(0, 0, 0), std=(1, 1, 1))
    assert cropped.shape == (3, 32, 32)
    assert cropped[0].min() > 0.2 and cropped[0].max() < 0.8  # the red ramp's outer quarters are cut off
    assert to_input(array, (64, 64), "crop", mean=(0, 0, 0), std=(1, 1, 1)).equal(to_tensor(array)[:, :, 32:96])


def test_to_input_normalises():
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert torch.allclose(to_input(grey, 64), torch.full((3, 64, 64), 2 * 128 / 255 - 1), atol=1e-6)
    tensor = to_input(grey, 64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1))
    assert torch.allclose(tensor[:, 0, 0], (128 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 1]))


@pytest.mark.parametrize("arguments", [{"mode": "stretch"}, {"size": 0}, {"size": None}, {"size": (32, -1)}])
def test_to_input_refuses(arguments):
    with pytest.raises(ValueError, match="unknown|positive"):
        to_input(gradient(), **{"size": 64, **arguments})


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(96, 128), (1300, 1100)])
def test_large_pictures_are_resized_in_strips_to_the_same(mode, size):
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), np.uint8)
    found = to_input(Image.fromarray(pixels), size, mode)
    assert torch.allclose(found, to_input(pixels, size, mode), atol=1e-5)


def test_a_large_picture_is_resized_without_a_copy_of_it():
    image = Image.new("RGB", (6000, 6000), (9, 99, 199))
    tracemalloc.start()
    pixels = to_input(image, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000 * 3 / 4, "some strips of rows"
    assert pixels.shape == (3, 64, 64) and torch.allclose(pixels[:, 0, 0], pixels[:, 63, 63], atol=1e-5)
