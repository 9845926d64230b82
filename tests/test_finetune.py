"""The distillation run as a whole: it learns, resumes exactly, survives faults, and runs on two processes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cleandift_backbones.checkpoints import save_native
from cleandift_backbones.distill.build import Prompts
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.train import Training
from cleandift_backbones.latents import LatentEncoder
from cleandift_backbones.prompts import PromptEncoder
from tools.finetune import main

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/finetune/cleandift_tiny.yaml")
FAST = [
    "data.size=64", "data.background=white", "batch_size=2", "num_workers=0", "max_steps=4", "checkpoint_every=2",
    "validate_every=100", "sample_every=0", "log_every=1", "device=cpu", "save_dtype=float32", "tensorboard=false",
    "text=empty", "heads.depth=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        image = Image.new("RGB", (70 + number, 64 + 3 * number), (20 * number, 200 - 15 * number, 90))
        image.paste((250 - 20 * number, 10 * number, 90), (8 + number, 16, 40 + number, 56))
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"red box {number}")
    return folder


def arguments(pictures, out, *overrides):
    return [RECIPE, f"data.path={pictures}", f"output_dir={out}", *FAST, *overrides]


def finetune(pictures, out, *overrides):
    assert main(arguments(pictures, out, *overrides)) == 0
    return load_file(out / "native/model.safetensors")


def log(out, key):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or dict(rtol=0, atol=0)))


def refused(pictures, out, capsys, message, *overrides):
    with pytest.raises(SystemExit) as stop:
        main(arguments(pictures, out, *overrides))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said, said


# --- what comes out ---


@pytest.mark.slow
def test_it_learns_and_loads(pictures, tmp_path):
    options = [
        "max_steps=24",
        "warmup_steps=4",
        "validate_every=12",
        "sample_every=12",
        "tensorboard=true",
        "text=distilled",
    ]
    state = finetune(pictures, tmp_path / "run", *options)
    validation = log(tmp_path / "run", "validation")
    assert validation[-1] < validation[0] - 0.001
    model = timm.create_model(f"local-dir:{tmp_path / 'run/native'}", pretrained=True, features_only=True)
    assert model.model.timestep == state["timestep"] != 261
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    assert not torch.equal(model.model.unet.conv_in.weight, teacher["unet.conv_in.weight"])
    assert torch.equal(model.model.vae.encoder.conv_in.weight, teacher["vae.encoder.conv_in.weight"])
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["max_steps"] == 24 and recipe["timestep_levels"] == 3
    card = (tmp_path / "run/native/README.md").read_text()
    assert '"learning_rate"' in card and "validation loss, after" in card and str(tmp_path) not in card
    assert {p.name for p in (tmp_path / "run/samples").iterdir()} == {"step_0000012.png", "step_0000024.png"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [round(e.value, 5) for e in events.Scalars("validation")] == [round(v, 5) for v in validation]
    assert "loss/us6" in events.Tags()["scalars"] and "features" in events.Tags()["images"]


def test_half_precision_and_a_push_at_the_end(pictures, tmp_path, hub, logged_in):
    given = arguments(pictures, tmp_path / "run", "max_steps=2", "mixed_precision=bf16", "sample_every=2")
    assert main([*given, "--push-to-hub", "me/student"]) == 0
    assert all(map(math.isfinite, log(tmp_path / "run", "loss") + log(tmp_path / "run", "validation")))
    model = timm.create_model("hf-hub:me/student", pretrained=True, features_only=True)
    assert torch.equal(
        model.model.unet.conv_in.bias, load_file(tmp_path / "run/native/model.safetensors")["unet.conv_in.bias"]
    )


def test_options_that_do_not_change_the_result(pictures, tmp_path):
    """Gradient checkpointing is exact; two accumulated batches equal one of twice the size."""
    plain = finetune(pictures, tmp_path / "plain", "batch_size=4", "max_steps=2", "data.flip=false")
    again = finetune(
        pictures, tmp_path / "again", "batch_size=4", "max_steps=2", "data.flip=false", "gradient_checkpointing=true"
    )
    equal(plain, again, rtol=1e-4, atol=1e-6)


def test_subset_of_maps_trains_no_deeper(pictures, tmp_path):
    state = finetune(pictures, tmp_path / "run", "maps={us3: 1, mid: 2}", "max_steps=2", "heads.depth=0", "loss=l2")
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    changed = {n for n in teacher if not torch.equal(teacher[n].float(), state[n].float())}
    assert any("mid_block" in n for n in changed) and any("up_blocks.0.upsamplers" in n for n in changed)
    assert not any(n.startswith(("unet.up_blocks.1", "unet.up_blocks.2", "vae.")) for n in changed)
    assert not any(n.startswith("heads.") for n in state)


def test_lora_trains_adapters_alone_and_merges(pictures, tmp_path):
    state = finetune(pictures, tmp_path / "run", "lora.rank=4", "learning_rate=0.01", "warmup_steps=1")
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    changed = {
        n for n in teacher if n.startswith("unet.") and (teacher[n].float() - state[n].float()).abs().max() > 1e-6
    }
    assert changed and all("attn1." in n or ".ff.net." in n for n in changed) and not any("attn2" in n for n in changed)
    (checkpoint, *_) = sorted((tmp_path / "run/checkpoints").iterdir())
    kept = load_file(checkpoint)
    assert not any(n.startswith("model/student") and "lora" not in n for n in kept)
    adapters = load_file(tmp_path / "run/lora.safetensors")
    # diffusers itself loads the adapters onto the teacher's UNet, with the same weights as the merged export.
    from cleandift_backbones.unet import FeatureUNet

    model = timm.create_model("dift_tiny", pretrained=True, final_map="us10")
    unet: FeatureUNet = model.unet
    unet.load_lora_adapter(adapters, prefix=None)
    args = torch.randn(1, 4, 16, 16), 100.0, model.prompt_embeds
    plain = timm.create_model(f"local-dir:{tmp_path / 'run/native'}", pretrained=True, final_map="us10").unet
    with torch.no_grad():
        torch.testing.assert_close(unet(*args)["us10"], plain(*args)["us10"], rtol=1e-3, atol=1e-3)


def test_cached_latents_need_neither_vae_nor_text_encoder(pictures, tmp_path, monkeypatch):
    options = ["text=distilled", "data.flip=true", f"cache_dir={tmp_path / 'cache'}", "max_steps=3"]
    live = finetune(pictures, tmp_path / "live", *options[:2], "max_steps=3")
    first = finetune(pictures, tmp_path / "first", *options)
    equal(live, first, rtol=0.02, atol=2e-3)  # latents are kept in 16 bit

    def refuse(*args, **kwargs):
        raise AssertionError("used although everything is cached")

    monkeypatch.setattr(LatentEncoder, "forward", refuse)
    monkeypatch.setattr(PromptEncoder, "__init__", refuse)
    equal(first, finetune(pictures, tmp_path / "second", *options))
    # A picture that changes is encoded again.
    with pytest.raises(AssertionError, match="used although"):
        os.utime(next(pictures.glob("*.png")))
        main(arguments(pictures, tmp_path / "third", *options))


def test_heads_of_an_earlier_run_are_a_start(pictures, tmp_path):
    state = finetune(
        pictures, tmp_path / "first", "max_steps=2", "heads.conditioning=adarms", "heads_learning_rate=0.1"
    )
    given = arguments(
        pictures, tmp_path / "second", "heads.conditioning=adarms", f"heads.weights={tmp_path / 'first/native'}"
    )
    heads = Training(load_recipe(given[0], given[1:])).module.heads.state_dict()
    assert all(torch.equal(tensor, state[f"heads.{name}"]) for name, tensor in heads.items())
    with pytest.raises(SystemExit):  # heads of another kind
        main([*given, "heads.conditioning=film"])
    # And they are there for features as the teacher would give them.
    folder = f"local-dir:{tmp_path / 'first/native'}"
    model = timm.create_model(folder, pretrained=True, features_only=True, projected_timestep=200)
    assert torch.equal(model.model.heads.time_in_proj.weight, state["heads.time_in_proj.weight"])


def test_text_modes():
    empty, source = torch.zeros(1, 16, 96), timm.create_model("dift_tiny").text_encoder
    embeds = Prompts("caption", empty, source).embed(["red apple", ""])
    assert embeds.shape == (2, 16, 96)
    for mode, teacher, student in (("caption", embeds, embeds), ("distilled", embeds, empty), ("empty", empty, empty)):
        found = Prompts(mode, empty, source).split(embeds)
        assert found[0] is teacher and found[1] is student
    with pytest.raises(ValueError, match="text=caption needs a text encoder"):
        Prompts("caption", empty, None)


# --- resuming ---


def test_resumes_exactly(pictures, tmp_path):
    whole = finetune(pictures, tmp_path / "whole", "ema=0.9")
    assert main(arguments(pictures, tmp_path / "parts", "ema=0.9", "stop_after=3")) == 0
    assert not (tmp_path / "parts/native").exists()
    equal(whole, finetune(pictures, tmp_path / "parts", "ema=0.9"))
    assert log(tmp_path / "whole", "loss") == log(tmp_path / "parts", "loss")


def test_a_damaged_checkpoint_is_passed_over(pictures, tmp_path, caplog):
    whole = finetune(pictures, tmp_path / "whole")
    main(arguments(pictures, tmp_path / "run", "stop_after=3", "checkpoint_every=1", "keep_checkpoints=3"))
    newest = tmp_path / "run/checkpoints/step_0000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    before = tmp_path / "run/checkpoints/step_0000002.safetensors"
    data = bytearray(before.read_bytes())
    data[-50] ^= 1
    before.write_bytes(data)
    equal(whole, finetune(pictures, tmp_path / "run", "checkpoint_every=1", "keep_checkpoints=3"))
    assert (
        "step_0000003.safetensors is passed over" in caplog.text and "step_0000002.safetensors is passed" in caplog.text
    )


def test_a_full_disk_keeps_the_last_good_checkpoint(pictures, tmp_path, monkeypatch, caplog):
    from cleandift_backbones.distill import checkpoint

    write = checkpoint.write_file

    def full(tensors, path, metadata):
        if "step_0000004" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "write_file", full)
    finetune(pictures, tmp_path / "run")
    assert "No space left on device (the one of step 2 stands)" in caplog.text
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000002.safetensors"]


def test_another_recipe_is_refused(pictures, tmp_path, capsys):
    main(arguments(pictures, tmp_path / "run", "stop_after=2"))
    refused(pictures, tmp_path / "run", capsys, "learning_rate was 0.0002 and is 0.1", "learning_rate=0.1")
    refused(pictures, tmp_path / "run", capsys, "holds a run: use resume=auto", "resume=never")


def run_in_process(pictures, out, *overrides, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/finetune.py"), *arguments(pictures, out, *overrides)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.slow
def test_killed_ten_times(pictures, tmp_path):
    """kill -9 at random moments: the final weights are those of the run that was left alone."""
    options = ["max_steps=24", "checkpoint_every=1", "ema=0.9", "deterministic=true"]
    assert run_in_process(pictures, tmp_path / "whole", *options).wait() == 0
    draw = random.Random(0)
    for _ in range(10):
        process = run_in_process(pictures, tmp_path / "killed", *options)
        checkpoints = tmp_path / "killed/checkpoints"
        before = {p.name for p in checkpoints.glob("step_*")}
        while process.poll() is None and {p.name for p in checkpoints.glob("step_*")} == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.wait()
    assert not (tmp_path / "killed/native").exists(), "finished before it was killed ten times"
    assert run_in_process(pictures, tmp_path / "killed", *options).wait() == 0
    equal(*(load_file(tmp_path / name / "native/model.safetensors") for name in ("whole", "killed")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_first(pictures, tmp_path, number):
    """As a terminal and a launcher send it: the data workers get it too."""
    command = [sys.executable, str(ROOT / "tools/finetune.py"), *arguments(pictures, tmp_path / "run")]
    command += ["max_steps=1000", "checkpoint_every=1000", "num_workers=2", "gradient_accumulation=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run/log.jsonl").exists() or not log(tmp_path / "run", "loss"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    assert list((tmp_path / "run/checkpoints").glob("step_*.safetensors"))


def test_sigterm_saves_first(pictures, tmp_path):
    process = run_in_process(pictures, tmp_path / "run", "max_steps=1000", "checkpoint_every=1000")
    while not (tmp_path / "run/log.jsonl").exists() or len((tmp_path / "run/log.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list((tmp_path / "run/checkpoints").glob("step_*.safetensors"))


# --- faults ---


def test_losses_that_are_not_finite(pictures, tmp_path, monkeypatch, caplog):
    def poisoned(self, *args, **kwargs):
        return torch.tensor(float("nan"), requires_grad=True) * self.timestep, {}

    training = Training(load_recipe(RECIPE, arguments(pictures, tmp_path / "run", "max_skipped_steps=3")[1:]))
    training.out.mkdir()
    validate = monkeypatch.setattr(Training, "validate", lambda self: None)
    monkeypatch.setattr(type(training.module), "forward", poisoned)
    before = {n: t.clone() for n, t in training.module.student.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match=r"not finite in 3 steps in a row, up to step 2. The last batch was .*png"
    ) as error:
        training.run()
    assert validate is None and caplog.text.count("is skipped") == 3 and str(pictures) in str(error.value)
    equal(before, training.module.student.state_dict())


def test_broken_pictures_are_counted(tmp_path, capsys, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 9, 9)).save(folder / f"{number}.png")
    for number in range(2):
        (folder / f"broken{number}.jpg").write_bytes(b"no picture")
    finetune(folder, tmp_path / "run", "max_steps=4", "batch_size=4")
    assert "skipped: " in caplog.text and "broken0.jpg" in caplog.text
    refused(folder, tmp_path / "other", capsys, "more than data.max_broken=1", "data.max_broken=1", "batch_size=4")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_teachers_of_both_kinds(pictures, tmp_path, prediction):
    """SD 1.5 predicts the noise, SD 2.1 the velocity: fine-tuned teachers of either kind, in diffusers' layout."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from cleandift_backbones.models import ARCHITECTURES, ASSETS

    cfg = ARCHITECTURES["tiny"]
    torch.manual_seed(0)
    UNet2DConditionModel(**cfg["unet"]).save_pretrained(tmp_path / "sd/unet")
    DDIMScheduler(**cfg["scheduler"], prediction_type=prediction).save_pretrained(tmp_path / "sd/scheduler")
    weights = [f"teacher_weights={tmp_path / 'sd'}", "max_steps=1"]
    import cleandift_backbones.models as models

    sources = {**models.SOURCES["dift_tiny"], "vae": str(ASSETS / "dift_tiny.safetensors")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SOURCES, "dift_tiny", sources)
        state = finetune(pictures, tmp_path / "run", *weights)
    assert state["unet.conv_in.weight"].isfinite().all()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.path=/nowhere"], "no pictures in /nowhere"),
        (["maps={us11: 1}"], "unknown map 'us11'"),
        (["teacher_weights=/nowhere.safetensors"], "/nowhere.safetensors is neither a file"),
        (["device=cuda:7"], "device must be auto, cpu or cuda"),
        (["data.size=70"], "data.size=70 is no multiple of the latents' stride 4"),
        (["cache_dir=x", "data.crop=random"], "cache_dir needs data.crop=center"),
        (["heads.weights=/nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_errors_write_nothing(pictures, tmp_path, capsys, overrides, message):
    refused(pictures, tmp_path / "out", capsys, message, *overrides)
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    refused(folder, tmp_path / "out", capsys, "no pictures in")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.json").write_text('{"caption": 3}')
    refused(folder, tmp_path / "out", capsys, "a.json: a caption must be a string")
    (folder / "metadata.jsonl").write_text('{"text": "no name"}')
    refused(folder, tmp_path / "out", capsys, "metadata.jsonl: every line needs a file_name")


# --- found by a reviewer ---


def test_a_line_that_was_cut_off_does_not_stop_a_resumed_run(pictures, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(arguments(pictures, out, "stop_after=2")) == 0
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.')
    assert main(arguments(pictures, out)) == 0
    assert len(log(out, "loss")) == 4


def test_a_disk_that_takes_no_log_and_no_picture(pictures, tmp_path, monkeypatch, caplog, capsys):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cleandift_backbones.distill.monitor.save_png", full)
    monkeypatch.setattr("cleandift_backbones.distill.checkpoint.write_file", full)
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: full() if mode == "a" else opened(self, mode, *a, **k)
    )
    assert main(arguments(pictures, tmp_path / "run", "sample_every=2")) == 0
    assert "no line in" in capsys.readouterr().err and "the run goes on" in caplog.text


def test_checkpoints_behind_damaged_ones_stay(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (3, 4):
        kept.save(step, {"x": torch.zeros(2)}, {})
        kept.path(step).write_bytes(b"cut")
    (tmp_path / ".step_0000009.safetensors.part").write_bytes(b"killed")
    assert kept.load() is None
    for step in (1, 2):
        kept.save(step, {"x": torch.full((2,), float(step))}, {})
    assert kept.steps() == [2, 1] and kept.load()[0]["x"].tolist() == [2, 2]
    assert not list(tmp_path.glob(".*.part"))


def test_one_unreadable_picture_is_passed_over_at_batch_size_1(pictures, tmp_path, caplog):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "05.png").write_bytes(b"no picture")
    (folder / "05.txt").unlink()
    assert main(arguments(folder, tmp_path / "run", "batch_size=1", "max_steps=24", "data.max_broken=1")) == 0
    assert caplog.text.count("05.png") <= 2  # told once for training, once for validation, not once an epoch


def test_accumulated_batches_equal_one_of_twice_the_size(pictures, tmp_path, monkeypatch):
    """With the noise of a picture given by its place in the run."""

    def draw(self, latents, micro):
        place = (self.step * self.recipe.gradient_accumulation + micro) * self.recipe.batch_size
        noise = [
            torch.randn(3, *latents.shape[1:], generator=torch.Generator().manual_seed(place + i))
            for i in range(len(latents))
        ]
        return torch.tensor([[50, 400, 800]]).expand(len(latents), -1), torch.stack(noise)

    monkeypatch.setattr(Training, "_draw", draw)
    one = finetune(pictures, tmp_path / "one", "batch_size=2", "max_steps=2")
    two = finetune(pictures, tmp_path / "two", "batch_size=1", "gradient_accumulation=2", "max_steps=2")
    equal(one, two, rtol=1e-3, atol=1e-6)


def test_what_may_change_in_a_resumed_run(pictures, tmp_path):
    out = tmp_path / "run"
    assert main(arguments(pictures, out, "max_steps=2")) == 0
    changed = [
        "max_steps=3",
        "gradient_checkpointing=true",
        "data.max_broken=7",
        "num_workers=1",
        "max_skipped_steps=9",
    ]
    assert main([*arguments(pictures, out, *changed), "--resume", "auto", "checkpoint_every=1"]) == 0


def test_settings_are_what_they_say(pictures, tmp_path):
    given = [f"data.path={pictures}", "output_dir=~/x", "heads_learning_rate=0", "clip=0"]
    recipe = load_recipe(RECIPE, given)
    assert recipe.output_dir == str(Path.home() / "x")
    for overrides, message in (
        (["clip=-1"], "clip must be"),
        (["stop_after=-1"], "stop_after above 0"),
        (["heads.depth=0", "heads.weights=a"], "needs heads"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(RECIPE, [*given, *overrides])
    start = finetune(pictures, tmp_path / "start", "max_steps=1", "heads_learning_rate=0", "ema=0", "clip=0")
    end = finetune(pictures, tmp_path / "end", "max_steps=3", "heads_learning_rate=0", "ema=0", "clip=0")
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert "unet" in moved and "heads" not in moved


def test_adapters_load_at_their_scale(pictures, tmp_path):
    made = finetune(pictures, tmp_path / "run", "lora.rank=4", "lora.alpha=16", "ema=0", "learning_rate=0.01")
    adapters = load_file(tmp_path / "run/lora.safetensors")
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10").state_dict()
    name = next(n.removesuffix(".lora_A.weight") for n in adapters if n.endswith("attn1.to_q.lora_A.weight"))
    product = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]  # as a reader without alpha does
    plain = "unet." + name.removeprefix("unet.")
    torch.testing.assert_close(made[f"{plain}.weight"] - teacher[f"{plain}.weight"], product, rtol=1e-2, atol=1e-5)


def test_a_cache_knows_its_encoder(pictures, tmp_path):
    out = [f"cache_dir={tmp_path / 'cache'}", "max_steps=1"]
    finetune(pictures, tmp_path / "one", *out)
    before = set((tmp_path / "cache").rglob("*.safetensors"))
    teacher = timm.create_model("dift_tiny", pretrained=True, final_map="us10")
    with torch.no_grad():
        teacher.vae.encoder.conv_in.weight.mul_(1.5)
    save_native(teacher.state_dict(), tmp_path / "other.safetensors", {"model": "dift_tiny"})
    finetune(pictures, tmp_path / "two", *out, f"teacher_weights={tmp_path / 'other.safetensors'}")
    assert len(set((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(before)


def test_names_to_push_to_are_looked_at_first(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cleandift_backbones.hub.get_token", lambda: None)
    for name, message in (("a/b/c", "expected USER/REPO"), ("me/mine", "nobody is logged in")):
        with pytest.raises(SystemExit):
            main([*arguments(pictures, tmp_path / "run"), "--push-to-hub", name])
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
