"""The training of the small teacher: composing images, captions, both scripts from end to end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cleandift_backbones.data.compositing import KINDS, Compositor, compose_plain
from cleandift_backbones.models.architectures import ARCHITECTURES

pytest.importorskip("transformers")
from tools.tiny import training
from tools.tiny.captions import LENGTH, Captions, build_tokenizer, caption
from tools.tiny.emoji_folder import contact_sheet, load_pictures

TOOLS = Path(__file__).parents[2] / "tools"
TEXTS = ("grinning face", "cat with tears", "red heart", "family: man, woman, girl")
STYLES = ("noto", "fluent3d")


def tool(name: str):
    path = next(path for path in (TOOLS / f"tiny/{name}.py", TOOLS / f"{name}.py") if path.is_file())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_split(folder: Path, count: int, size: int, seed: int) -> Path:
    """A split folder of `count` fake pictures: a disc with a hole on transparency."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    lines = []
    for number in range(count):
        style, radius = STYLES[number % 2], rng.uniform(0.3, 0.5)
        rgba = np.zeros((size, size, 4), np.uint8)
        rgba[..., :3] = rng.integers(0, 256, 3)
        rgba[..., 3] = 255 * ((np.hypot(x, y) < radius) & (np.hypot(x - 0.1, y) > 0.1))
        name = f"{style}/{number:X}.png"
        (folder / style).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgba).save(folder / name)
        entry = {"file_name": name, "text": TEXTS[number // 2 % len(TEXTS)], "style": style}
        lines.append(json.dumps(entry | {"concept": f"{number:X}", "subgroup": "fake"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_split(folder / "train", 16, 32, 0)
    write_split(folder / "heldout", 4, 32, 1)
    return folder


@pytest.fixture(scope="module")
def pictures(data) -> torch.Tensor:
    return load_pictures(data / "train")[0]


# ---------------------------------------------------------------------------------------------------------- compose


def test_load_pictures(data):
    rgba, entries = load_pictures(data / "train")
    assert rgba.shape == (16, 4, 32, 32) and rgba.dtype == torch.uint8
    assert [entry["file_name"] for entry in entries[:2]] == ["noto/0.png", "fluent3d/1.png"]
    first = np.asarray(Image.open(data / "train" / "noto/0.png"))
    assert np.array_equal(rgba[0].permute(1, 2, 0).numpy(), first)
    assert load_pictures(data / "train", size=16)[0].shape == (16, 4, 16, 16)


def test_load_pictures_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata.jsonl is missing.*make_pictures"):
        load_pictures(tmp_path)
    folder = write_split(tmp_path / "split", 4, 16, 0)
    Image.new("RGBA", (20, 20)).save(folder / "noto/0.png")
    with pytest.raises(ValueError, match=r"fluent3d/1.png is 16 x 16 pixels, not 20 x 20"):
        load_pictures(folder)
    (folder / "noto/0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"noto/0.png: not an image"):
        load_pictures(folder)
    (folder / "noto/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 pictures.*noto/0.png"):
        load_pictures(folder)
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "noto/2.png", "text": "x", "style": "noto", "concept": "2"}\n'
    )
    with pytest.raises(ValueError, match=r"line 1 has no subgroup"):
        load_pictures(folder)
    (folder / "metadata.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1: no JSON"):
        load_pictures(folder)


def test_equal_seeds_give_equal_pictures(pictures):
    first, again, other = (Compositor()(pictures, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first.shape == (16, 3, 32, 32) and first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std(0).mean() > 0.1  # every picture has a place and a background of its own


def test_placement_without_randomness_shows_the_picture_on_white(pictures):
    still = Compositor(scale=(1, 1), degrees=0, shift=0, flip=0, jitter=0, white=1)
    assert torch.allclose(still(pictures), compose_plain(pictures), atol=1e-3)
    flipped = Compositor(scale=(1, 1), degrees=0, shift=0, flip=1, jitter=0, white=1)
    assert torch.allclose(flipped(pictures), compose_plain(pictures).flip(-1), atol=1e-3)


def test_placement_keeps_the_picture_in_sight(pictures):
    solid = torch.zeros_like(pictures[:1]).repeat(64, 1, 1, 1)
    solid[:, 3, 12:20, 12:20] = 255  # the middle of the emoji, black on white
    drawn = Compositor(jitter=0, white=1)(solid, torch.Generator().manual_seed(0))
    ink = (1 - drawn.mean(1)) / 2
    area = ink.sum((1, 2)) / 64
    assert area.min() > 0.3 and area.max() < 1.15  # scales 0.6 to 1.05, squared
    x = (ink * torch.arange(32)).sum((1, 2)) / ink.sum((1, 2))
    assert (x - 15.5).abs().max() < 8 and x.std() > 0.5


def test_every_kind_of_background_is_drawn():
    clear = torch.zeros(len(KINDS), 4, 32, 32, dtype=torch.uint8)
    composed = Compositor(white=0)
    draws = composed.draw(len(KINDS), "cpu", torch.Generator().manual_seed(1))
    draws["kind"] = torch.arange(len(KINDS))
    draws["second"] = 1 - draws["first"].round()
    deviation = composed.render(clear, draws).std((2, 3)).mean(1)
    assert deviation[0] == 0 and deviation[1:].min() > 0.02
    draws["white"][:] = True
    assert torch.equal(composed.render(clear, draws), torch.ones(len(KINDS), 3, 32, 32))


def test_plain_background_and_bad_input(pictures):
    blue = compose_plain(pictures, (0.0, 0.0, 1.0))
    assert torch.equal(blue[0, :, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    inside = pictures[0, :3, 16, 8].float() / 127.5 - 1
    assert torch.allclose(blue[0, :, 16, 8], inside, atol=1e-5)
    with pytest.raises(ValueError, match=r"color=\(0, 0, 255\)"):
        compose_plain(pictures, (0, 0, 255))
    with pytest.raises(ValueError, match=r"uint8 B x 4 x S x S.*float32"):
        Compositor()(pictures.float())
    assert contact_sheet(blue[:3], columns=2, gap=2).size == (70, 70)


# --------------------------------------------------------------------------------------------------------- captions


def test_undropped_captions_equal_the_tokenizers_own(data):
    entries = load_pictures(data / "train")[1]
    texts = [caption(entry["text"], entry["style"]) for entry in entries]
    assert texts[1] == "grinning face, fluent 3d style"
    tokenizer = build_tokenizer(texts)
    own = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    captions = Captions(tokenizer, entries, torch.device("cpu"))
    ids = captions.sample(torch.arange(len(entries)), None, style=0, whole=0, word=0, unknown=0)
    assert own.shape == (16, LENGTH) and torch.equal(ids, own)
    assert tokenizer.decode(own[0], skip_special_tokens=True) == "grinning face noto style"
    assert tokenizer("Zebra, NOTO!")["input_ids"][1] == tokenizer.unk_token_id

    empty = tokenizer("", padding="max_length", return_tensors="pt")["input_ids"]
    dropped = captions.sample(torch.arange(16), None, whole=1)
    assert torch.equal(dropped, empty.expand(16, -1))
    bare = captions.sample(torch.arange(16), None, style=1, whole=0, word=0, unknown=0)
    assert tokenizer.decode(bare[1], skip_special_tokens=True) == "grinning face"


def test_captions_that_are_too_long_are_cut_like_the_tokenizers(data):
    entry = {"text": " ".join(f"word{n}" for n in range(20)), "style": "noto"}
    tokenizer = build_tokenizer([caption(**entry)])
    own = tokenizer(caption(**entry), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ids = Captions(tokenizer, [entry], torch.device("cpu")).sample(torch.tensor([0]), None, 0, 0, 0, 0)
    assert torch.equal(ids, own) and ids[0, -1] == tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------------- scripts

TINY_VAE = ["--widths", "8,8,16", "--crop", "16", "--max-steps", "3", "--batch-size", "4", "--eval-steps", "2"]
TINY_TEACHER = ["--widths", "16,16,16,32", "--max-steps", "3", "--batch-size", "4", "--eval-steps", "2"]


@pytest.fixture(scope="module")
def vae_folder(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    assert tool("train_vae").main(["--data", str(data), "--out", str(out), "--device", "cpu", *TINY_VAE]) == 0
    return out


@pytest.fixture(scope="module")
def teacher_folder(data, vae_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    where = ["--data", str(data), "--vae", str(vae_folder / "vae"), "--out", str(out), "--device", "cpu"]
    options = ["--sample-rows", "3", "--sample-steps", "2", "--save-dtype", "fp16"]
    assert tool("train_teacher").main([*where, *TINY_TEACHER, *options]) == 0
    return out


def test_train_vae_writes_a_diffusers_folder(vae_folder, pictures):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder / "vae")
    posterior = vae.encode(compose_plain(pictures)).latent_dist
    assert posterior.mean.shape == (16, 4, 8, 8)
    log = [json.loads(line) for line in (vae_folder / "log.jsonl").open()]
    assert log[-1]["step"] == 3 and log[-1]["emoji_heldout_l1"] > 0 and log[-1]["emoji_heldout_psnr"] > 0
    assert vae.config.scaling_factor == ARCHITECTURES["tiny"].vae["scaling_factor"]
    assert Image.open(vae_folder / "reconstructions.png").size[0] > 32


def test_train_teacher_writes_a_pipeline(teacher_folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(["grinning face, noto style", ""], num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 32, 32, 3) and np.isfinite(drawn).all()
    unet, scheduler = pipeline.unet, pipeline.scheduler
    assert [len(block.resnets) for block in unet.up_blocks] == [3, 3, 3, 3]
    attention = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert attention.inner_dim // attention.heads == 16
    assert scheduler.config.prediction_type == "v_prediction" and not scheduler.config.rescale_betas_zero_snr
    tensors = load_file(teacher_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((teacher_folder / "model_index.json").read_text())["tokenizer"][1] == "PreTrainedTokenizerFast"
    log = [json.loads(line) for line in (teacher_folder / "log.jsonl").open()]
    assert log[-1]["step"] == 3 and log[-1]["heldout"] > 0
    assert Image.open(teacher_folder / "samples.png").size[0] > 64


def test_train_teacher_continues_exactly(data, vae_folder, teacher_folder, tmp_path):
    """Stopped after step 1 and resumed: the weights equal those of the run in one go."""
    teacher = tool("train_teacher")
    where = ["--data", str(data), "--vae", str(vae_folder / "vae"), "--out", str(tmp_path), "--device", "cpu"]
    options = [*where, *TINY_TEACHER, "--sample-rows", "3"]
    assert teacher.main([*options, "--stop-minutes", "1e-6"]) == 0
    assert not (tmp_path / "model_index.json").exists()
    assert teacher.main([*options, "--export"]) == 0
    assert (tmp_path / "model_index.json").exists()  # of the checkpoint, which stands
    assert teacher.main(options) == 0
    one, two = (load_file(folder / training.CHECKPOINT) for folder in (teacher_folder, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_target_is_the_schedulers_velocity():
    teacher = tool("train_teacher")
    scheduler = teacher.build_scheduler()
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 100, 500, 900, 999])
    seen = {}

    def oracle(noisy, t, encoder_hidden_states, return_dict):
        seen["noisy"] = noisy
        return (scheduler.get_velocity(latents, noise, t),)

    arguments = (scheduler.alphas_cumprod, latents, noise, timesteps, None)
    weighted, plain = teacher.diffusion_terms(oracle, *arguments, 5.0)
    assert plain.max() < 1e-10 and weighted.max() < 1e-10
    assert torch.allclose(seen["noisy"], scheduler.add_noise(latents, noise, timesteps), atol=1e-6)

    zero = lambda noisy, *_, **__: (torch.zeros_like(noisy),)  # noqa: E731
    weighted, plain = teacher.diffusion_terms(zero, *arguments, 5.0)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    assert torch.allclose(weighted, plain * snr.clamp(max=5) / (snr + 1))
    assert torch.equal(*teacher.diffusion_terms(zero, *arguments, 0))


def test_default_widths_fit_the_feature_file():
    vae_tool, teacher = tool("train_vae"), tool("train_teacher")
    with torch.device("meta"):
        vae, unet = vae_tool.build_vae([24, 48, 96], 128), teacher.build_unet([48, 80, 112, 112], 32)
    assert sum(p.numel() for p in vae.encoder.parameters()) < 550_000
    assert teacher.feature_parameters(vae, unet) == 7_501_304 <= teacher.LIMIT


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("train_vae", ["--widths", "8,12,16", "--crop", "0"], "three multiples of 8"),
        ("train_vae", ["--crop", "64"], "--crop 64 of pictures of 32 pixels"),
        ("train_teacher", ["--export"], "holds no checkpoint to write the folder from"),
        ("train_teacher", ["--widths", "16,16"], "four multiples of 16"),
        ("train_teacher", ["--widths", "192,192,192,192"], "feature parameters are more than"),
        ("train_teacher", ["--vae", "nowhere"], "nowhere is no VAE folder"),
        ("train_teacher", ["--cuda-graph"], "--cuda-graph needs a GPU"),
    ],
)
def test_scripts_refuse_bad_options_before_any_work(name, options, message, data, vae_folder, tmp_path, capsys):
    where = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--max-steps", "1"]
    if name == "train_teacher":
        where += ["--vae", str(vae_folder / "vae")]
    with pytest.raises(SystemExit) as stop:
        tool(name).main([*where, *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
