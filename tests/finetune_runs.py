"""Small runs of tools/finetune.py, for the tests of the distillation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tools.finetune import main

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/finetune/cleandift_tiny.yaml")
FAST = [
    "data.size=64", "data.background=white", "batch_size=2", "num_workers=0", "max_steps=4", "checkpoint_every=2",
    "validate_every=100", "sample_every=0", "log_every=1", "device=cpu", "save_dtype=float32", "tensorboard=false",
    "text=empty", "heads.depth=1",
]  # fmt: skip


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
