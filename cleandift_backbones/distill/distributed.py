"""What Accelerate runs the distillation on: one process, DDP, FSDP or DeepSpeed, with one form of checkpoint for all.

A checkpoint names whole tensors by parameter, however they were spread: a run may go on under another engine.
"""

from __future__ import annotations

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
    DistributedType.DEEPSPEED: "deepspeed",
}


def make_accelerator(recipe: Recipe) -> Accelerator:
    """One process, or what `accelerate launch` started.

    The mixed precision is torch's autocast everywhere, so that every engine computes the same: parameters, among them
    the learned timestep, stay float32 and are not rounded on their way between processes.

    Raises:
        ValueError: an engine or a device that cannot be used, with what to choose instead.
    """
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device must be auto, cpu or cuda, got {recipe.device!r}: choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device: use device=cpu")
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    precision = precision_of(recipe)
    # Accelerate keeps one state per process, and refuses a second run of another precision (in a notebook, say).
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        # As a plugin: a number would give way to the launcher's environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation),
        # The first process may fill a cache or push to the Hub while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    kind = accelerator.distributed_type
    if kind not in KINDS:
        raise InputError(f"{kind} is not supported: use one process, DDP, FSDP 2 or DeepSpeed's ZeRO 1 or 2")
    if kind == DistributedType.FSDP:
        _set_up_fsdp(accelerator, recipe)
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, recipe, precision)
    return accelerator


def engine_of(accelerator: Accelerator) -> str:
    """one, ddp, fsdp or deepspeed."""
    return KINDS[accelerator.distributed_type]


def precision_of(recipe: Recipe) -> str:
    """no, bf16 or fp16; auto is bf16 on GPUs that have it, fp16 on others, no on the CPU."""
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def half_of(accelerator: Accelerator) -> torch.dtype | None:
    """The low precision of the mixed one, None in float32. (Accelerate believes that DeepSpeed has one of its own.)"""
    if engine_of(accelerator) == "deepspeed":
        precision = "bf16" if accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
    else:
        precision = accelerator.mixed_precision
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


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


def _set_up_deepspeed(accelerator: Accelerator, recipe: Recipe, precision: str) -> None:
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage not in (1, 2):
        raise InputError(f"ZeRO stage {plugin.zero_stage} is not supported: use stage 1 or 2, or FSDP 2")
    if precision == "fp16":
        raise InputError("DeepSpeed is used with mixed_precision=bf16 or no, got fp16")
    config = plugin.deepspeed_config
    for name in ("bf16", "fp16"):
        config.pop(name, None)
    config["torch_autocast"] = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    config["gradient_clipping"] = recipe.clip
    config["train_micro_batch_size_per_gpu"] = recipe.batch_size
    config["gradient_accumulation_steps"] = recipe.gradient_accumulation
    config["train_batch_size"] = recipe.batch_size * recipe.gradient_accumulation * accelerator.num_processes
    # Deterministic sums: buckets of gradients are reduced where they lie.
    config["zero_optimization"]["overlap_comm"] = False


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
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _pack_zero(optimizer, named)
    return {
        f"optimizer/{name}/{key}": whole(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer the state that `pack_optimizer` took, under this engine or another."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _unpack_zero(optimizer, named, tensors)
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


# --- DeepSpeed's ZeRO 1 and 2: flat partitions, with accessors by parameter ---


def _pack_zero(optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_states(optimizer)
    step = next((state["step"] for state in optimizer.optimizer.state.values() if "step" in state), torch.tensor(0.0))
    tensors = {}
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer/{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
        tensors[f"optimizer/{name}/step"] = step.clone()
    return tensors


def _link_states(optimizer) -> None:
    """Lets the accessors see the states. ZeRO does it after its first group's first step: too early for the others."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _unpack_zero(optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    step = next(value for name, value in tensors.items() if name.endswith("/step"))
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for flat in optimizer.single_partition_of_fp32_groups:
        beside = flat.device if fused else "cpu"
        moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.optimizer.state[flat] = {"step": step.to(beside, copy=True), **moments}
    _link_states(optimizer)
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, tensors[f"optimizer/{name}/{key}"].to(parameter.device), key)
