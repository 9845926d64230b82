"""One map of one image, in several ways on the same weights: seconds, memory, GFLOP, and how far the maps are apart."""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from cleandift_backbones import optimize
from cleandift_backbones.files import replacing
from cleandift_backbones.latents import build_latent_encoder
from cleandift_backbones.models import architecture_of
from cleandift_backbones.noisy import DIFT, seeded_noise
from cleandift_backbones.unet import map_infos


def with_new_parameters(module: nn.Module) -> nn.Module:
    """A copy whose weights lie in the same memory until they are converted: several ways fit where one would."""
    known = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo=known).eval()


class Weights:
    """A model's architecture with random weights of unit gain, drawn once for all ways.

    Args:
        model: timm name. name: of the map. device: where it runs.
    """

    def __init__(self, model: str, name: str, device: torch.device):
        self.cfg, self.entrypoint, self.name, self.device = architecture_of(model), model, name, device
        infos = map_infos(self.cfg["unet"])
        if name not in [info.name for info in infos]:
            raise SystemExit(f"--map {name}: there are {', '.join(info.name for info in infos)}")
        self.module = next(info.module for info in infos if info.name == name)
        self.index = len(infos) - 1 - [info.name for info in infos].index(name)
        with torch.device("meta"):
            self.unet = UNet2DConditionModel(**self.cfg["unet"]).eval()
            vae = dict(layers_per_block=2) | self.cfg["vae"]
            levels = len(vae["block_out_channels"])
            self.vae = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **vae
            ).eval()
            self.model = timm.create_model(model, features_only=True, out_indices=(self.index,)).eval()
        self.vae.decoder = self.vae.post_quant_conv = None
        generator = torch.Generator().manual_seed(0)
        for module in (self.unet, self.vae):
            module.to_empty(device=device).requires_grad_(False)
            for key, p in tqdm(list(module.named_parameters()), desc="weights", leave=False):
                noise = torch.randn(min(p.numel(), 1 << 18), generator=generator)  # repeated: quick, and of equal cost
                noise = noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view(p.shape)
                gain = p[0].numel() ** -0.5 if p.ndim > 1 else 0.02
                p.copy_(noise * gain + (p.ndim == 1 and key.endswith("weight")))
        state = {f"unet.{n}": p for n, p in self.unet.state_dict().items()}
        state |= {f"vae.{n}": p for n, p in self.vae.state_dict().items()}
        length, width = self.cfg["prompt_length"], self.cfg["unet"]["cross_attention_dim"]
        self.prompt = torch.randn(1, length, width, generator=generator).to(device)
        state |= dict(timestep=torch.tensor(261.0, device=device), prompt_embeds=self.prompt)
        backbone = self.model.model
        backbone.load_state_dict({key: state[key] for key in backbone.state_dict()}, assign=True)
        backbone.head.to(device)


# --- what one would write without this package ------------------------------------------------------------------


