"""What Accelerate runs the distillation on: one process, DDP or FSDP 2, with one form of checkpoint for all.

A checkpoint names whole tensors by parameter, however they were spread: a run may go on under another engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    disable_fsdp_ram_efficient_loading,
)
from torch import Tensor, nn

from ..utils.errors import InputError
from .recipe import Recipe

KINDS = {
    DistributedType.NO: "one",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.FSDP: "fsdp",
}


def make_accelerator(recipe: Recipe) -> Accelerator:
    """One process, or what `accelerate launch` started.

    The mixed precision is torch's autocast everywhere, so that every engine computes the same: parameters, among them
    the learned timestep, stay float32 and are not rounded on their way between processes.

    Raises:
        InputError: an engine or a device that cannot be used, with what to choose instead.
    """
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device must be auto, cpu or cuda, got {recipe.device!r}: choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device: use device=cpu")
    accelerator = start_accelerator(
        recipe.device == "cpu" or not torch.cuda.is_available(),
        precision_of(recipe),
        # As a plugin: a number would give way to the launcher's environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation),
        # The first process may fill a cache or push to the Hub while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        _set_up_fsdp(accelerator, recipe)
    return accelerator


def start_accelerator(cpu: bool, precision: str, **kwargs) -> Accelerator:
    """An Accelerator of these settings, on the processes that its launcher started.

    Args:
        cpu: whether to leave GPUs alone.
        precision: "no", "bf16" or "fp16".
        **kwargs: others of `accelerate.Accelerator`.

    Raises:
        InputError: the launcher, or a config file of Accelerate, asks for DeepSpeed or another unsupported engine.
    """
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if os.environ.get(variable, "").lower() == "true":  # Accelerate would ask for their packages first
            raise InputError(f"{name} is not supported: launch with --use_fsdp --fsdp_version 2, which shards as well")
    # Accelerate keeps one state per process, and refuses a second run of another precision (in a notebook, say).
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, **kwargs)
    if accelerator.distributed_type not in KINDS:
        raise InputError(f"{accelerator.distributed_type} is not supported: use one process, DDP or FSDP 2")
    return accelerator


def engine_of(accelerator: Accelerator) -> str:
    """one, ddp or fsdp."""
    return KINDS[accelerator.distributed_type]


def precision_of(recipe: Recipe) -> str:
    """no, bf16 or fp16; auto is bf16 on GPUs that have it, fp16 on others, no on the CPU."""
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def half_of(accelerator: Accelerator) -> torch.dtype | None:
    """The low precision of the mixed one, None in float32."""
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]


def autocast(accelerator: Accelerator) -> torch.autocast:
    """The run's mixed precision."""
    half = half_of(accelerator)
    return torch.autocast(accelerator.device.type, half, enabled=half is not None)


def _set_up_fsdp(accelerator: Accelerator, recipe: Recipe) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError("FSDP 1 cannot shard frozen and trained weights together: launch with --fsdp_version 2")
    if recipe.lora.rank:
        raise InputError("lora.rank needs no sharding, there is little to shard: launch without FSDP (DDP)")
    plugin.mixed_precision_policy = None
    # Every process reads the weights. With the launcher's default, text encoders would come empty but on the first one.
    plugin.cpu_ram_efficient_loading = False
    disable_fsdp_ram_efficient_loading()


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece (FSDP: every process must ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value given whole, in another tensor's device, memory layout and shards."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
    # The fused kernels want states to lie in memory as their parameters do.
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)


def pack_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """An optimizer's state as whole tensors, `optimizer/PARAMETER/KEY`; every process must ask."""
    return {
        f"optimizer/{name}/{key}": whole(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer the state that `pack_optimizer` took, under this engine or another."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for place, value in tensors.items():
        if place.startswith("optimizer/"):
            name, _, key = place.removeprefix("optimizer/").rpartition("/")
            parameter = named[name]
            if key == "step":  # a number; the fused kernels want it beside the parameter
                group = groups[id(parameter)]
                beside = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
                optimizer.state[parameter][key] = value.to(beside, copy=True)
            else:
                optimizer.state[parameter][key] = like(parameter, value)
