"""Photographs and emoji mixed for the small VAE and teacher, and training that begins from earlier weights."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import TINY_TEACHER, TINY_VAE, tool, write_split

from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.utils.errors import InputError
from tools.tiny.captions import Captions, build_tokenizer, caption
from tools.tiny.picture_sets import Photos, PictureSets
from tools.tiny.starting import start_from, start_text
from tools.tiny.training import start

SIDE = 32


def write_photos(folder, count, seed):
    """Photographs of three shapes with captions."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number, shape in zip(range(count), [(48, 32), (32, 32), (32, 40)] * count, strict=False):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(["a photo of a rose", "a photo of a green shirt"][number % 2])
    return folder


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    write_split(folder / "train", 16, SIDE, 0)
    write_split(folder / "heldout", 4, SIDE, 1)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", 9, 2)
    write_photos(folder / "heldout", 3, 3)
    return folder


def sets(emoji, photos, **options):
    emoji = emoji and str(emoji)
    places = [photos and str(photos / name) for name in ("train", "heldout")]
    return PictureSets(emoji, *places, **options).to(torch.device("cpu"))


def picture(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "x.png")
    return ImageSource("x", str(tmp_path / "x.png"))


def test_the_middle_of_a_photograph_is_cut_out_to_the_pixel(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 41, 3), np.uint8)
    photos = Photos([picture(array, tmp_path)], SIDE)
    middle = torch.from_numpy(array[:, 4:36]).permute(2, 0, 1) / 127.5 - 1
    assert photos.centers(torch.tensor([0]))[0].sub(middle).abs().max() < 1e-4


def test_longer_photographs_keep_their_middle_and_larger_ones_are_resized(tmp_path):
    array = np.zeros((64, 256, 3), np.uint8)
    array[:, :, 0] = np.arange(256)  # a ramp tells where a pixel was
    photos = Photos([picture(array, tmp_path)], SIDE)
    assert photos.sizes.tolist() == [[32, 48]]
    kept = photos.images[0, 0, 16, :48].float()
    assert abs(kept[0] - 80.5) < 2 and abs(kept[-1] - 174.5) < 2  # of 128 resized columns the middle 48
    assert photos.images[0, :, :, 48:].eq(0).all()


def test_cuts_are_the_whole_or_a_square_inside_and_half_are_mirrored(tmp_path):
    ramp = np.zeros((32, 48, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = 5 * np.arange(48), 5 * np.arange(32)[:, None]
    photos = Photos([picture(ramp, tmp_path)], SIDE)
    cuts = (photos.cut(torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0)) + 1) * 127.5 / 5
    x, y = cuts[:, 0, 16], cuts[:, 1, :, 16]  # places in the photograph, in pixels
    assert cuts[:, 2].abs().max() < 1e-3 and cuts.amin() > -0.01 and x.amax() < 47.01 and y.amax() < 31.01
    mirrored = x[:, -1] < x[:, 0]
    assert 150 < mirrored.sum() < 250 and (y[:, -1] > y[:, 0]).all()
    width, height = (x[:, -1] - x[:, 0]).abs(), y[:, -1] - y[:, 0]
    whole = width > 40
    assert 150 < whole.sum() < 250 and height[whole].min() > 30
    cut = ~whole
    assert width[cut].sub(height[cut]).abs().max() < 0.6  # squares; at the outermost pixels a little is clamped
    assert width[cut].min() < 18 and 28 < width[cut].max() < 32
    again = photos.cut(torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0))
    assert torch.equal(again, cuts * 5 / 127.5 - 1) or again.sub(cuts * 5 / 127.5 - 1).abs().max() < 1e-5


