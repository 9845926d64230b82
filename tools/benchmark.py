#!/usr/bin/env python
"""Measures this package on your machine, beside what one would use without it. All ratios are within one run.

    python tools/benchmark.py loading                  a random cleandift_sd21 in 16 bit (1.8 GB, in a temporary folder)
    python tools/benchmark.py loading --file my.safetensors --model cleandift_sd15 --repeat 5
    python tools/benchmark.py training                 a step of the distillation: cleandift_tiny at 128 px, batch 8
    python tools/benchmark.py training --model cleandift_sd21 --size 128 --batch-size 1

`loading` compares, each in a process of its own, cold (the file is dropped from the page cache) and warm:
  safetensors   safetensors.torch.load_file, then every page of every tensor read
  this package  timm.create_model(MODEL, pretrained=True, dtype="auto"), then the same
  float32       the same with the default dtype
  plain         random float32 weights built, load_state_dict of the whole file, .half()
Loading time is without imports. Memory is what the process holds more than after them, mapped file pages included.

`training` compares forward and backward of one batch, random weights, in turn, on the GPU if there is one:
  plain         the public recipe: the student runs once per noise level
  this package  one student pass per image serves all noise levels; also with gradient checkpointing, LoRA, bf16 (GPU)
All take cached latents; "encoding pictures" is the cost without a cache. Loss (between -1 and 1, absolutely) and
gradients (relatively) are compared with plain's; activations are the tensors that autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tqdm import tqdm

from cleandift_backbones import checkpoints
from cleandift_backbones.distill.lora import add_lora
from cleandift_backbones.distill.module import Distiller, map_loss, stratified_timesteps
from cleandift_backbones.files import write_text
from cleandift_backbones.heads import ProjectionHeads
from cleandift_backbones.latents import LatentEncoder
from cleandift_backbones.models import architecture_of
from cleandift_backbones.unet import FeatureUNet

WAYS = ("safetensors", "this package", "float32", "this package, us6", "plain")


def random_native(path: Path, model: str) -> None:
    """Writes a native file of a model in 16 bit, with random numbers."""
    import diffusers

    cfg = architecture_of(model)
    with torch.device("meta"):
        shapes = timm.create_model(model, final_map="us10").state_dict()
        unet = diffusers.UNet2DConditionModel(**cfg["unet"]).state_dict()
    shapes |= {f"unet.{name}": tensor for name, tensor in unet.items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half() * 0.02
    state = {n: noise.repeat(-(-t.numel() // len(noise)))[: t.numel()].reshape(t.shape) for n, t in shapes.items()}
    state["timestep"] = torch.tensor(261.0)
    checkpoints.save_native(state, path, {"model": model})


def memory(what: str) -> float:
    """RSS in MB: "VmRSS" now, "VmHWM" the highest so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def load_once(way: str, file: str, model: str) -> dict:
    """Loads in this process; returns seconds, and MB held at the end and at the highest."""
    overlay = dict(pretrained_cfg_overlay=dict(file=file))
    timm.create_model("test_cleandift")  # imports
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, clock = memory("VmRSS"), time.perf_counter()
    if way == "safetensors":
        held = load_file(file)
    elif way == "plain":
        built = timm.create_model(model, final_map="us10")
        state = load_file(file)
        built.load_state_dict({name: state[name] for name in built.state_dict()})
        built.half()
        held = built.state_dict()
    else:
        kwargs = dict(features_only=True, out_indices=(4,)) if way.endswith("us6") else dict(final_map="us10")
        dtype = None if way == "float32" else "auto"
        held = timm.create_model(model, pretrained=True, dtype=dtype, **kwargs, **overlay).state_dict()
    for tensor in held.values():
        tensor.reshape(-1).view(torch.uint8)[::2048].sum()  # reads every page
    seconds = time.perf_counter() - clock
    return dict(seconds=seconds, held=memory("VmRSS") - before, peak=memory("VmHWM") - before)


