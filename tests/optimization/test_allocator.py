"""Freed memory is kept for the next pass, and given back when asked."""

import importlib
import subprocess
import sys

import pytest

from cleandift_backbones.optimization import cpu_malloc

pytestmark = pytest.mark.skipif(cpu_malloc._glibc() is None, reason="glibc only")

FAULTS = """
import resource, sys, torch
from pathlib import Path
from cleandift_backbones.optimization.cpu_malloc import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def faults(passes=5):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(passes):
        torch.ones(100 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

if sys.argv[1] == "keep":
    assert keep_freed_memory()
elif sys.argv[1].startswith("optimize"):
    import timm, cleandift_backbones

    model = timm.create_model("test_cleandift", features_only=True).eval()
    cleandift_backbones.optimize(model, **{"optimize, keep": dict(keep_memory=True)}.get(sys.argv[1], {}))
faults(10)
print(faults())
kept = resident()
return_freed_memory()
print(kept - resident())
"""


@pytest.mark.slow
def test_a_second_pass_takes_no_new_pages_if_that_was_asked_for():
    """optimize() alone leaves the process's allocator as it is."""
    found = {}
    for way in ("keep", "default", "optimize", "optimize, keep"):
        out = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout
        found[way] = [int(line) for line in out.split()]
    for way in ("default", "optimize"):
        assert found[way][0] > 5 * 25_000 * 0.9  # pages of 4 KiB of five times 100 MiB
    for way in ("keep", "optimize, keep"):
        assert found[way][0] < found["default"][0] / 4 and found[way][1] > 99 << 20  # given back when asked


@pytest.mark.parametrize("module, arguments", [
    ("extract", ["--model", "nobody", "--data", "nowhere", "--out", "there"]),
    ("evaluate", ["noise", "--model", "nobody", "--data", "nowhere", "--out", "there"]),
])  # fmt: skip
def test_the_commands_ask_for_it_where_they_optimise(module, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, asked = importlib.import_module(f"cleandift_backbones.cli.{module}"), []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: asked.append(True))
    for more in ([], ["--no-optimize"]):
        with pytest.raises(SystemExit):
            command.main([*arguments, *more])
    assert asked == [True]


def test_other_libraries(monkeypatch):
    monkeypatch.setattr(cpu_malloc, "_glibc", lambda: None)
    assert cpu_malloc.keep_freed_memory() is False and cpu_malloc.return_freed_memory() is None
