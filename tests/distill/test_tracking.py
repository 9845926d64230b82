"""Metrics of a run reach log.jsonl and every tracker that the recipe names, and a tracker that fails costs no step."""

import json

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from finetune_runs import RECIPE, finetune, log, refused

from cleandift_backbones.distill import tracking
from cleandift_backbones.distill.recipe import load_recipe, save_recipe


class Board(GeneralTracker):
    """What W&B would get."""

    name, requires_logging_directory = "wandb", False
    begun, settings, values, images, ended = [], {}, {}, [], 0
    broken = False

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.place = (run_name, kwargs)

    @property
    def tracker(self):
        return None

    def start(self):
        if self.broken == "at the start":
            raise RuntimeError("nobody is logged in")
        Board.begun.append(self.place)

    def store_init_configuration(self, values):
        Board.settings = values

    def log(self, values, step=None, **kwargs):
        if self.broken:
            raise RuntimeError("the server is gone")
        for name, value in values.items():
            Board.values.setdefault(name, {})[step] = value

    def log_images(self, values, step=None, **kwargs):
        Board.images.append((step, {name: image.shape for name, image in values.items()}))

    def finish(self):
        Board.ended += 1


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "wandb", Board)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [*get_available_trackers(), LoggerType.WANDB])
    for name, empty in dict(begun=[], settings={}, values={}, images=[], ended=0, broken=False).items():
        monkeypatch.setattr(Board, name, empty)
    return Board


def test_a_tracker_gets_what_the_log_gets(pictures, tmp_path, board):
    finetune(pictures, tmp_path / "run", "max_steps=2", "report_to=wandb", "sample_every=2", "validate_every=1")
    assert board.begun == [("cleandift_backbones", {"name": "run"})] and board.ended == 1
    assert board.settings["learning_rate"] == 2e-4 and board.settings["data.size"] == 64
    assert all(isinstance(value, int | float | str) for value in board.settings.values())
    for name, logged in (("loss", "loss"), ("loss/us6", "loss_map_us6"), ("validation", "validation")):
        lines = [round(value, 6) for value in board.values[name].values()]
        assert lines == log(tmp_path / "run", logged) and len(lines) == (3 if name == "validation" else 2)
    assert [(step, *images) for step, images in board.images] == [(2, "features")]
    assert board.images[0][1]["features"][0] == 1 and board.images[0][1]["features"][-1] == 3


def test_a_tracker_that_fails_later_costs_no_step(pictures, tmp_path, board, caplog, capsys):
    board.broken = "later"
    finetune(pictures, tmp_path / "run", "max_steps=2", "report_to=[wandb]")
    assert len(log(tmp_path / "run", "loss")) == 2
    assert "wandb is not written: the server is gone; the run goes on" in caplog.text
    board.broken = "at the start"
    message = "wandb: a tracker does not start (nobody is logged in): log in there"
    refused(pictures, tmp_path / "other", capsys, message, "report_to=wandb")


def test_trackers_that_are_not_there(pictures, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    for name, message in (("wandb", "pip install wandb"), ("paper", "no such tracker; give some of ")):
        refused(pictures, tmp_path / "run", capsys, message, f"report_to={name}")
        assert not (tmp_path / "run").exists()
    assert tracking.choose_trackers(True, None) == [] and "pip install tensorboard" in caplog.text


def test_the_log_keeps_small_numbers(tmp_path):
    """A rate of 2e-6 that warms up, say."""
    tracker = tracking.JsonLog(tmp_path / "log.jsonl", 0)
    tracker.start()
    tracker.log(
        {"lr": 5.12345e-9, "loss/us6": 0.12345678, "timestep": 261.0008851, "bad": float("nan"), "n": [1, 2]}, 3
    )
    line = {"step": 3, "lr": 5.123e-9, "loss_map_us6": 0.123457, "timestep": 261.000885, "bad": None, "n": [1, 2]}
    assert [json.loads(found) for found in (tmp_path / "log.jsonl").read_text().splitlines()] == [line]


def test_a_recipe_that_an_earlier_version_wrote_is_ours(tmp_path):
    """It has no report_to, and a run that goes on replaces it."""
    recipe = load_recipe(RECIPE, [f"data.path={tmp_path}", f"output_dir={tmp_path}"])
    path = tmp_path / "recipe.yaml"
    save_recipe(recipe, path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "report_to" not in line))
    save_recipe(recipe, path)
    assert [found.name for found in tmp_path.iterdir()] == ["recipe.yaml"]
