"""One process of a run on a CPU: engine_ranks.py ENGINE FOLDER recipe overrides..., started by torch.distributed.run.

Accelerate lets FSDP run on accelerators alone, though it works on a CPU: its state is set here, with the settings that
`accelerate launch --use_fsdp` leaves in it.
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from cleandift_backbones.distill import distributed
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.distill.train import Training

kind, folder, *arguments = sys.argv[1:]
plain = distributed.Accelerator


def announce(kind, **state):
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = kind
    AcceleratorState._shared_state.update(state)


def with_fsdp(*args, **kwargs):
    accelerator = plain(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(os.environ.get("VERSION", 2)),
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
    )
    announce(DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


distributed.Accelerator = {"ddp": plain, "fsdp": with_fsdp}[kind]
training = Training(load_recipe(arguments[0], arguments[1:]))
assert training.engine == kind and training.accelerator.num_processes == 2
sharded = sum(hasattr(p, "full_tensor") for p in training.module.parameters())
assert (sharded > 0) == (kind == "fsdp"), sharded
training.accelerator.end_training = lambda: None  # the shards are looked at first
code = training.run()
state = {name: distributed.whole(tensor).contiguous() for name, tensor in training.module.student.state_dict().items()}
save_file(state, f"{folder}/{kind}{training.accelerator.process_index}.safetensors")
torch.distributed.destroy_process_group()
sys.exit(code)
