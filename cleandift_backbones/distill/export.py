"""What a run leaves: a native folder with the student, its timestep, the empty prompt, the heads, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .. import checkpoints
from ..data.listing import counted
from ..models.dift import DIFT
from ..publish import card as card_module
from ..publish import push
from ..utils.errors import DivergedError
from .distiller import Distiller
from .distributed import whole
from .lora import merged_state
from .recipe import Recipe
from .tracking import read_log


def student_state(module: Distiller) -> dict[str, Tensor]:
    """What was trained, whole, on the CPU, under native names, adapters merged; every process must ask."""
    student = module.student
    unet = merged_state(student) if hasattr(student, "peft_config") else student.state_dict()
    state = {f"unet.{name}": whole(tensor.detach()).cpu() for name, tensor in unet.items()}
    state["timestep"] = whole(module.timestep.detach()).cpu().float().reshape(())
    if module.heads is not None:
        state |= {f"heads.{name}": whole(tensor.detach()).cpu() for name, tensor in module.heads.state_dict().items()}
    return state


def untrained_state(teacher: DIFT, student_encoder: nn.Module | None) -> dict[str, Tensor]:
    """What the student has of its teacher, under native names: image encoder (or the light one) and empty prompt.

    The tensors stay as they are now, in float32 on the CPU, when the models move to another device or precision.
    """
    kept = {name: t for name, t in teacher.state_dict().items() if not name.startswith("unet.")}
    if student_encoder is None:
        return kept
    kept = {name: t for name, t in kept.items() if not name.startswith("vae.")}
    return kept | {f"vae.{name}": tensor for name, tensor in student_encoder.state_dict().items()}


def write_native(recipe: Recipe, state: Mapping[str, Tensor], adapters: Mapping[str, Tensor] | None, data: str) -> None:
    """Writes output_dir/native, and lora.safetensors beside it; pushes the folder if the recipe says so.

    Args:
        state: of `untrained_state`, and over it that of `student_state`. The UNet ends at the student's last map:
            layers of the teacher would not fit behind it.
        adapters: of `lora_state`, if there are any. data: for the card, e.g. "3000 pictures, 768 px".

    Raises:
        DivergedError: a trained tensor is not finite. Nothing is written.
    """
    out = Path(recipe.output_dir)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise DivergedError(
            f"{counted(len(broken), 'tensor')} of the trained model are not finite, first {broken[0]}: "
            f"{out / 'native'} is not written. Lower learning_rate in a new output_dir"
        )
    if adapters is not None:
        checkpoints.save.keep_other(out / "lora.safetensors")
        checkpoints.save_native(adapters, out / "lora.safetensors")
    card = card_module.CardInfo(data=data, recipe=json.loads(method(recipe)), results=final_losses(out / "log.jsonl"))
    with torch.device("meta"):
        model = timm.create_model(recipe.model, latent_encoder=recipe.latent_encoder)
    heads = {k: v for k, v in vars(recipe.heads).items() if k != "weights"} if recipe.heads.depth else None
    dtype = getattr(torch, recipe.save_dtype)
    folder = card_module.save_folder(
        model, out / "native", card, {"recipe": method(recipe)}, dtype, state=state, arguments=dict(heads=heads)
    )
    if recipe.push_to_hub:
        print(f"pushed to {push.push_to_hub(folder, recipe.push_to_hub)}")


def final_losses(log: Path) -> dict[str, str]:
    """First and last validation loss of a run's log."""
    found = [line["validation"] for line in read_log(log) if line.get("validation") is not None]
    return {"validation loss, before": f"{found[0]:.4f}", "validation loss, after": f"{found[-1]:.4f}"} if found else {}


def method(recipe: Recipe) -> str:
    """The recipe as JSON without what concerns one machine only: paths, device, workers."""
    fields = json.loads(json.dumps(vars(recipe), default=vars))
    here = ("output_dir", "cache_dir", "device", "num_workers", "resume", "push_to_hub", "report_to")
    for name in (*here, "teacher_weights", "student_weights", "latent_encoder_weights"):
        fields.pop(name)
    fields["data"] = {name: value for name, value in fields["data"].items() if name not in ("path", "heldout")}
    fields["heads"].pop("weights")
    return json.dumps(fields)
