"""Text -> prompt embeddings. A text encoder is loaded only when somebody gives text; transformers is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def encode_prompts(texts: str | Sequence[str], source: str | Path) -> Tensor:
    """Encodes prompts as Stable Diffusion does: padded or cut to the tokenizer's length, last hidden state.

    Args:
        texts: one prompt, or one per image.
        source: a folder in diffusers' layout or a Hub repository, with `tokenizer/` and `text_encoder/`.

    Returns:
        N x L x C float32 tensor on the CPU.

    Raises:
        ImportError: transformers is not installed.
        OSError: the source is not there (raised by transformers, naming it).
        TypeError: texts are not strings.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"prompts must be strings, got {texts!r}")
    try:
        from transformers import AutoTokenizer, CLIPTextModel
    except ImportError as error:
        raise ImportError("prompts need transformers: pip install 'cleandift_backbones[text]'") from error
    with torch.device("cpu"):  # a model under construction may have made meta the default device
        tokenizer = AutoTokenizer.from_pretrained(str(source), subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(str(source), subfolder="text_encoder", use_safetensors=True).float().eval()
        tokens = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            return encoder(tokens.input_ids).last_hidden_state
