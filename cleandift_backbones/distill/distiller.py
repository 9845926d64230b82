"""The method: a student on clean latents learns, through the heads, the frozen teacher's features at every timestep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..models.architectures import Defaults
from ..models.denoisers.unet import FeatureUNet
from ..models.projection_heads import ProjectionHeads
from ..utils.errors import InputError


def stratified_timesteps(
    batch: int, levels: int, generator: torch.Generator | None = None, low: int = 1, high: int = 999
) -> Tensor:
    """One integer timestep per image and bin: B x I int64 on the CPU, bin i of I equal parts of low..high."""
    edges = torch.linspace(low, high + 1, levels + 1)
    where = torch.rand((batch, levels), generator=generator)
    return (edges[:-1] + where * (edges[1:] - edges[:-1])).long().clamp(low, high)


def map_loss(student: Tensor, teacher: Tensor, kind: str = "cosine") -> Tensor:
    """Distance of maps B x C x h x w, averaged over all positions: "cosine" (negative similarity), "l1" or "l2"."""
    if kind == "cosine":
        return -F.cosine_similarity(student.float(), teacher.float(), dim=1).mean()
    if kind == "l1":
        return F.l1_loss(student.float(), teacher.float())
    if kind == "l2":
        return F.mse_loss(student.float(), teacher.float())
    raise InputError(f"loss must be cosine, l1 or l2, got {kind!r}")


class Distiller(nn.Module):
    """Teacher, student, heads and the learned timestep; its forward is the loss (CleanDIFT, eq. 3).

    Args:
        teacher: frozen; gets noised latents. student: trained; gets clean latents and the learned timestep.
        scheduler: the teacher's noise schedule.
        maps: map name -> weight in the loss.
        loss: "cosine", "l1" or "l2".
        heads: None compares features directly.
        timestep: start of the student's learned timestep.
    """

    def __init__(
        self,
        teacher: FeatureUNet,
        student: FeatureUNet,
        scheduler: DDPMScheduler,
        maps: Mapping[str, float],
        heads: ProjectionHeads | None,
        loss: str = "cosine",
        timestep: float = Defaults.timestep,
    ):
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        self.scheduler = scheduler
        self.maps, self.loss = dict(maps), loss
        self.heads = heads
        self.timestep = nn.Parameter(torch.tensor([float(timestep)]))  # FSDP shards no scalars

    #: what FSDP gathers at a time; up and down blocks are not called as such
    _no_split_modules = ("ResnetBlock2D", "BasicTransformerBlock", "ResidualBlock")

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        teacher_prompt: Tensor,
        student_prompt: Tensor,
        student_latents: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch. One student pass per image serves all of its noise levels: same loss, a third of the work.

        Args:
            latents: B x C x h x w, clean. timesteps: B x I integers. noise: B x I x C x h x w standard normal.
            teacher_prompt: B or 1 x L x D. student_prompt: the same; the empty prompt by default of the method.
            student_latents: what the student gets instead of `latents` (of a light encoder), like them.

        Returns:
            scalar loss (weighted mean over maps), and the plain loss of each map.
        """
        levels = timesteps.shape[1]
        flat = timesteps.flatten()
        noisy = self.scheduler.add_noise(latents.repeat_interleave(levels, dim=0), noise.flatten(0, 1), flat)
        with torch.no_grad():
            prompt = teacher_prompt if len(teacher_prompt) == 1 else teacher_prompt.repeat_interleave(levels, dim=0)
            target = self.teacher(noisy, flat, prompt, self.maps)
        clean = self.student(
            latents if student_latents is None else student_latents, self.timestep, student_prompt, self.maps
        )
        if self.heads is not None:
            guess = self.heads(clean, timesteps)
        else:
            guess = {name: x.repeat_interleave(levels, dim=0) for name, x in clean.items()}
        losses = {name: map_loss(guess[name], target[name], self.loss) for name in self.maps}
        total = sum(weight * losses[name] for name, weight in self.maps.items()) / sum(self.maps.values())
        return total, {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def compare(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: int,
        teacher_prompt: Tensor,
        student_prompt: Tensor,
        name: str,
        student_latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One map of the student, of the teacher on clean latents, and of the teacher on noised ones."""
        t = torch.full((len(latents),), timestep, device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        own = latents if student_latents is None else student_latents
        student = self.student(own, self.timestep, student_prompt, [name])[name]
        clean, noised = (self.teacher(x, t, teacher_prompt, [name])[name] for x in (latents, noisy))
        return student, clean, noised
