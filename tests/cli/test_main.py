"""The command `cleandift`: its subcommands, options that mean one thing everywhere, help, and the names of programs."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cleandift_backbones import configs
from cleandift_backbones.cli import main as command
from cleandift_backbones.cli.arguments import COMMANDS, SHARED
from cleandift_backbones.utils import guard
from cleandift_backbones.utils.errors import MissingFileError

ROOT = Path(__file__).parents[2]
CLI = ROOT / "cleandift_backbones/cli"
TASKS = ("correspondence", "knn", "retrieval", "segmentation", "depth", "noise")


def parsers():
    """(words of the command, parser) of every subcommand, of the tasks and of the suites."""
    for name in COMMANDS:
        yield name, import_module(f"cleandift_backbones.cli.{name}").parser()
    tasks = import_module("cleandift_backbones.cli.evaluate").parser()._subparsers._group_actions[0].choices
    yield from ((f"evaluate {name}", parser) for name, parser in tasks.items())
    for name in ("emoji", "photos"):
        yield f"evaluate --suite {name}", import_module(f"cleandift_backbones.cli.evaluate_{name}").parser()


def python(code, *words, folder=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *code, *map(str, words)], env=environment, cwd=folder, capture_output=True, text=True
    )


# --- the command itself ---


def test_each_subcommand_has_a_file_of_its_name():
    mains = {path.stem for path in CLI.glob("*.py") if "\ndef main(" in path.read_text()}
    assert mains - {"main", "evaluate_emoji", "evaluate_photos"} == set(COMMANDS)


@pytest.mark.parametrize("words", [["version"], ["--help"], ["finetune", "--help"], ["demo", "--help"]])
def test_what_needs_no_model_loads_no_pytorch(words):
    code = "import sys; from cleandift_backbones.cli.main import main\n"
    code += (
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    )
    done = python(["-c", code], *words)
    assert done.returncode == 0, done.stderr


def test_a_subcommand_is_imported_only_when_it_is_called():
    code = "import sys; from cleandift_backbones.cli.main import main; main(['version'])\n"
    code += "found = {name for name in sys.modules if name.startswith('cleandift_backbones.cli.')}\n"
    code += "assert found == {f'cleandift_backbones.cli.{name}' for name in ('main', 'arguments', 'version')}, found"
    assert python(["-c", code]).returncode == 0


@pytest.mark.parametrize("words, hint", [(["exract"], "did you mean extract"), (["x"], "choose one of demo, app")])
def test_a_command_that_does_not_exist(words, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2 and hint in capsys.readouterr().err


def test_without_a_command_it_helps(capsys):
    assert command.main([]) == 0
    assert all(f"  {name} " in capsys_text for capsys_text in [capsys.readouterr().out] for name in COMMANDS)


@pytest.mark.parametrize("start", [["-m", "cleandift_backbones"], ["-m", "cleandift_backbones.cli.push"]])
def test_started_as_a_module(start):
    words = ["push"] if start[-1] == "cleandift_backbones" else []
    done = python(start, *words, "no_such_folder", "me/model")
    name = "cleandift push" if words else "push.py"
    assert done.returncode == 2 and done.stderr.startswith(f"{name}: error: no_such_folder"), done.stderr


def test_errors_of_subcommands_name_them(capsys):
    for words in (["convert", "missing.safetensors", "--out", "x", "--fill", "y"], ["push"]):
        with pytest.raises(SystemExit) as stop:
            command.main(words)
        assert stop.value.code == 2 and f"cleandift {words[0]}: error: " in capsys.readouterr().err
    assert guard.program() == os.path.basename(sys.argv[0])


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["/somewhere/bin/cleandift", "demo", "--out", "a b"], "cleandift demo --out 'a b'"),
        (["tools/extract.py", "--data", "x"], "python tools/extract.py --data x"),
    ],
)
def test_the_recorded_command_can_be_typed_again(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert guard.command_line() == expected


def test_the_recorded_command_of_a_module(tmp_path):
    (tmp_path / "one.py").write_text("from cleandift_backbones.utils.guard import command_line; print(command_line())")
    assert python(["-m", "one"], "--x", folder=tmp_path).stdout == "python -m one --x\n"


def test_completion(tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'cleandift_backbones[completion]'")
    script = command.completion("bash")
    assert "--push-to-hub" in script and "correspondence" in script and "--print-completion" not in script
    (tmp_path / "complete.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "complete.sh"], check=True)


# --- options ---


def test_shared_options_mean_one_thing():
    """The same metavar and first words of help; earlier spellings are accepted, and not shown."""
    seen = set()
    for name, parser in parsers():
        text, known = re.sub(r"\s+", " ", parser.format_help()), parser._option_string_actions
        for flag, (hidden, shared) in SHARED.items():
            if flag not in known or (name.startswith("evaluate") and flag == "--dtype"):  # there once --store-dtype
                continue
            action = known[flag]
            seen.add(flag)
            assert flag == action.option_strings[0] and len(action.option_strings) == 1, (name, flag)
            start = "maps" if (name, flag) == ("finetune", "--map") else shared["help"]
            assert action.help.startswith(start), (name, flag, action.help)
            assert action.choices or action.metavar in (shared["metavar"], "FILE", "MODEL=FILE"), (name, flag)
            for other in hidden:
                assert known[other] is action and not re.search(rf"{other}\b(?!-)", text.partition("examples:")[0])
    assert seen == {*SHARED}


def test_earlier_spellings():
    at = dict(parsers())
    assert at["extract"].parse_args(shlex.split("--model m --data d --out o --timestep 3")).timestep == 3
    demo = at["demo"].parse_args(shlex.split("--images a b --maps us6 us3 --random-weights"))
    assert demo.data == ["a", "b"] and demo.map == ["us6", "us3"] and demo.random_weights
    assert at["app"].parse_args(["--models", "a", "b"]).models == ["a", "b"]
    assert at["convert"].parse_args(shlex.split("x --out o --timestep 1")).timesteps == "1"
    task = at["evaluate knn"].parse_args(shlex.split("--models a b --data d --maps mid --dtype float32"))
    assert task.model == ["a", "b"] and task.map == ["mid"] and task.dtype == "float32"
    for name in ("emoji", "photos"):
        words = shlex.split(f"--suite {name} --data d --models a --maps us6 --timesteps 1,2")
        found = at[f"evaluate --suite {name}"].parse_args(words)
        assert found.models == ["a"] and found.maps == ["us6"] and found.timesteps == [1, 2]


def test_every_help_teaches():
    """A summary, examples at the end which the parser takes, and defaults."""
    for name, parser in parsers():
        if name not in COMMANDS:
            continue
        text = parser.format_help()
        summary = COMMANDS[name]
        assert f"{summary[0].upper()}{summary[1:]}." in text, name
        lines = [line.strip() for line in text.partition("\nexamples:\n")[2].splitlines()]
        examples = [shlex.split(line) for line in lines if not line.startswith("#")]
        assert examples and all(words[:2] == ["cleandift", name] for words in examples), name
        for _, _, *words in examples:
            if words == ["knn", "--help"]:
                continue
            chosen = parser
            if "--suite" in words:
                chosen = import_module(f"cleandift_backbones.cli.evaluate_{words[words.index('--suite') + 1]}").parser()
            chosen.parse_intermixed_args(words) if name == "finetune" else chosen.parse_args(words)
    assert "(default: demo)" in dict(parsers())["demo"].format_help()
    assert "(default: float16)" in dict(parsers())["extract"].format_help()


# --- models and version ---


def test_models(capsys):
    assert command.main(["models", "dift_tiny", "cleandift_tiny_pyramid", "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["name"] == "dift_tiny" and one["kind"] == "noisy" and one["architecture"] == "tiny" and one["included"]
    assert one["maps"][0] == dict(name="us10", channels=48, stride=4) and one["default_map"] == "us6"
    assert one["input_size"] == 128 and 6e6 < one["parameters"] < 8e6 and one["license"] == "apache-2.0"
    assert len(other["maps"]) == 5 and other["kind"] == "clean" and other["trained_on"].startswith("emoji")
    assert command.main(["models", "cleandift_tiny"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "name" and "included" in line
    with pytest.raises(SystemExit):
        command.main(["models", "resnet50"])
    assert "resnet50" in capsys.readouterr().err


def test_version(capsys):
    assert command.main(["version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    import timm
    import torch

    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["timm"] == timm.__version__
    assert found["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")


# --- packaged configs ---


def test_configs_are_found_by_name():
    assert configs.find("finetune/cleandift_tiny") == ROOT / "configs/finetune/cleandift_tiny.yaml"
    assert configs.find("mmseg/_base_/schedules/80k.py").is_file()
    assert {"finetune/base", "mmdet/retinanet_cleandift-tiny_fpn_8xb2-1x_coco"} < {*configs.names()}
    assert not [name for name in configs.names() if "_base_" in name]
    with pytest.raises(MissingFileError, match="did you mean finetune/cleandift_sd21"):
        configs.find("finetune/cleandift_sd2")