def whole(weights: Weights, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The whole UNet, the map read by a hook."""
    unet, found = weights.unet, {}
    module = unet.get_submodule(weights.module)

    def hook(_module, _arguments, output):
        found["map"] = output if torch.is_tensor(output) else output[0]

    unet_call = torch.compile(unet.forward) if compiled else unet
    scaling = weights.cfg["vae"].get("scaling_factor", 0.18215)

    def run(x: Tensor) -> Tensor:
        handle = None if compiled else module.register_forward_hook(hook)
        latents = weights.vae.encode(x).latent_dist.mean * scaling
        text = weights.prompt.expand(len(x), -1, -1)
        output = unet_call(latents, torch.full((len(x),), 261, device=x.device), text, return_dict=False)
        if handle is None:
            return output[0]  # a compiled UNet gives no map, hooks would break its graph: only its time counts
        handle.remove()
        return found.pop("map")

    run.weights = (unet, weights.vae)
    return run


def dift(weights: Weights, noises: int = 8) -> Callable[[Tensor], Tensor]:
    """DIFT's own way: each noise has its own copy of the image, encoded anew; the UNet ends after the map's block."""

    class Stop(Exception):
        pass

    settings = DIFT(architecture_of("test_cleandift") | dict(scheduler=weights.cfg["scheduler"]))
    scaling = weights.cfg["vae"].get("scaling_factor", 0.18215)
    block = weights.module if weights.name == "mid" else ".".join(weights.module.split(".")[:2])
    found = {}

    def keep(_module, _arguments, output):
        found["map"] = output if torch.is_tensor(output) else output[0]

    def stop(_module, _arguments, _output):
        raise Stop

    def run(x: Tensor) -> Tensor:
        images = x.repeat_interleave(noises, dim=0)
        latents = weights.vae.encode(images).latent_dist.mean * scaling
        noise = seeded_noise(latents, noises, 0).repeat(len(x), 1, 1, 1)
        latents = settings.signal * latents + settings.sigma * noise
        unet = weights.unet
        handles = [unet.get_submodule(weights.module).register_forward_hook(keep)]
        handles.append(unet.get_submodule(block).register_forward_hook(stop))
        with suppress(Stop):
            unet(latents, 261, weights.prompt.expand(len(latents), -1, -1))
        for handle in handles:
            handle.remove()
        return found.pop("map").unflatten(0, (len(x), noises)).mean(dim=1)

    run.weights = (weights.unet, weights.vae)
    return run


# --- this package -------------------------------------------------------------------------------------------------


def light_model(weights: Weights) -> nn.Module:
    """The model with a light latent encoder, of random weights as timm.create_model draws them."""
    model = timm.create_model(
        weights.entrypoint, features_only=True, out_indices=(weights.index,), latent_encoder="tiny", device="meta"
    ).eval()
    given = {n: t for n, t in weights.model.model.state_dict().items() if not n.startswith("vae.")}
    model.model.load_state_dict(given, strict=False, assign=True)
    torch.manual_seed(0)
    model.model.vae = build_latent_encoder(weights.cfg["vae_tiny"]).to(weights.device).requires_grad_(False)
    model.model.head.to(weights.device)
    return model.eval()


def ours(weights: Weights, light: bool = False, **options) -> Callable[[Tensor], Tensor]:
    """Ours after `optimize(**options)`; without options as timm.create_model gives it."""
    model = with_new_parameters(light_model(weights) if light else weights.model)
    if options:
        optimize(model, **options)

    def run(x: Tensor) -> Tensor:
        return model(x)[0]

    run.weights = (model,)
    return run


#: name -> (what builds it, dtype it multiplies in)
_WAYS: dict[str, tuple[Callable, torch.dtype]] = {
    "whole": (whole, torch.float32),
    "whole-compile": (partial(whole, compiled=True), torch.float32),
    "dift": (dift, torch.float32),
    "timm": (ours, torch.float32),
    "optimized": (partial(ours, fold=True), torch.float32),
    "direct": (partial(ours, winograd=False), torch.float32),
    "bf16": (partial(ours, dtype=torch.bfloat16), torch.bfloat16),
    "fp16": (partial(ours, dtype=torch.float16), torch.float16),
    "light": (partial(ours, light=True, fold=True), torch.float32),
    "light-bf16": (partial(ours, light=True, dtype=torch.bfloat16), torch.bfloat16),
    "compile": (partial(ours, compile=True), torch.float32),
    "compile-bf16": (partial(ours, compile=True, dtype=torch.bfloat16), torch.bfloat16),
    "graphs-bf16": (partial(ours, compile="reduce-overhead", dtype=torch.bfloat16), torch.bfloat16),
}
WAYS = tuple(_WAYS)


def default_ways(device: torch.device) -> list[str]:
    """All on a GPU; on a CPU those without compile, and 16 bit only where the CPU has instructions for it."""
    from cleandift_backbones.inference import slow_16bit

    def pays(way: str) -> bool:
        return "compile" not in way and "graphs" not in way and not slow_16bit(_WAYS[way][1], device)

    return [way for way in WAYS if device.type == "cuda" or pays(way)]


# --- measuring ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call, by the wall or as one thread worked; a GPU is waited for."""

    def __init__(self, device: torch.device, kind: str):
        self.device, self.read = device, time.thread_time if kind == "cpu" else time.perf_counter

    def __call__(self, function: Callable, *arguments) -> tuple[float, Tensor]:
        self.wait()
        start = self.read()
        result = function(*arguments)
        self.wait()
        return self.read() - start, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def product_speed(clock: Clock, dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product, the best of five: 2048 x 2048 on a CPU, 8192 x 8192 on a GPU."""
    side = 8192 if clock.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=clock.device).to(dtype)
    return 2 * side**3 / min(clock(torch.mm, a, a)[0] for _ in range(5)) / 1e9


def held(modules: tuple[nn.Module, ...]) -> int:
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def peak_memory(device: torch.device) -> int:
    """Highest bytes so far: of the GPU since its counter was set back, of the process since VmHWM was."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak(device: torch.device) -> int:
    """Sets the counter back; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def flop_counter() -> FlopCounterMode:
    """torch's counter, which leaves out the CPU's fused attention."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={attention: count})


def inference(options: argparse.Namespace) -> dict:
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, names = Clock(device, options.clock), options.ways or default_ways(device)
    weights = Weights(options.model, options.map, device)
    with torch.no_grad():
        runs = {name: _WAYS[name][0](weights) for name in tqdm(names, desc="ways")}
        speeds = {dtype: product_speed(clock, dtype) for dtype in {_WAYS[name][1] for name in names}}
        rows: list[dict] = []
        cases = [(size, batch) for batch in options.batch_size for size in options.size]
        bar = tqdm(total=len(cases) * len(names) * (options.repeat + 1))
        for size, batch in cases:
            x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
            case, first = [], None
            for name, run in runs.items():  # a first pass: warms up, compares, counts
                bar.set_description(f"{size} px, batch {batch}, {name}")
                before = reset_peak(device)
                compiled = "compile" in name or "graphs" in name
                with nullcontext() if compiled else flop_counter() as counter:
                    y = run(x).float()
                row = dict(way=name, size=size, batch=batch, seconds=[], weights=held(run.weights))
                row["peak"] = peak_memory(device) - before
                if not compiled:
                    row["gflop"] = counter.get_total_flops() / 1e9
                first = y if first is None else first
                # The noisy map is another one, and so is a random light encoder's.
                if y.shape == first.shape and name not in ("dift", "whole-compile") and "light" not in name:
                    row["apart"] = float((y - first).abs().max() / first.abs().max())
                    row["cosine"] = float(
                        torch.cosine_similarity(y.flatten().double(), first.flatten().double(), dim=0)
                    )
                case.append(row)
                bar.update()
            for turn in range(options.repeat):
                for row in case if turn % 2 == 0 else reversed(case):  # a busy moment does not hit one way alone
                    bar.set_description(f"{size} px, batch {batch}, {row['way']}")
                    row["seconds"].append(clock(runs[row["way"]], x)[0])
                    bar.update()
            rows += case
        bar.close()
        for dtype in speeds:  # the machine may have been busier at one end
            speeds[dtype] = max(speeds[dtype], product_speed(clock, dtype))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    for row in rows:
        row["product"] = speeds[_WAYS[row["way"]][1]]
    return dict(rows=rows, device=name, torch=torch.__version__, clock=options.clock, model=options.model)


# --- telling ------------------------------------------------------------------------------------------------------

HEAD = "way|side|batch|seconds|spread|images/s|times {}|peak, GB|weights, GB|GFLOP|GFLOP/s|of the product|apart|cosine"


def inference_table(found: dict, options: argparse.Namespace) -> str:
    first = found["rows"][0]["way"]
    columns = HEAD.format(first).split("|")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    base = {(r["size"], r["batch"]): statistics.median(r["seconds"]) for r in found["rows"] if r["way"] == first}
    for row in found["rows"]:
        seconds = statistics.median(row["seconds"])
        cells = [row["way"], str(row["size"]), str(row["batch"]), f"{seconds:.3g}"]
        cells += [f"{min(row['seconds']):.3g} to {max(row['seconds']):.3g}", f"{row['batch'] / seconds:.3g}"]
        cells += [f"{seconds / base[row['size'], row['batch']]:.3f}"]
        cells += [f"{row[key] / 2**30:.2f}" for key in ("peak", "weights")]
        speed = row.get("gflop", float("nan")) / seconds
        cells += (
            [f"{row['gflop']:.0f}", f"{speed:.0f}", f"{speed / row['product']:.2f}"] if "gflop" in row else [""] * 3
        )
        cells += [f"{row['apart']:.0e}", f"{row['cosine']:.5f}"] if "apart" in row else [""] * 2
        lines.append("| " + " | ".join(cells) + " |")
    seconds = "seconds of one thread's work" if found["clock"] == "cpu" else "seconds"
    return (
        f"{found['model']} down to {options.map}, random weights, {seconds}, medians of {options.repeat}; "
        f"{found['device']}, torch {found['torch']}. Peak: memory of a first pass beyond what was held before. GFLOP: "
        "what really runs. Apart: largest difference of the map, relative to its largest value.\n\n"
    ) + "\n".join([*lines, ""])


def plot(found: dict, path: Path) -> None:
    """Seconds per image against the side at the smallest batch, and against the batch at the smallest side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, along, other in zip(axes, ("size", "batch"), ("batch", "size")):
        fixed = min(row[other] for row in found["rows"])
        for way in dict.fromkeys(row["way"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["way"] == way and row[other] == fixed]
            rows.sort(key=lambda row: row[along])
            costs = [statistics.median(row["seconds"]) / row["batch"] for row in rows]
            axis.plot([row[along] for row in rows], costs, "o-", label=way)
        axis.set(xscale="log", yscale="log", ylabel="seconds an image")
        axis.set_xlabel("side of the image, pixels" if along == "size" else "images a batch")
        ticks = sorted({row[along] for row in found["rows"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"batch {fixed}" if along == "size" else f"{fixed} px")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{found['model']}, {found['device']}")
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)
