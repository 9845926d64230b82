"""Tasks register themselves; `evaluate` is the command as a Python call."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import cleandift_backbones
from cleandift_backbones.cli import evaluate as command
from cleandift_backbones.errors import CleanDIFTError, InputError
from cleandift_backbones.evaluation.api import EvaluateConfig, evaluate
from cleandift_backbones.evaluation.task import TASKS, Options, Task, defaults, option, register_task

pytest.importorskip("matplotlib")
PACKAGE = Path(cleandift_backbones.__file__).parent
ROOT = PACKAGE.parent


@pytest.fixture
def classes(tmp_path):
    for number in range(6):
        path = tmp_path / "data" / ("red" if number % 2 else "blue") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (230 - 9 * number, 20, 20) if number % 2 else (20, 20, 230 - 9 * number)).save(path)
    return tmp_path / "data"


@pytest.fixture
def registry(monkeypatch):
    """Tasks that a test registers are gone after it."""
    before = dict(TASKS)
    yield TASKS
    TASKS.clear()
    TASKS.update(before)


def test_no_other_file_asks_for_the_name_of_a_task():
    names = "|".join(sorted(TASKS))
    asks = re.compile(rf"task\w*(?:\.\w+)? ?(?:==|!=|in) ?\(?[\"'](?:{names})[\"']")
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "tasks"]
    assert not [path.name for path in files if asks.search(path.read_text())]


def test_the_call_does_what_the_command_does(classes, tmp_path, capsys):
    config = EvaluateConfig(size=64, device="cpu", progress=False)
    result = evaluate("pixels", "knn", classes, tmp_path / "call", config, k=(1, 3))
    assert [path.name for path in result.paths] == ["knn.json", "knn.md", "knn.png"]
    words = ["knn", "--model", "pixels", "--size", "64", "--device", "cpu", "--data", classes, "--k", "1,3"]
    command.main([*map(str, words), "--out", str(tmp_path / "command")])
    one, other = (json.loads((tmp_path / name / "knn.json").read_text())["runs"][0] for name in ("call", "command"))
    assert one["maps"] == other["maps"] and "leave-one-out kNN accuracy, k=3" in one["maps"]["pixels"]
    assert result.lines[0] == TASKS["knn"].text and result.lines[0] in capsys.readouterr().out


def test_the_config_is_frozen_and_travels():
    config = EvaluateConfig(maps="us6", timesteps=261)
    assert pickle.loads(pickle.dumps(config)) == config and config.maps == ("us6",) and config.timesteps == (261,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 96


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(task="nkk"), "task 'nkk' is unknown; choose one of correspondence, knn"),
        (dict(task="knn", ks=3), "knn has no option ks; its options are: k, weighted, per_class, train"),
        (dict(task="knn", k=0), "--k 0 is out of range; give 1 or more"),
        (dict(task="knn", k=()), "--k is empty"),
        (dict(task="correspondence", resize="crop"), "--resize 'crop' is unknown; choose one of squash, pad"),
        (dict(task="correspondence", soft_argmax=4), "no middle pixel"),
    ],
)
def test_wrong_options_are_refused_before_any_work(classes, tmp_path, given, words):
    with pytest.raises(CleanDIFTError, match=words):
        evaluate("pixels", data=classes, out=tmp_path / "out", **given)
    with pytest.raises(CleanDIFTError, match="--batch-size 0 is out of range"):
        EvaluateConfig(batch_size=0)
    assert not (tmp_path / "out").exists()


def test_tasks_are_registered_once(registry):
    with pytest.raises(InputError, match="a task is called 'knn' already"):
        register_task(type("Other", (Task,), dict(name="knn")))

    @dataclasses.dataclass(frozen=True)
    class MyOptions(Options):
        most: int = option(3, "how many", low=1)
        deep: bool = option(False, "or not")

    register_task(type("Mine", (Task,), dict(name="mine", about="of mine", Options=MyOptions, limit=5)))
    args = command.parser().parse_args(["mine", "--model", "pixels", "--data", "x", "--deep"])
    assert args.limit == 5 and command.config_of(args)[1] == {"most": 3, "deep": True}
    assert defaults(MyOptions) == {"most": 3, "deep": False}


def test_the_task_of_the_page(registry, tmp_path, monkeypatch, capsys):
    """docs/add_a_task.md: its class, the call and the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "cleandift_backbones").symlink_to(PACKAGE)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_a_task.md").read_text(), re.S):
        exec(code, names)
    runs = names["result"].report.rows
    rates = {run.label: next(iter(run.results.values()))["nearest is the same thing"].rate for run in runs}
    assert rates.keys() == {"pixels", "cleandift_tiny"} and all(0 <= rate <= 1 for rate in rates.values())
    assert "| features | nearest is the same thing (%) |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_features(classes, tmp_path):
    """Under torchrun: each computes its share into one store, the first measures, and there is one report."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(ROOT / "tools/evaluate.py")]
    words = ["retrieval", "--model", "pixels", "random:test_resnet", "--data", classes, "--size", 64, "--k", 1]
    given = [*map(str, words), "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *launcher, *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("recall@k: the share") == 1
    shards = [path.name for path in (tmp_path / "out/features").glob("*/features-*.safetensors")]
    assert len(shards) == 4 and {name.split("-")[1] for name in shards} == {"00000", "00001"}
    alone = evaluate(words[2:4], "retrieval", classes, tmp_path / "alone", EvaluateConfig(size=64, device="cpu"), k=1)
    shared = json.loads((tmp_path / "out/retrieval.json").read_text())["runs"]
    assert [run["maps"] for run in shared] == [run["maps"] for run in json.loads(alone.paths[0].read_text())["runs"]]
