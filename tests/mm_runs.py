"""Short real runs of mmsegmentation and mmdetection on small labelled scenes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).parents[1]


def make_scenes(folder: Path, *arguments: str) -> Path:
    """Scenes of 64 px made by the tool, from the sample pictures of the package."""
    command = [sys.executable, str(ROOT / "tools" / "tiny" / "make_scenes.py"), "--out", str(folder), "--size", "64"]
    subprocess.run([*command, "--train", "8", "--val", "4", *arguments], check=True, capture_output=True)
    return folder


def loaders(config: Config) -> list[dict]:
    return [config.train_dataloader, config.val_dataloader, config.test_dataloader]


def shortened(name: str, data: Path, work_dir: Path, **options) -> Config:
    """A shipped config on `data`, two pictures a batch, everything in one process."""
    config = Config.fromfile(ROOT / "configs" / name)
    for loader in loaders(config):
        loader.num_workers, loader.persistent_workers = 0, False
        loader.dataset.data_root = str(data)
    config.train_dataloader.batch_size = 2
    for evaluator in (config.val_evaluator, config.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = str(data / Path(evaluator.ann_file).relative_to(config.data_root))
    config.default_hooks.logger.interval = 1
    config.visualizer.name = str(work_dir)  # visualizers are kept by name for the whole process
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=0)
    config.merge_from_dict(options)
    return config


def train(config: Config) -> Runner:
    runner = Runner.from_cfg(config)
    runner.train()
    return runner
