"""Captions of the picture sets: words, a small tokenizer, and token ids with parts dropped at random."""

from __future__ import annotations

from collections import Counter

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

__all__ = ["LENGTH", "STYLE_NAMES", "Captions", "build_tokenizer", "caption"]

STYLE_NAMES = {
    "noto": "noto",
    "notov1": "noto v1",
    "twemoji": "twemoji",
    "fluentflat": "fluent flat",
    "fluent3d": "fluent 3d",
}
LENGTH = 16  # tokens of a prompt, the first and the last one included
BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"


def style_words(style: str) -> str:
    """What a caption says of a style: "noto v1 style" for notov1; an unknown style's own name; "" for none."""
    return style and f"{STYLE_NAMES.get(style, style)} style"


def caption(text: str, style: str) -> str:
    """The full caption of a picture, such as "grinning face, noto v1 style"; of a photograph, of no style, its text."""
    return f"{text}, {style_words(style)}" if style else text


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Lower-case words without punctuation, from these captions alone; pads to 16 tokens, bos first and eos last."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = Counter(word for text in captions for word in tokenizer.normalizer.normalize_str(text).split())
    ranked = [BOS, EOS, PAD, UNK, *sorted(words, key=lambda word: (-words[word], word))]
    tokenizer.model = models.WordLevel({word: number for number, word in enumerate(ranked)}, unk_token=UNK)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ranked.index(BOS)), (EOS, ranked.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


class Captions:
    """Token ids of the training captions, with parts dropped at random, made on the device.

    The style is dropped with probability `style`, the whole caption with `whole` (the empty prompt), and each word is
    dropped with `word` or replaced by the unknown word with `unknown`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, entries: list[dict], device: torch.device):
        self.special = [tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, PAD, UNK)]
        texts = self._words(tokenizer, [entry["text"] for entry in entries])
        styles = self._words(tokenizer, [style_words(entry["style"]) for entry in entries])
        self.words = torch.cat([texts, styles], 1).to(device)
        self.is_style = (torch.arange(self.words.shape[1]) >= texts.shape[1]).to(device)

    @staticmethod
    def _words(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(map(len, ids))
        return torch.tensor([row + [-1] * (longest - len(row)) for row in ids])

    def sample(
        self,
        index: Tensor,
        generator: torch.Generator | None,
        style: float = 0.3,
        whole: float = 0.15,
        word: float = 0.05,
        unknown: float = 0.03,
    ) -> Tensor:
        """Ids B x 16 of the captions `index` (B); with all probabilities 0 they equal the tokenizer's own."""
        bos, eos, pad, unk = self.special
        words = self.words[index]
        random_word, random_caption = (
            torch.rand(shape, device=words.device, generator=generator)
            for shape in ((2, *words.shape), (2, len(words), 1))
        )
        keep = (words >= 0) & (random_word[0] >= word) & (random_caption[0] >= whole)
        keep &= (random_caption[1] >= style) | ~self.is_style
        words = torch.where(random_word[1] < unknown, unk, words)
        order = (~keep).int().argsort(dim=1, stable=True)[:, : LENGTH - 2]  # what is kept moves to the front
        words = nn.functional.pad(words.gather(1, order), (0, LENGTH - 2 - order.shape[1]), value=pad)
        count = keep.sum(1, keepdim=True).clamp(max=LENGTH - 2)
        place = torch.arange(LENGTH - 2, device=words.device)
        words = torch.where(place < count, words, torch.where(place == count, eos, pad))
        last = torch.where(count == LENGTH - 2, eos, pad)
        return torch.cat([torch.full_like(last, bos), words, last], 1)
