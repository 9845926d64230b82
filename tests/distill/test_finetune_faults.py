"""Distillations that are stopped, killed, damaged or badly told: they resume exactly, and nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standins
import timm
import torch
from finetune_runs import RECIPE, ROOT, arguments, equal, finetune, log, refused
from PIL import Image
from safetensors.torch import load_file

from cleandift_backbones.checkpoints import save_native
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.distill.export import write_native
from cleandift_backbones.distill.recipe import changed_settings, load_recipe
from cleandift_backbones.distill.train import Training
from cleandift_backbones.utils.errors import CleanDIFTError
from tools.finetune import main

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
    assert "No space left on device" in caplog.text and "(what was saved before stays)" in caplog.text
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000002.safetensors"]


def test_another_recipe_is_refused(pictures, tmp_path, capsys):
    main(arguments(pictures, tmp_path / "run", "stop_after=2"))
    refused(pictures, tmp_path / "run", capsys, "learning_rate was 0.0002 and is 0.1", "learning_rate=0.1")
    refused(pictures, tmp_path / "run", capsys, "holds a run: use resume=auto", "resume=never")
    refused(pictures, tmp_path / "run", capsys, "data.flip was True and is False", "data.flip=false")


def test_a_field_that_earlier_runs_did_not_know_has_its_default():
    before = {"data": {"path": "a", "flip": True}, "seed": 0}
    now = {"data": {"path": "a", "flip": True, "more": None}, "seed": 0, "loss": "cosine"}
    assert changed_settings(before, now) == {}
    now["data"]["more"], now["loss"] = ["b"], "l1"
    assert changed_settings(before, now) == {"data.more": (None, ["b"]), "loss": ("cosine", "l1")}


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
    options = ["max_steps=1000", "checkpoint_every=1000", "num_workers=2", "gradient_accumulation=4"]
    process = run_in_process(pictures, tmp_path / "run", *options, start_new_session=True)
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


@pytest.mark.parametrize(
    "field", ["learning_rate=inf", "timestep=nan", "timestep=1000", "weight_decay=inf", "maps={us6: inf}"]
)
def test_numbers_that_no_training_can_use_are_refused(pictures, tmp_path, field):
    with pytest.raises(CleanDIFTError, match=r"must be (a finite number|in 0\.\.999), got"):
        load_recipe(RECIPE, arguments(pictures, tmp_path / "run", field)[1:])


def test_a_model_that_is_not_finite_is_not_written(pictures, tmp_path):
    recipe = load_recipe(RECIPE, arguments(pictures, tmp_path / "run")[1:])
    state = {"unet.a": torch.ones(2), "timestep": torch.tensor(float("nan"))}
    with pytest.raises(
        CleanDIFTError, match=r"not finite, first timestep: .*native is not written.*ower learning_rate"
    ):
        write_native(recipe, state, None, "")
    assert not (tmp_path / "run/native").exists()


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

    from cleandift_backbones.models.architectures import ARCHITECTURES, published

    cfg = ARCHITECTURES["tiny"]
    torch.manual_seed(0)
    UNet2DConditionModel(**cfg.denoiser.config).save_pretrained(tmp_path / "sd/unet")
    DDIMScheduler(**cfg.schedule.config, prediction_type=prediction).save_pretrained(tmp_path / "sd/scheduler")
    weights = [f"teacher_weights={tmp_path / 'sd'}", "max_steps=1"]
    sources = {**published("dift_tiny"), "vae": published("dift_tiny")["unet"]}
    with pytest.MonkeyPatch.context() as patch:
        standins.publish(patch, "dift_tiny", **sources)
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
        (["cache_dir=x", "data.crop=random"], "data.crop is random in this recipe: add data.crop=center"),
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


# --- what else goes wrong ---


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

    monkeypatch.setattr("cleandift_backbones.distill.tracking.save_png", full)
    monkeypatch.setattr("cleandift_backbones.distill.checkpoint.write_file", full)
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: full() if mode == "a" else opened(self, mode, *a, **k)
    )
    assert main(arguments(pictures, tmp_path / "run", "sample_every=2")) == 0
    assert "log.jsonl is not written" in caplog.text and "samples/ is not written" in caplog.text


def test_checkpoints_behind_damaged_ones_stay(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (3, 4):
        kept.save(step, {"x": torch.zeros(2)}, {})
        kept.path(step).write_bytes(b"cut")
    (tmp_path / ".step_0000009.safetensors.0123456789ab.part").write_bytes(b"killed")
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
        (["stop_after=-1"], "stop_after must be above 0"),
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
    monkeypatch.setattr("cleandift_backbones.publish.push.get_token", lambda: None)
    for name, message in (("a/b/c", "expected USER/REPO"), ("me/mine", "nobody is logged in")):
        with pytest.raises(SystemExit):
            main([*arguments(pictures, tmp_path / "run"), "--push-to-hub", name])
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
