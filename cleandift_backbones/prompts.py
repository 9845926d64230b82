"""Text -> prompt embeddings. A text encoder is loaded only when somebody gives text; transformers is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class PromptEncoder:
    """Tokenizer and text encoder of a Stable Diffusion, on the CPU in float32.

    Args:
        source: a folder in diffusers' layout or a Hub repository, with `tokenizer/` and `text_encoder/`.

    Raises:
        ImportError: transformers is not installed.
        OSError: the source is not there or holds no text encoder.
    """

    def __init__(self, source: str | Path):
        try:
            from transformers import AutoTokenizer, CLIPTextModel
        except ImportError as error:
            raise ImportError("prompts need transformers: pip install 'cleandift_backbones[text]'") from error
        try:
            with torch.device("cpu"):  # a model under construction may have made meta the default device
                self.tokenizer = AutoTokenizer.from_pretrained(str(source), subfolder="tokenizer")
                encoder = CLIPTextModel.from_pretrained(str(source), subfolder="text_encoder", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no text encoder could be loaded from {source} (a folder or Hub repository with tokenizer/ and "
                f"text_encoder/ is wanted): {str(error).splitlines()[0]}"
            ) from error
        self.encoder = encoder.float().eval()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """One or more prompts -> N x L x C, padded or cut to the tokenizer's length L: the last hidden state.

        Raises:
            TypeError: texts are not strings.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompts must be strings, got {texts!r}")
        length = self.tokenizer.model_max_length
        with torch.device("cpu"), torch.no_grad():
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            return self.encoder(tokens.input_ids).last_hidden_state
