"""One map of one image, in several ways on the same weights: seconds, memory, GFLOP, and how far the maps are apart."""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cleandift_backbones.optimization.cpu_malloc import keep_freed_memory, return_freed_memory
from cleandift_backbones.utils.atomic import replacing
from cleandift_backbones.utils.progress import tqdm

from .ways import WAYS, Weights, default_ways


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
    """GFLOP/s of ten matrix products in a row, 2048 x 2048 on a CPU, 8192 x 8192 on a GPU."""
    side = 8192 if clock.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=clock.device).to(dtype)
    out = a @ a

    def products() -> None:
        for _ in range(10):
            torch.mm(a, a, out=out)

    return 10 * 2 * side**3 / clock(products)[0] / 1e9


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
    """Sets the counter back; returns the bytes held now, by tensors that is: what is free goes back before."""
    gc.collect()
    return_freed_memory()
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
    kept = device.type == "cuda" or (not options.return_memory and keep_freed_memory())
    clock, names = Clock(device, options.clock), options.ways or default_ways(device)
    weights = Weights(options.model, options.map, device)
    rows: list[dict] = []
    with torch.no_grad():
        runs = {name: WAYS[name].build(weights) for name in tqdm(names, desc="ways")}
        dtypes = {name: WAYS[name].dtype for name in names}
        speeds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes.values()}
        cases = [(size, options.batch_size[0]) for size in options.size]
        cases += [(options.size[0], batch) for batch in options.batch_size[1:]]
        bar = tqdm(total=len(cases) * len(names) * (options.repeat + 1))
        for size, batch in cases:
            x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
            case, expected = [], None
            for name, run in runs.items():
                bar.set_description(f"{size} px, batch {batch}, {name}")
                row, y = first_pass(run, x, device, WAYS[name].compiled)
                row |= dict(way=name, size=size, batch=batch, seconds=[], weights=held(run.weights))
                if WAYS[name].same_map:
                    expected = y if expected is None else expected
                    row["apart"] = float((y - expected).abs().max() / expected.abs().max())
                    flat = y.flatten().double(), expected.flatten().double()
                    row["cosine"] = float(torch.cosine_similarity(*flat, dim=0))
                case.append(row)
                bar.update()
            for turn in range(options.repeat):
                for row in case if turn % 2 == 0 else reversed(case):  # a busy moment does not hit one way alone
                    bar.set_description(f"{size} px, batch {batch}, {row['way']}")
                    row["seconds"].append(clock(runs[row["way"]], x)[0])
                    bar.update()
                for dtype, found in speeds.items():  # there and then: the machine may be busier at one end
                    found.append(product_speed(clock, dtype))
            rows += case
        bar.close()
    for row in rows:
        row["product"] = statistics.median(speeds[dtypes[row["way"]]])
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    facts = dict(device=name, torch=torch.__version__, clock=options.clock, model=options.model, memory_kept=kept)
    return dict(rows=rows, **facts)


def first_pass(run: Callable, x: Tensor, device: torch.device, compiled: bool) -> tuple[dict, Tensor]:
    """Warms up; returns the bytes that a pass takes, its GFLOP, and the map in float32."""
    run(x[:, :, :64, :64])  # what is made once, by any first pass, belongs to no way
    for _ in range(2 if compiled else 0):  # compiled, and recorded as a CUDA graph
        run(x)
    before = reset_peak(device)
    with nullcontext() if compiled else flop_counter() as counter:
        y = run(x).float()
    peak = peak_memory(device) - before
    if compiled:  # the counter sees what torch calls, and nothing inside a graph: it gets the same pass without
        with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
            run(x)
    return dict(peak=peak, gflop=counter.get_total_flops() / 1e9), y


# --- telling ------------------------------------------------------------------------------------------------------

HEAD = (
    "way|side|batch|seconds|spread|images/s|times {}|peak, GiB|weights, GiB|GFLOP|GFLOP/s|of the product|apart|cosine"
)


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
        speed = row["gflop"] / seconds
        cells += [f"{row['gflop']:.0f}", f"{speed:.0f}", f"{speed / row['product']:.2f}"]
        cells += [f"{row['apart']:.0e}", f"{row['cosine']:.5f}"] if "apart" in row else [""] * 2
        lines.append("| " + " | ".join(cells) + " |")
    seconds = "seconds of one thread's work" if found["clock"] == "cpu" else "seconds"
    return (
        f"{found['model']} down to {options.map}, random weights, {seconds}, medians of {options.repeat}; "
        f"{found['device']}, torch {found['torch']}; freed memory is {'kept' if found['memory_kept'] else 'returned'} "
        "between passes. Peak: memory of a pass beyond the weights. GFLOP: what really runs. Apart: largest difference "
        "of the map, relative to its largest value.\n\n"
    ) + "\n".join([*lines, ""])


def plot(found: dict, path: Path) -> None:
    """Seconds per image against the side at the first batch size, and against the batch size at the first side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, along, other in zip(axes, ("size", "batch"), ("batch", "size")):
        fixed = found["rows"][0][other]
        for way in dict.fromkeys(row["way"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["way"] == way and row[other] == fixed]
            rows.sort(key=lambda row: row[along])
            costs = [statistics.median(row["seconds"]) / row["batch"] for row in rows]
            axis.plot([row[along] for row in rows], costs, "o-", label=way)
        axis.set(xscale="log", yscale="log", ylabel="seconds an image")
        axis.set_xlabel("side of the image, pixels" if along == "size" else "images a batch")
        ticks = sorted({row[along] for row in found["rows"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(f"batch {fixed}" if along == "size" else f"{fixed} px")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{found['model']}, {found['device']}")
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)