def loading(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=options.temporary) as folder:
        file = Path(options.file) if options.file else Path(folder, "model.safetensors")
        if not options.file:
            random_native(file, options.model)
        rows: dict[str, dict[str, list[dict]]] = {way: {"cold": [], "warm": []} for way in WAYS}
        for _ in range(options.repeat):
            for way in WAYS:  # in turn, so that a busy moment does not hit one of them alone
                for state in ("cold", "warm"):
                    with open(file, "rb") as handle:
                        if state == "cold":
                            os.fsync(handle.fileno())
                            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    command = [sys.executable, __file__, "loading-once", way, str(file), options.model]
                    run = subprocess.run(command, check=True, capture_output=True, text=True)
                    rows[way][state].append(json.loads(run.stdout.splitlines()[-1]))
                took = {state: f"{runs[-1]['seconds']:.2f} s" for state, runs in rows[way].items()}
                print(f"{way}: {took['cold']} cold, {took['warm']} warm")
        size = file.stat().st_size / 2**20
    return dict(size=size, rows=rows)


# --- training -----------------------------------------------------------------------------------------------------


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


def make_distillers(cfg: dict, device: torch.device) -> dict[str, Distiller]:
    """The plain way and ours, on the same weights."""
    torch.manual_seed(0)
    teacher, student = FeatureUNet.build(cfg["unet"], "us10"), FeatureUNet.build(cfg["unet"], "us10")
    maps = {info.name: 1.0 for info in student.infos}
    heads = ProjectionHeads({info.name: info.channels for info in student.infos})
    for parameter in heads.adapters.parameters():  # at their start the heads are the identity
        torch.nn.init.normal_(parameter, std=0.02)
    parts = teacher, student, DDPMScheduler(**cfg["scheduler"]), maps, heads
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
    cfg = architecture_of(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here
    stride = 2 ** (len(cfg["vae"]["block_out_channels"]) - 1)
    size, batch = (options.size or 128) // stride, options.batch_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, size, size, generator=generator).to(device)
    timesteps = stratified_timesteps(batch, 3, generator).to(device)
    noise = torch.randn(batch, 3, 4, size, size, generator=generator).to(device)
    prompt = torch.randn(1, cfg["prompt_length"], cfg["unet"]["cross_attention_dim"], generator=generator).to(device)
    arguments = latents, timesteps, noise, prompt, prompt

    distillers = make_distillers(cfg, device)
    vae = LatentEncoder(cfg["vae"]).to(device, memory_format=torch.channels_last).eval()
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


# --- the command --------------------------------------------------------------------------------------------------


def loading_table(found: dict, options: argparse.Namespace) -> str:
    def median(way: str, state: str, what: str) -> float:
        return statistics.median(run[what] for run in found["rows"][way][state])

    lines = [
        "| way | seconds, cold | seconds, warm | times safetensors, cold | warm | MB held | peak / file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        seconds = {state: median(way, state, "seconds") for state in ("cold", "warm")}
        ratio = {state: seconds[state] / median("safetensors", state, "seconds") for state in seconds}
        held, peak = (
            median(way, "warm", "held"),
            max(run["peak"] for s in ("cold", "warm") for run in found["rows"][way][s]),
        )
        lines.append(
            f"| {way} | {seconds['cold']:.2f} | {seconds['warm']:.2f} | {ratio['cold']:.2f} | {ratio['warm']:.2f} | "
            f"{held:.0f} | {peak / found['size']:.2f} |"
        )
    return (
        f"{options.model}, a file of {found['size']:.0f} MB, medians of {options.repeat}; "
        f"torch {torch.__version__}, {os.cpu_count()} cores\n\n" + "\n".join(lines) + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loading", "training"), help="what to measure")
    parser.add_argument("--model", help="timm model name (loading: cleandift_sd21; training: cleandift_tiny)")
    parser.add_argument("--file", help="loading: native file of the model (default: a random one)")
    parser.add_argument("--temporary", help="loading: folder for the random file")
    parser.add_argument("--size", type=int, help="training: side of the images in pixels (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="training: images a step (default: 8)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--out", type=Path, help="folder for WHAT.md and WHAT.json")
    options = parser.parse_args(arguments)
    options.model = options.model or {"loading": "cleandift_sd21", "training": "cleandift_tiny"}[options.what]
    measure, tell = {"loading": (loading, loading_table), "training": (training, training_table)}[options.what]
    found = measure(options)
    text = tell(found, options)
    print("\n" + text)
    if options.out:
        write_text(options.out / f"{options.what}.md", text)
        write_text(options.out / f"{options.what}.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["loading-once"]:
        print(json.dumps(load_once(*sys.argv[2:])))
    else:
        sys.exit(main())
