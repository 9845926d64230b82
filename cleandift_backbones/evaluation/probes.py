"""Linear probes: a 1x1 convolution trained on stored features.

The paper leaves the optimiser open. Ours: channels standardised by the training set's mean and deviation (folded into
the convolution afterwards, so that what comes out is a plain 1x1 convolution), AdamW, learning rate 1e-3 falling to 0
along a half cosine, weight decay 1e-4, 16 pictures a step, 10 epochs, features read from disk in an order drawn by the
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..utils.progress import tqdm
from .features import MapFeatures
from .task import Options, option


@dataclass
class ProbeSettings:
    """How a probe is trained."""

    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class ProbeOptions(Options):
    """Options of the tasks that train a probe."""

    epochs: int = option(10, "of the probe", low=1)
    learning_rate: float = option(1e-3, "of the probe", low=1e-9)
    probe_batch: int = option(16, "pictures per step of the probe", low=1)

    def probe_settings(self, seed: int) -> ProbeSettings:
        """As `train_probe` takes them."""
        return ProbeSettings(self.epochs, self.probe_batch, self.learning_rate, seed=seed)


def statistics(features: MapFeatures | Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over all maps C x h x w: two of C."""
    count, total, squares = 0, 0.0, 0.0
    for i in range(len(features)):
        x = features[i].double().flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(1e-12).sqrt().float()


def train_probe(
    features: MapFeatures | Sequence[torch.Tensor],
    outputs: int,
    loss: Callable[[torch.Tensor, list[int]], torch.Tensor | None],
    settings: ProbeSettings | None = None,
    progress: bool | str = True,
) -> nn.Conv2d:
    """Trains a 1x1 convolution C -> outputs.

    Args:
        features: maps C x h x w of all training pictures.
        loss: (outputs N x K x h x w, indices of the N pictures) -> the number to be made small, or None for nothing to
            learn from.
        progress: shows a bar; a string is its label.
    """
    settings = settings or ProbeSettings()
    mean, deviation = statistics(features)
    generator = torch.Generator().manual_seed(settings.seed)
    conv = nn.Conv2d(len(mean), outputs, 1)
    with torch.no_grad():
        conv.weight.normal_(0, 0.01, generator=generator)
        conv.bias.zero_()
    optimiser = torch.optim.AdamW(conv.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(features) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: (1 + math.cos(math.pi * n / steps)) / 2)
    label = progress if isinstance(progress, str) else "probe"
    with tqdm(total=steps, desc=label, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(settings.epochs):
            for part in torch.randperm(len(features), generator=generator).split(settings.batch_size):
                # in the order of the files: neighbours lie together
                indices = sorted(part.tolist())
                x = torch.stack([features[i].float() for i in indices])
                x = (x - mean[:, None, None]) / deviation[:, None, None]
                value = loss(conv(x), indices)
                if value is not None:
                    optimiser.zero_grad()
                    value.backward()
                    optimiser.step()
                schedule.step()
                bar.update()
    with torch.no_grad():
        conv.weight.div_(deviation[:, None, None])
        conv.bias.sub_((conv.weight[..., 0, 0] * mean).sum(1))
    return conv.eval().requires_grad_(False)
