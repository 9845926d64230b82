"""Parts of training loops (seeds, rate, average), and the loop of the small model's trainings: it stops and goes on."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cleandift_backbones.distill.loop import EMA, lr_factor
from cleandift_backbones.utils import seeding
from cleandift_backbones.utils.errors import InputError
from cleandift_backbones.utils.seeding import batch_indices, step_generator
from tools.tiny import training
from tools.tiny.arguments import add_run_arguments


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
        with ema.applied():  # an export within a report
            assert torch.allclose(layer.weight, expected)
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
