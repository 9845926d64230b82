"""Prompts on the small model, whose text encoder ships with the package."""

import sys

import pytest
import timm
import torch

from cleandift_backbones.models import ASSETS
from cleandift_backbones.prompts import PromptEncoder

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TEXT = ASSETS / "tiny_text"


def make(**kwargs):
    return timm.create_model("cleandift_tiny", pretrained=True, features_only=True, out_indices=(4,), **kwargs).eval()


def test_stored_prompt_is_the_empty_text():
    model = make()
    empty = PromptEncoder(TEXT)("")
    assert empty.shape == model.model.prompt_embeds.shape == (1, 16, 96)
    torch.testing.assert_close(model.model.prompt_embeds, empty, rtol=2e-3, atol=2e-3)


def test_one_prompt_or_one_per_image():
    model = make(prompt="cat face")
    cat = model(X)[0]
    assert not torch.allclose(cat, make()(X)[0])
    model.model.set_prompt(["cat face", "red apple"])
    both = model(X)[0]
    torch.testing.assert_close(both[0], cat[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[1], cat[1])


def test_encoder_equals_transformers_pipeline():
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(TEXT, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(TEXT, subfolder="text_encoder").eval()
    ids = tokenizer(["grinning face", ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(PromptEncoder(TEXT)(["grinning face", ""]), encoder(ids)[0])


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="prompts must be strings"):
        PromptEncoder(TEXT)(["a", 3])
    with pytest.raises(OSError, match=str(tmp_path)):
        PromptEncoder(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert make()(X)[0].shape == (2, 112, 8, 8), "no text, no transformers"
    with pytest.raises(ImportError, match=r"pip install 'cleandift_backbones\[text\]'"):
        make(prompt="cat face")