def test_batches_mix_the_sets_in_the_asked_share(emoji, photos):
    both = sets(emoji, photos, share=0.75)
    assert (
        both.size == SIDE and len(both) == 25 and [bool(e["style"]) for e in both.entries] == [True] * 16 + [False] * 9
    )
    images, index = both.batch(0, 8, 5, torch.Generator().manual_seed(1))
    assert images.shape == (8, 3, SIDE, SIDE) and images.abs().max() <= 1
    assert (index < 16).sum() == 2 and (index >= 16).sum() == 6
    again, same = both.batch(0, 8, 5, torch.Generator().manual_seed(1))
    assert torch.equal(images, again) and torch.equal(index, same)
    seen = torch.cat([both.batch(step, 8, 5, torch.Generator().manual_seed(1))[1] for step in range(3)])
    assert sorted(seen[seen >= 16].tolist()) == sorted([*range(16, 25)] * 2)  # each photograph once an epoch
    assert sets(None, photos, size=SIDE).batch(0, 4, 0, torch.Generator())[1].max() < 9
    assert sets(emoji, None).batch(0, 4, 0, torch.Generator())[0].shape == (4, 3, SIDE, SIDE)


def test_held_out_pictures_are_always_the_same(emoji, photos):
    both = sets(emoji, photos)
    chosen, again = both.heldout(4, 0), both.heldout(4, 0)
    assert list(chosen) == ["emoji", "photos"]
    assert all(torch.equal(a, b) for kind in chosen for a, b in zip(chosen[kind], again[kind], strict=True))
    assert len(chosen["photos"][0]) == 3 and sorted(chosen["photos"][1].tolist()) == [4, 5, 6]
    assert [both.heldout_entries[i]["style"] for i in chosen["photos"][1]] == [""] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(emoji=None, photos=None), "give --data, --photos, or both"),
        (dict(photos_heldout=None), "--photos and --photos-heldout belong together"),
        (dict(share=1.0), "--photo-share 1.0: give a number between 0 and 1"),
    ],
)
def test_what_is_asked_for_is_checked(emoji, photos, change, message):
    places = dict(emoji=str(emoji), photos=str(photos / "train"), photos_heldout=str(photos / "heldout"))
    with pytest.raises(InputError, match=message):
        PictureSets(**places | change)


def test_a_photograph_has_its_caption_and_no_style():
    assert caption("a photo of a rose", "") == "a photo of a rose"
    entries = [dict(text="grinning face", style="noto"), dict(text="a photo of a rose", style="")]
    tokenizer = build_tokenizer([caption(e["text"], e["style"]) for e in entries])
    ids = Captions(tokenizer, entries, torch.device("cpu")).sample(torch.tensor([0, 1]), None, 0, 0, 0, 0)
    expected = tokenizer([caption(**e) for e in entries], padding="max_length")["input_ids"]
    assert ids.tolist() == expected


# --- the scale of latents ---


def test_rescaled_latents_are_drawn_the_same():
    module, torch_seed = tool("train_vae"), torch.manual_seed(0)
    vae, x = module.build_vae([8, 8, 16], SIDE), torch.randn(2, 3, SIDE, SIDE, generator=torch_seed)
    before = vae.encode(x).latent_dist
    drawn = vae.decode(before.mean).sample
    module.rescale(vae, 0.3)
    after = vae.encode(x).latent_dist
    assert torch.allclose(after.mean, before.mean * 0.3, atol=1e-6) and torch.allclose(after.std, before.std * 0.3)
    assert torch.allclose(vae.decode(after.mean).sample, drawn, atol=1e-5)


def test_exported_latents_have_the_scale_of_the_architecture(vae_folder, emoji, photos):
    from diffusers import AutoencoderKL

    vae, power = AutoencoderKL.from_pretrained(vae_folder / "vae"), 0.0
    both = sets(emoji, photos)
    with torch.no_grad():
        for kind, (images, _) in both.heldout(128, 0).items():
            latents = vae.encode(images).latent_dist
            power += both.shares[kind] * (latents.mean.square() + latents.std.square()).mean()
    assert power.sqrt() * vae.config.scaling_factor == pytest.approx(1, rel=1e-3)


# --- training from earlier weights ---


