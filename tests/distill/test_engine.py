"""Engines of the distillation, really run on two processes: DDP and FSDP give the weights of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from finetune_runs import arguments, equal, finetune
from safetensors.torch import load_file

from cleandift_backbones.distill import distributed
from cleandift_backbones.distill.recipe import Recipe, load_recipe
from cleandift_backbones.utils.errors import InputError

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/finetune/cleandift_tiny.yaml")
GIVEN = ["max_steps=3", "ema=0.9", "gradient_accumulation=2", "mixed_precision=no", "sample_every=3"]


def launched(kind, pictures, folder, out, *overrides, options=("--nproc_per_node=2", "--standalone")):
    """The launcher of one machine, started."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "tests/engine_ranks.py")]
    command += [kind, str(folder), *arguments(pictures, folder / out, *GIVEN, "batch_size=1", *overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_two_processes(kind, pictures, folder, *overrides):
    process = launched(kind, pictures, folder, "two", *overrides)
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 0, said[-4000:]


def on_two_machines(pictures, folder, outs, *overrides):
    """Two launchers with a process each, which find each other by address; what each wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    machines = [
        launched("ddp", pictures, folder, out, *overrides, options=[*common, f"--node_rank={rank}"])
        for rank, out in enumerate(outs)
    ]
    said = [machine.communicate(timeout=400)[1] for machine in machines]
    return [machine.returncode for machine in machines], said


@pytest.fixture(scope="module")
def joint(pictures, tmp_path_factory):
    """The weights that one process makes of the joint batch."""
    return finetune(pictures, tmp_path_factory.mktemp("joint") / "one", *GIVEN, "batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_joint_batch(kind, joint, pictures, tmp_path):
    """Stopped after two steps and resumed, each engine from its own checkpoint."""
    on_two_processes(kind, pictures, tmp_path, "stop_after=2")
    assert not (tmp_path / "two/native").exists()
    on_two_processes(kind, pictures, tmp_path)
    first, second = (load_file(tmp_path / f"{kind}{rank}.safetensors") for rank in range(2))
    equal(first, second)
    made = load_file(tmp_path / "two/native/model.safetensors")
    equal(made, joint, rtol=1e-3, atol=1e-5)
    assert list((tmp_path / "two/samples").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_student_on_a_light_encoder(kind, pictures, tmp_path):
    """Its latents reach it through every engine's wrapper."""
    given = ["latent_encoder=tiny", "max_steps=2", f"cache_dir={tmp_path / 'cache'}"]
    one = finetune(pictures, tmp_path / "one", *GIVEN, "batch_size=2", *given)
    on_two_processes(kind, pictures, tmp_path, *given)
    equal(load_file(tmp_path / "two/native/model.safetensors"), one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_under_another_engine(joint, pictures, tmp_path):
    on_two_processes("fsdp", pictures, tmp_path, "stop_after=1")
    on_two_processes("ddp", pictures, tmp_path)
    equal(load_file(tmp_path / "two/native/model.safetensors"), joint, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_machines(joint, pictures, tmp_path):
    codes, said = on_two_machines(pictures, tmp_path, ["two", "two"], "stop_after=2")
    assert codes == [0, 0], said
    codes, said = on_two_machines(pictures, tmp_path, ["two", "other"])
    assert 0 not in codes and "not the same on all machines: give a shared folder" in said[0] + said[1]
    codes, said = on_two_machines(pictures, tmp_path, ["two", "two"])
    assert codes == [0, 0], said
    equal(load_file(tmp_path / "two/native/model.safetensors"), joint, rtol=1e-3, atol=1e-5)


class Told:
    """An Accelerator as a launcher would have it, without its processes."""

    def __init__(self, kind, **plugins):
        self.distributed_type, self.num_processes = kind, 2
        self.state = type("State", (), plugins)


@pytest.mark.parametrize(
    "told, overrides, message",
    [
        (Told(DistributedType.MEGATRON_LM), [], "MEGATRON_LM is not supported: use one process, DDP or FSDP 2"),
        (Told(DistributedType.DEEPSPEED), [], "DEEPSPEED is not supported: use one process, DDP or FSDP 2"),
        (Told(DistributedType.FSDP, fsdp_plugin=type("P", (), {"fsdp_version": 1})), [], "--fsdp_version 2"),
        (Told(DistributedType.FSDP, fsdp_plugin=type("P", (), {"fsdp_version": 2})), ["lora.rank=4"], "without FSDP"),
    ],
)
def test_what_no_engine_can_do_is_said_first(monkeypatch, told, overrides, message):
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: told)
    with pytest.raises(ValueError, match=message):
        distributed.make_accelerator(load_recipe(RECIPE, ["data.path=x", "output_dir=y", "device=cpu", *overrides]))


def test_deepspeed_is_refused_with_what_to_use_instead(monkeypatch):
    """What `accelerate launch --use_deepspeed`, or a config file of Accelerate, leaves in the environment."""
    given = ["data.path=x", "output_dir=y", "device=cpu"]
    with pytest.raises(InputError, match="no field deepspeed.*; DeepSpeed is not supported: launch with FSDP 2"):
        load_recipe(RECIPE, [*given, "deepspeed.zero_stage=2"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed is not supported: launch with --use_fsdp --fsdp_version 2"):
        distributed.make_accelerator(load_recipe(RECIPE, given))


def test_precision_of_a_recipe():
    given = ["data.path=x", "output_dir=y"]
    assert load_recipe(RECIPE, [*given, "mixed_precision=no"]).mixed_precision == "no"  # YAML reads a bare no as false
    assert distributed.precision_of(Recipe(mixed_precision="auto", device="cpu")) == "no"
    assert distributed.precision_of(Recipe(mixed_precision="fp16")) == "fp16"


def test_optimizer_states_go_by_name():
    """Whatever the order of the parameters, and in the memory layout of each."""
    conv = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    named = dict(conv.named_parameters())
    one = torch.optim.AdamW([named["weight"], named["bias"]])
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    one.step()
    packed = distributed.pack_optimizer(one, named)
    assert set(packed) == {f"optimizer/{n}/{k}" for n in named for k in ("exp_avg", "exp_avg_sq", "step")}
    other = torch.optim.AdamW([named["bias"], named["weight"]])
    distributed.unpack_optimizer(other, named, {name: tensor.contiguous() for name, tensor in packed.items()})
    for parameter in named.values():
        for key, value in one.state[parameter].items():
            torch.testing.assert_close(other.state[parameter][key], value)
            assert other.state[parameter][key].stride() == value.stride()
