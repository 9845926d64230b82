"""The named constants of a prompt that a denoiser is conditioned on. A model holds each as a persistent buffer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextConditions:
    """Hidden states of one text encoder, as Stable Diffusion 1 and 2 take them.

    Attributes:
        length: tokens that a prompt is padded or cut to.
        width: channels of the hidden states.
    """

    length: int
    width: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of the buffer -> shape for one prompt."""
        return {"prompt_embeds": (1, self.length, self.width)}
