"""Numbers that are not weights, in modules: they keep float32 when the module is converted to 16 bit."""

from __future__ import annotations

from torch import nn


class KeepsNumbers(nn.Module):
    """A module whose buffers named in `numbers` stay in float32, unrounded, through half() and to(bfloat16).

    `checkpoints.dtypes.NUMBERS` lists them for files.
    """

    numbers: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.numbers}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            setattr(self, name, now.float() if tensor.is_meta or now.is_meta else tensor.float().to(now.device))
        return self
