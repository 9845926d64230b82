"""The training of the small teacher: composing pictures, captions, shared plumbing, both scripts from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cleandift_backbones.data.compositing import KINDS, Compositor, compose_plain, contact_sheet, load_pictures
from cleandift_backbones.distill.loop import EMA, lr_factor
from cleandift_backbones.models.entrypoints import ARCHITECTURES
from cleandift_backbones.utils import seeding
from cleandift_backbones.utils.errors import InputError
from cleandift_backbones.utils.seeding import batch_indices, step_generator

pytest.importorskip("transformers")
from tools.tiny import training
from tools.tiny.arguments import add_run_arguments
from tools.tiny.captions import LENGTH, Captions, build_tokenizer, caption

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


# --------------------------------------------------------------------------------------------------------- training


def test_batches_visit_every_sample_once_an_epoch():
    seen = torch.cat([batch_indices(step, 6, 9, seed=1) for step in range(3)])
    assert sorted(seen[:9].tolist()) == sorted(seen[9:].tolist()) == list(range(9))
    assert not torch.equal(seen[:9], seen[9:])
    assert not torch.equal(batch_indices(0, 6, 9, 1), batch_indices(0, 6, 9, 2))
    assert len(batch_indices(5, 25, 9, 1)) == 25  # larger than an epoch
    with pytest.raises(ValueError, match="batch_size=0"):
        batch_indices(0, 0, 9, 1)


def test_generators_depend_on_their_parts_alone():
    cpu = torch.device("cpu")
    first, again, other = (torch.rand(4, generator=step_generator(cpu, 0, step)) for step in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({seeding.mix_seed(a, b) for a in range(20) for b in range(20)}) == 400


def test_schedule_warms_up_and_ends_at_the_floor():
    assert lr_factor(0, 0, warmup=10) == pytest.approx(0.1)
    assert lr_factor(9, 0, warmup=10) == pytest.approx(1)
    assert lr_factor(100, 0.5, warmup=10, floor=0.2) == pytest.approx(0.6)
    assert lr_factor(100, 1.3, warmup=10, floor=0.2) == pytest.approx(0.2)
    falling = [lr_factor(1000, p / 10, 10) for p in range(11)]
    assert falling == sorted(falling, reverse=True)


def test_ema_follows_its_formula_and_gives_the_weights_back():
    layer = nn.Linear(2, 1, bias=False)
    ema = EMA(dict(layer.named_parameters()), decay=0.5)
    expected = layer.weight.detach().clone()
    for count in range(8):
        with torch.no_grad():
            layer.weight += 1
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        ema.update(count)
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.allclose(layer.weight, expected)
    assert torch.equal(layer.weight, own)
    with pytest.raises(ValueError, match="decay 1"):
        EMA({}, 1)


class Toy:
    """A regression whose batches come from (seed, step); enough to see whether a run is continued exactly."""

    def __init__(self, out: Path, *words: str, settings: dict | None = None):
        parser = argparse.ArgumentParser()
        add_run_arguments(parser, batch_size=4, lr=1e-2)
        given = words or ("--max-steps", "8")
        options = parser.parse_args(["--out", str(out), "--device", "cpu", "--warmup", "2", *given])
        accelerator = training.start(options)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(1))
        self.model(torch.zeros(1, 3, 5, 5))
        self.model.to(memory_format=torch.channels_last)
        self.loop = training.Loop(options, accelerator, {"model": self.model}, settings or {"lr": 1e-2}, 0.01)

    def train(self, after: Callable[[int], object] = lambda step: None) -> bool:
        def loss_of(step: int):
            x = torch.randn(4, 3, 5, 5, generator=step_generator(torch.device("cpu"), 0, step))
            return (self.model(x) - x.sum((1, 2, 3))[:, None]).square().mean(), 4, {}

        return self.loop.run(loss_of, [(1, lambda: after(self.loop.step))])


@pytest.fixture
def often(monkeypatch):
    """A line of the log every two steps."""
    monkeypatch.setattr(training, "LOG_STEPS", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_exactly(tmp_path, often, number):
    whole = Toy(tmp_path / "whole")
    assert whole.train()
    before = signal.getsignal(number)
    stopped = Toy(tmp_path / "parts")
    assert not stopped.train(lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert stopped.loop.step == 4 and stopped.loop.exit_code == 128 + number and signal.getsignal(number) is before
    resumed = Toy(tmp_path / "parts")
    assert resumed.train() and resumed.loop.step == 8 and resumed.loop.exit_code == 0
    one, two = (load_file(tmp_path / name / training.CHECKPOINT) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {name.split("/")[0] for name in one} == {"model", "ema", "optimizer"}
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in ("whole", "parts")]
    whole_lines, parts_lines = ([(e["step"], e["loss"], e["lr"]) for e in log] for log in logs)
    assert whole_lines == parts_lines
    assert [entry["step"] for entry in logs[0]] == [2, 4, 6, 8]
    assert whole.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not list(tmp_path.glob("*/.*"))  # nothing half-written is left


def test_a_finished_run_has_nothing_to_do(tmp_path):
    assert Toy(tmp_path).train()
    again = Toy(tmp_path)
    assert again.train() and again.loop.step == 8
    longer = Toy(tmp_path, "--max-steps", "10", "--stop-after", "9")
    assert not longer.train() and longer.loop.step == 9


def test_a_run_refuses_what_it_cannot_continue(tmp_path):
    Toy(tmp_path).train()
    with pytest.raises(InputError, match=r"another run: lr was 0.01 and is 0.5"):
        Toy(tmp_path, settings={"lr": 0.5})
    with pytest.raises(FileExistsError, match="--resume auto"):
        Toy(tmp_path, "--max-steps", "8", "--resume", "never")
    with pytest.raises(InputError, match="give --max-steps or --max-minutes"):
        Toy(tmp_path / "new", "--seed", "0")
    save_file({"x": torch.zeros(2)}, tmp_path / training.CHECKPOINT)
    with pytest.raises(InputError, match="is no checkpoint of a training"):
        Toy(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda:99' cannot be used"):
            Toy(tmp_path / "new", "--device", "cuda:99")


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, monkeypatch, caplog):
    from cleandift_backbones.distill import checkpoint

    toy, write = Toy(tmp_path, "--max-steps", "4", "--save-steps", "2"), checkpoint.write_file

    def full(tensors, path, metadata):
        if toy.loop.step == 2:
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "write_file", full)
    assert toy.train() and "no checkpoint of step 2: " in caplog.text
    assert Toy(tmp_path, "--max-steps", "4").loop.step == 4


def test_time_drives_the_schedule_and_stops_the_run(tmp_path, monkeypatch):
    now, rates = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training, "_STARTED", 0.0)

    def minute(toy: Toy):
        rates.append(toy.loop.optimizer.param_groups[0]["lr"])
        now[0] += 60

    toy = Toy(tmp_path, "--max-minutes", "10", "--stop-minutes", "4")
    assert not toy.train(lambda step: minute(toy))
    assert toy.loop.step == 4 and toy.loop.progress() == pytest.approx(0.4)
    now[0] = 1000.0
    monkeypatch.setattr(training, "_STARTED", 1000.0)
    again = Toy(tmp_path, "--max-minutes", "10")
    assert again.train(lambda step: minute(again)) and again.loop.step == 10
    assert rates == [pytest.approx(1e-2 * lr_factor(step, step / 10, 2)) for step in range(10)]


def test_a_checkpoint_is_written_every_two_minutes(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training.Loop, "save", lambda loop: saved.append(loop.step))
    toy = Toy(tmp_path)

    def later(step: int) -> None:
        now[0] += 50

    assert toy.train(later) and saved == [3, 6, 8]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, often):
    toy = Toy(tmp_path)
    with torch.no_grad():
        toy.model[0].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"'loss'.* not finite.*--lr"):
        toy.train()


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
    assert vae.config.scaling_factor == ARCHITECTURES["tiny"]["vae"]["scaling_factor"]
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