@pytest.fixture(scope="module")
def vae_folder(emoji, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    assert tool("train_vae").main([*where(emoji, photos), "--out", str(out), *TINY_VAE]) == 0
    return out


def where(emoji, photos):
    given = ["--data", emoji, "--photos", photos / "train", "--photos-heldout", photos / "heldout", "--device", "cpu"]
    return [str(word) for word in given]


def test_vae_and_teacher_learn_from_both_and_go_on_from_earlier_weights(emoji, photos, vae_folder, tmp_path, capsys):
    log = [json.loads(line) for line in (vae_folder / "log.jsonl").open()]
    assert log[-1]["photos_heldout_psnr"] > 0 and log[-1]["emoji_heldout_psnr"] > 0
    mean = 0.25 * log[-1]["emoji_latent_rms"] ** 2 + 0.75 * log[-1]["photos_latent_rms"] ** 2
    assert log[-1]["latent_rms"] == pytest.approx(mean**0.5, rel=1e-3)
    teacher, vae = tool("train_teacher"), ["--vae", str(vae_folder / "vae")]
    first, second = (tmp_path / name for name in ("first", "second"))
    assert teacher.main([*where(emoji, photos), *vae, "--out", str(first), *TINY_TEACHER]) == 0
    log = [json.loads(line) for line in (first / "log.jsonl").open()]
    assert log[-1]["photos_t500"] > 0 and log[-1]["emoji_t500"] > 0
    start = ["--start", str(first), "--start-text", str(first), "--lr", "1e-12"]
    assert teacher.main([*where(emoji, photos), *vae, "--out", str(second), *TINY_TEACHER, *start]) == 0
    assert f" tensors from {first}\n" in capsys.readouterr().out  # nothing is left random
    again = [json.loads(line) for line in (second / "log.jsonl").open()]
    assert again[-1]["heldout"] == pytest.approx(log[-1]["heldout"], rel=1e-3)  # the same weights: nothing was learnt
    vae = tool("train_vae")
    options = [
        *where(emoji, photos),
        "--out",
        str(tmp_path / "vae"),
        *TINY_VAE,
        "--start",
        str(vae_folder),
        "--lr",
        "1e-12",
    ]
    assert vae.main(options) == 0


def test_starts_that_do_not_fit_are_refused(vae_folder, tmp_path):
    teacher, vae = tool("train_teacher"), tool("train_vae")
    with pytest.raises(InputError, match="holds no weights of such a unet"):
        start_from(teacher.build_unet([16, 16, 16, 32], 8), "unet", str(vae_folder / "vae"))
    with pytest.raises(InputError, match="does not fit the vae"):
        start_from(vae.build_vae([8, 16, 16], 32), "vae", str(vae_folder / "vae"))
    tokenizer = build_tokenizer(["a rose"])
    with pytest.raises(OSError, match="text_encoder"):
        start_text(teacher.build_text_encoder(tokenizer), tokenizer, str(tmp_path))


def test_words_keep_their_embeddings(tmp_path):
    teacher = tool("train_teacher")
    old, new = build_tokenizer(["a red rose"]), build_tokenizer(["green green", "a rose"])
    one, two = teacher.build_text_encoder(old), teacher.build_text_encoder(new)
    one.save_pretrained(tmp_path / "text_encoder")
    old.save_pretrained(tmp_path / "tokenizer")
    fresh = two.get_input_embeddings().weight[new.get_vocab()["green"]].clone()
    start_text(two, new, str(tmp_path))
    for word in ("a", "rose", "<eos>"):
        held = one.get_input_embeddings().weight[old.get_vocab()[word]]
        assert torch.equal(two.get_input_embeddings().weight[new.get_vocab()[word]], held)
    assert torch.equal(two.get_input_embeddings().weight[new.get_vocab()["green"]], fresh)
    states = ({n: t for n, t in m.state_dict().items() if "token_embedding" not in n} for m in (one, two))
    first, second = states
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_precision_of_a_step_follows_the_processor(monkeypatch):
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        accelerator = start(argparse.Namespace(device="cpu", seed=0))
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
