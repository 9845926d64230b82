"""Training that begins from earlier weights instead of random ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from cleandift_backbones import checkpoints
from cleandift_backbones.checkpoints.hub import fetch_checkpoint
from cleandift_backbones.utils.errors import InputError, file_errors

__all__ = ["start_from", "start_text"]


def start_from(module: nn.Module, part: str, source: str) -> None:
    """Gives a module the weights of a checkpoint's part; the rest stays as it is, and is reported.

    Args:
        module: an AutoencoderKL or a UNet2DConditionModel. part: "vae" or "unet".
        source: a checkpoint in any form that models load: feature file, diffusers folder, OWNER/NAME on the Hub.

    Raises:
        InputError: nothing of that part is held, or weights of other shapes.
    """
    weights = checkpoints.open_checkpoint(fetch_checkpoint(source))
    names = module.state_dict().keys()
    state = {name: weights[f"{part}.{name}"].float() for name in names if f"{part}.{name}" in weights}
    if not state:
        raise InputError(f"{source} ({weights.describe()}) holds no weights of such a {part}")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{source} does not fit the {part}: {error}") from None
    new = sorted({name.partition(".")[0] for name in names - state.keys()})
    told = f", random: {len(names) - len(state)} in {', '.join(new)}" if new else ""
    print(f"{part}: {len(state)} tensors from {source}{told}", flush=True)


def start_text(encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Gives a text encoder the weights of an earlier one, the embedding of each word that both vocabularies have.

    Args:
        folder: with the subfolders text_encoder and tokenizer.

    Raises:
        InputError: weights of other shapes. FileError: they cannot be read.
    """
    with file_errors(folder):
        old = CLIPTextModel.from_pretrained(Path(folder, "text_encoder"), torch_dtype=torch.float32)
        words = PreTrainedTokenizerFast.from_pretrained(Path(folder, "tokenizer")).get_vocab()
    state, embedding = old.state_dict(), encoder.get_input_embeddings().weight
    held = state.pop(next(name for name in state if name.endswith("token_embedding.weight")))
    vocabulary = tokenizer.get_vocab()
    shared = sorted(vocabulary.keys() & words.keys())
    try:
        encoder.load_state_dict(state, strict=False)
        with torch.no_grad():
            embedding[[vocabulary[word] for word in shared]] = held[[words[word] for word in shared]]
    except RuntimeError as error:
        raise InputError(f"{folder} does not fit the text encoder: {error}") from None
    print(f"text: {len(shared)} of {len(vocabulary)} words from {folder}", flush=True)
