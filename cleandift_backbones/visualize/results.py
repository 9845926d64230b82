"""What every result can do: be drawn, be saved, and say which lines of Python make it again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from safetensors.torch import save

from ..publish.training_data import training_data
from ..utils.atomic import replacing
from ..utils.errors import InputError
from .features import Spec
from .pictures import Picture

SUFFIXES = (".png", ".safetensors")


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute in the calling thread alone: small sums wait longer for helpers than they take, and come out
    the same, bit by bit, whatever the number of cores. A decorator, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Result:
    """The base of Match, Maps and Comparison, which hold what was asked and what was found."""

    function: ClassVar[str]  # of cleandift_backbones.visualize, that makes such a result
    device = "cpu"  # that the features were computed on
    pictures: Sequence[Picture]

    def arguments(self) -> dict:
        """Of the function, without the pictures; what stands at its default may be left out."""
        raise NotImplementedError

    @property
    def trained_on(self) -> str:
        """What the model's weights were trained on, see `training_data.training_data`; "" where it is not known."""
        return training_data(self.arguments()["model"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All numbers of the result, by name."""
        raise NotImplementedError

    def figure(self) -> Image.Image:
        """The result as one labelled picture."""
        raise NotImplementedError

    def recipe(self) -> str:
        """Three lines of Python that make this result again, where the pictures lie in the working folder."""
        names = [picture.name for picture in self.pictures]
        asked = self.arguments() | (dict(device=self.device) if self.device != "cpu" else {})
        given = ", ".join([repr(names), *(f"{name}={value!r}" for name, value in asked.items())])
        stem = self.function
        while {f"{stem}{suffix}" for suffix in SUFFIXES} & {name.lower() for name in names}:
            stem += "_again"  # a picture of the visitor's has that name: it is not to be written over
        saved = ", ".join(f'result.save("{stem}{suffix}")' for suffix in SUFFIXES)
        return (
            f"from cleandift_backbones.visualize import {self.function}\nresult = {self.function}({given})\n{saved}\n"
        )

    def encoded(self, suffix: str) -> bytes:
        """The result as a file: ".png" its figure, ".safetensors" its tensors, with the arguments as metadata.

        Raises:
            ValueError: another suffix.
        """
        if suffix == ".png":
            buffer = io.BytesIO()
            self.figure().save(buffer, format="PNG", compress_level=5)
            return buffer.getvalue()
        if suffix == ".safetensors":
            asked = dict(result=self.function, pictures=[p.name for p in self.pictures]) | self.arguments()
            metadata = dict(cleandift_backbones=json.dumps(asked))  # one key: the order of several is random
            return save({name: x.contiguous() for name, x in self.tensors().items()}, metadata)
        raise InputError(f"a result is saved as {' or '.join(SUFFIXES)}, not as {suffix!r}")

    def save(self, path: str | Path) -> None:
        """Writes the result to a .png or .safetensors file."""
        content = self.encoded(Path(path).suffix)
        with replacing(path) as aside:
            aside.write_bytes(content)


def model_arguments(spec: Spec) -> dict:
    """Arguments that name what features were computed by."""
    given = dict(model=spec.model)
    if spec.prompt:
        given["prompt"] = spec.prompt
    if spec.timestep is not None:
        given |= dict(timestep=spec.timestep, ensemble_size=spec.ensemble_size)
    return given
