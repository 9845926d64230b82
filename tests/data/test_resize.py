"""One filter for training, extraction and evaluation, and one kind of pixels up to the device."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import cleandift_backbones
from cleandift_backbones.data.batches import DecodeOptions, decode
from cleandift_backbones.data.images import stack_pixels, to_pixels, to_tensor, unit_range
from cleandift_backbones.data.loading import Resize
from cleandift_backbones.data.resize import center_crop, pad, resize, stretch
from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.features.extractor import Pixels, load_extractor


def image(seed=0, size=(90, 70)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_bicubic_resizing_stands_in_one_file():
    package = Path(cleandift_backbones.__file__).parent
    found = [path.name for path in package.rglob("*.py") if re.search(r"mode=\"bicubic\"", path.read_text())]
    assert found == ["resize.py"]


def test_training_extraction_and_evaluation_resize_alike(tmp_path):
    image().save(tmp_path / "a.png")
    picture = ImageSource("a", str(tmp_path / "a.png"))
    trained = decode(picture, DecodeOptions(48, flip=False), torch.Generator())
    extracted = Resize("crop", (48, 48))(image())
    torch.testing.assert_close(trained, extracted * 2 - 1, atol=1e-5, rtol=0)
    extractor = load_extractor("pixels", size=48)
    evaluated = extractor(stretch(to_tensor(image()), (48, 48))[None])["pixels"]
    assert torch.equal(evaluated, extractor(to_tensor(image())[None])["pixels"])


def test_names_say_what_is_done():
    x = to_tensor(image())
    assert torch.equal(stretch(x, (35, 90)), resize(x, (35, 90)))
    padded = pad(x, (64, 64), (0.25, 0.5, 0.75))
    assert padded[:, 0, 0].tolist() == [0.25, 0.5, 0.75] and torch.equal(padded[:, 7:57], resize(x, (50, 64)))
    assert torch.equal(center_crop(x, (70, 70)), x[:, :, 10:80])


def test_pixels_that_are_not_resized_stay_bytes():
    """Until they are on the device: a quarter of the memory, and the same numbers."""
    for mode, size in (("keep", None), ("squash", (70, 90)), ("pad", (70, 90)), ("crop", (70, 90))):
        pixels = to_pixels(image(), size, mode)
        assert pixels.dtype == torch.uint8 and torch.equal(unit_range(pixels), to_tensor(image()))
    resized = Resize("squash", (70, 90))(image(1, (40, 40)))
    assert resized.dtype == torch.float32
    both = stack_pixels([pixels, resized])
    assert torch.equal(both[0], to_tensor(image())) and torch.equal(both[1], resized)


@pytest.mark.parametrize("maps", ["pixels"])
def test_extractors_take_bytes_and_floats(maps):
    extractor, bytes_ = load_extractor(maps, size=64), to_pixels(image(), mode="keep")[None]
    assert isinstance(extractor.model, Pixels)
    assert torch.equal(extractor(bytes_)[maps], extractor(unit_range(bytes_))[maps])
