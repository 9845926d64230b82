"""What pyproject.toml cannot say: configs/ at the root belongs to the package, as cleandift_backbones/configs."""

from setuptools import find_packages, setup

FOLDERS = ("finetune", "mmseg", "mmdet")

setup(
    packages=find_packages(include=["cleandift_backbones*"]) + [f"cleandift_backbones.configs.{f}" for f in FOLDERS],
    package_dir={f"cleandift_backbones.configs.{f}": f"configs/{f}" for f in FOLDERS},
)
