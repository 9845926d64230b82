"""Progress bars: on a terminal as tqdm draws them, in a log file whole lines and no escape codes."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_eval_command import evaluate

from cleandift_backbones.utils import progress


def test_every_bar_is_one_of_these():
    root = Path(progress.__file__).parents[2]
    files = [path for folder in ("cleandift_backbones", "tools") for path in (root / folder).rglob("*.py")]
    assert len(files) > 80
    assert not [path for path in files if "from tqdm" in path.read_text(encoding="utf-8")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def nested(file):
    for _ in progress.tqdm(range(2), desc="runs", file=file, mininterval=0):
        with progress.tqdm(total=3, desc="images", unit="img", file=file, leave=False, mininterval=0) as bar:
            for _ in range(3):
                bar.update()
        progress.tqdm.write("a message", file=file)


def test_a_log_has_whole_lines_alone(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    file = io.StringIO()
    nested(file)
    lines = file.getvalue().splitlines()
    assert all(re.fullmatch(r"(runs|images): \d/\d (it|img), .* left|a message", line) for line in lines)
    assert "images: 2/3 img, 00:00, 00:00 left" in lines and lines.count("a message") == 2
    assert re.match(r"runs: 2/2 it", lines[-1])


def test_a_short_task_leaves_nothing_in_a_log():
    file = io.StringIO()
    nested(file)
    assert file.getvalue() == "a message\n" * 2


def test_a_terminal_has_bars():
    file = Terminal()
    nested(file)
    assert "\r" in file.getvalue() and "100%|" in file.getvalue()


@pytest.mark.parametrize("task", [["correspondence"], ["noise", "--noises", "2"]])
def test_nested_bars_of_evaluate_leave_no_blank_lines_in_a_log(tmp_path, monkeypatch, capsys, task):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{name}.png")
    points = [[10, 10], [40, 40]]
    pair = dict(source="a.png", target="b.png", source_points=points, target_points=points)
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    models = ["dift_tiny", "random:dift_tiny"] if task[0] == "noise" else ["pixels", "random:test_vit"]
    data = tmp_path if task[0] == "noise" else tmp_path / "pairs.json"
    given = [*task, "--data", data, "--out", tmp_path / "out", "--size", "64", "--model", *models]
    evaluate(monkeypatch, *given)
    log = capsys.readouterr().err
    assert "\x1b" not in log and "\r" not in log
    assert all(line.strip() for line in log.splitlines())
