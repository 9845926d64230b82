"""The wheel is whole: built, installed into a new environment outside of the checkout, and used there.

The environment has its own site-packages, with the wheel in it, and takes other packages from this one.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "cleandift_backbones", "configs", "tools")
FAST = [
    "data.size=64", "batch_size=2", "num_workers=0", "max_steps=2", "sample_every=0", "validate_every=100",
    "tensorboard=false", "text=empty", "heads.depth=1", "--device", "cpu",
]  # fmt: skip

pytestmark = pytest.mark.slow


def call(*words, folder=None, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **variables)
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy: a checkout may hold files of former builds
        source, target = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder]
    call(sys.executable, "-m", "pip", "wheel", *build, folder / "source")
    shutil.rmtree(folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of the new environment."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    places |= {str(Path(spec.origin).parents[1]) for name in ("torch", "mmengine") if (spec := find_spec(name))}
    (packages / "others.pth").write_text("\n".join(places))  # of these folders .pth files are not read
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    call(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel)
    return folder / "bin"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory, pictures):
    """Runs a program of the new environment in one folder, in which `images` are."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(pictures, folder / "images")

    def run(program, *words):
        return call(installed / program, *words, folder=folder)

    run.folder = folder
    return run


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if ".dist-info" not in top} == {"cleandift_backbones"}
    assert not [name for name in names if "/tools/" in name or "/tests/" in name]
    sources = {f"cleandift_backbones/{path.relative_to(ROOT)}": path for path in (ROOT / "configs").rglob("*")}
    sources |= {str(path.relative_to(ROOT)): path for path in (ROOT / "cleandift_backbones").rglob("*")}
    wanted = {name for name, path in sources.items() if path.is_file() and "__pycache__" not in name}
    assert len(wanted) > 200 and not wanted - {*names}


def test_it_is_the_wheel_that_is_imported(installed, run):
    code = "import cleandift_backbones as package, cleandift_backbones.configs as configs, sys\n"
    code += "print(package.__file__, configs.FOLDER, 'torch' in sys.modules)"
    package, configs, torch = run("python", "-c", code).split()
    assert Path(package).is_relative_to(installed.parent) and Path(configs).is_relative_to(installed.parent)
    assert torch == "False"


def test_version_and_models(run):
    found = json.loads(run("cleandift", "version", "--json"))
    assert found["cleandift_backbones"] and found["torch"] and found["device"]
    assert not Path(found["configs"]).is_relative_to(ROOT)
    listed = json.loads(run("cleandift", "models", "cleandift_tiny", "dift_tiny", "--json"))
    assert [one["included"] for one in listed] == [True, True]


def test_demo(run):
    images = sorted((run.folder / "images").glob("*.png"))[:2]
    run("cleandift", "demo", "--data", *images, "--out", "figures", "--map", "us6", "--size", 64, "--device", "cpu")
    assert (run.folder / "figures/clean_vs_noisy_00_01.png").is_file()


def test_extract(run):
    given = ["--model", "cleandift_tiny", "--map", "us6", "--size", 64, "--workers", 0, "--device", "cpu"]
    printed = run("cleandift", "extract", *given, "--data", "images", "--out", "features")
    assert "features holds the features of 12 images" in printed
    command = json.loads((run.folder / "features/meta.json").read_text())["info"]["command"]
    assert command.startswith("cleandift extract --model cleandift_tiny")


def test_finetune_and_convert(run):
    run("cleandift", "finetune", "cleandift_tiny", "--data", "images", "--out", "run", *FAST)
    trained = load_file(run.folder / "run/native/model.safetensors")
    assert "wrote converted/model" in run("cleandift", "convert", "run/native", "--out", "converted")
    converted = load_file(run.folder / "converted/model.safetensors")
    assert converted["unet.conv_in.weight"].equal(trained["unet.conv_in.weight"])


def test_accelerate_and_torchrun(run):
    """Launchers take modules of the installed package."""
    given = ["cleandift_backbones.cli.finetune", "cleandift_tiny", "--data", "images", *FAST]
    run("python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", *given, "--out", "launched")
    assert (run.folder / "launched/native/model.safetensors").is_file()
    run("python", "-m", "torch.distributed.run", "--nproc-per-node", 1, "-m", *given, "--out", "torchrun")
    assert (run.folder / "torchrun/native/model.safetensors").is_file()


MMSEG = """
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from cleandift_backbones import configs

config = Config.fromfile(configs.find("mmseg/linear_cleandift-tiny_1xb8-500_scenes"))
backbone = MODELS.build(config.model.backbone)
print([tuple(one.shape) for one in backbone(torch.zeros(1, 3, 64, 64))], config.model.decode_head.in_channels)
"""


def test_mmseg_config(run):
    pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'cleandift_backbones[mmseg]'")
    assert run("python", "-c", MMSEG).strip().endswith("[(1, 112, 8, 8)] 112")
