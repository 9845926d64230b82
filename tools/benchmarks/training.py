"""A step of the distillation: the public recipe beside this package's."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from cleandift_backbones.distill.distiller import Distiller, map_loss, stratified_timesteps
from cleandift_backbones.distill.lora import add_lora
from cleandift_backbones.models.architectures import Architecture, spec_of
from cleandift_backbones.models.latents import LatentEncoder
from cleandift_backbones.models.projection_heads import ProjectionHeads
from cleandift_backbones.utils.progress import tqdm


class Plain(Distiller):
    """The public recipe, written plainly: each noise level has its own pass of the student over the clean image."""

    def forward(self, latents, timesteps, noise, teacher_prompt, student_prompt):
        levels, flat = timesteps.shape[1], timesteps.flatten()
        repeated = latents.repeat_interleave(levels, dim=0)
        noisy = self.scheduler.add_noise(repeated, noise.flatten(0, 1), flat)
        with torch.no_grad():
            target = self.teacher(noisy, flat, teacher_prompt, self.maps)
        clean = self.student(repeated, self.timestep, student_prompt, self.maps)
        condition = self.heads.condition(flat)
        losses = {n: map_loss(self.project(self.heads.adapters[n], x, condition), target[n]) for n, x in clean.items()}
        return sum(losses.values()) / len(losses), losses

    @staticmethod
    def project(head, x, condition):
        tokens = x.flatten(2).transpose(1, 2)
        for block in head.layers:
            y, gate = block.up_proj(block.norm(tokens, condition)).chunk(2, dim=-1)
            tokens = tokens + block.down_proj(y * F.silu(gate))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def make_distillers(arch: Architecture, device: torch.device) -> dict[str, Distiller]:
    """The plain way and ours, on the same weights."""
    torch.manual_seed(0)
    teacher, student = arch.denoiser.build(), arch.denoiser.build()
    maps = {info.name: 1.0 for info in student.infos}
    heads = ProjectionHeads({info.name: info.channels for info in student.infos})
    for parameter in heads.adapters.parameters():  # at their start the heads are the identity
        torch.nn.init.normal_(parameter, std=0.02)
    parts = teacher, student, arch.schedule.scheduler(), maps, heads
    return {"plain": Plain(*parts).to(device).train(), "this package": Distiller(*parts).to(device).train()}


class Kept:
    """Bytes that autograd keeps for the backward pass, parameters not counted, each storage once."""

    def __init__(self, module: torch.nn.Module):
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.held: dict[int, int] = {}

    def __enter__(self) -> Kept:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.held[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)

    @property
    def megabytes(self) -> float:
        return sum(self.held.values()) / 2**20


def training(options: argparse.Namespace) -> dict:
    arch = spec_of(options.model).arch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here
    stride = 2 ** (len(arch.vae["block_out_channels"]) - 1)
    size, batch = (options.size or 128) // stride, options.batch_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, size, size, generator=generator).to(device)
    timesteps = stratified_timesteps(batch, 3, generator).to(device)
    noise = torch.randn(batch, 3, 4, size, size, generator=generator).to(device)
    prompt = torch.randn(1, arch.conditions.length, arch.conditions.width, generator=generator).to(device)
    arguments = latents, timesteps, noise, prompt, prompt

    distillers = make_distillers(arch, device)
    vae = LatentEncoder(arch.vae).to(device, memory_format=torch.channels_last).eval()
    images = torch.rand(batch, 3, size * stride, size * stride, generator=generator).to(device) * 2 - 1

    def prepare(way: str) -> Distiller:
        module = distillers["plain" if way.startswith("plain") else "this package"]
        # channels_last is what tools/finetune.py does
        module.to(memory_format=torch.contiguous_format if way.startswith("plain") else torch.channels_last)
        module.student.grad_checkpointing = "checkpointing" in way
        if "LoRA" in way and not hasattr(module.student, "peft_config"):
            add_lora(module.student, 64).to(device)
        return module

    def step(way: str, module: Distiller) -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in way):
            if "encoding" in way:
                with torch.no_grad():
                    vae(images.contiguous(memory_format=torch.channels_last))
            loss = module(*arguments)[0]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    def look(way: str, module: Distiller) -> dict:
        """A first step: what it keeps, its loss, and how far its gradients are from the plain way's."""
        with Kept(module) as kept, torch.autocast(device.type, torch.bfloat16, enabled="bf16" in way):
            loss = module(*arguments)[0]
        del loss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = float(step(way, module))
        row = dict(seconds=[], activations=kept.megabytes, loss=loss)
        if device.type == "cuda":
            row["peak"] = torch.cuda.max_memory_allocated() / 2**20
        # A thousand entries of each: whole gradients of two SD UNets would not fit many machines.
        gradients = {
            name: p.grad.flatten()[:: max(1, p.numel() // 1000)].cpu().clone()
            for name, p in module.named_parameters()
            if p.grad is not None
        }
        if way == "plain":
            row["gradients"] = gradients
        elif "LoRA" not in way:
            base = rows["plain"]
            norm = sum(g.double().square().sum() for g in base["gradients"].values()).sqrt()
            apart = sum((gradients[n] - g).double().square().sum() for n, g in base["gradients"].items()).sqrt()
            row |= dict(loss_apart=abs(loss - base["loss"]), gradients_apart=float(apart / norm))
        return row

    ways = ["plain", "this package", "this package, checkpointing", "this package, encoding pictures"]
    if device.type == "cuda":
        ways += ["plain, bf16", "this package, bf16", "this package, bf16, checkpointing"]
    rows: dict[str, dict] = {}
    for timed in (ways, ["this package, LoRA"]):  # adapters do not come off again
        for way in tqdm(timed, desc="first steps"):
            rows[way] = look(way, prepare(way))
        for _ in tqdm(range(options.repeat), desc="timing"):  # in turn: a busy moment does not hit one of them alone
            for way in timed:
                module = prepare(way)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                clock = time.perf_counter()
                step(way, module)
                rows[way]["seconds"].append(time.perf_counter() - clock)
    del rows["plain"]["gradients"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return dict(rows=rows, device=name, size=options.size or 128, batch=batch)


def training_table(found: dict, options: argparse.Namespace) -> str:
    rows = found["rows"]
    peak = "peak" in rows["plain"]
    head = ["way", "images/s", "spread", "times plain", "activations, MB", "times plain"] + ["peak, GB"] * peak
    head += ["loss apart", "gradients apart"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for way, row in rows.items():
        base = rows["plain, bf16" if "bf16" in way else "plain"]
        seconds = statistics.median(row["seconds"])
        cells = [
            way,
            f"{found['batch'] / seconds:.2f}",
            f"{found['batch'] / max(row['seconds']):.2f} to {found['batch'] / min(row['seconds']):.2f}",
            f"{statistics.median(base['seconds']) / seconds:.2f}",
            f"{row['activations']:.0f}",
            f"{row['activations'] / base['activations']:.2f}",
        ]
        cells += [f"{row['peak'] / 1024:.1f}"] if peak else []
        cells += [f"{row[key]:.1e}" if key in row else "" for key in ("loss_apart", "gradients_apart")]
        lines.append("| " + " | ".join(cells) + " |")
    return (
        f"{options.model}, {found['size']} px, batch {found['batch']}, 3 noise levels, 11 maps, FiLM heads, medians of "
        f"{options.repeat}; {found['device']}, torch {torch.__version__}\n\n" + "\n".join(lines) + "\n"
    )
