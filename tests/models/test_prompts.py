"""Prompts on the small model, whose text encoder ships with the package."""

import json
import logging
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import standins
import timm
import torch

from cleandift_backbones.models import text
from cleandift_backbones.models.architectures import published
from cleandift_backbones.models.text import PromptEncoder, embed

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TEXT = Path(published("dift_tiny")["text_encoder"])


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


@pytest.fixture
def folder(tmp_path):
    """A text encoder with a tokenizer, as beside a Stable Diffusion."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(TEXT / part, tmp_path / "sd" / part)
    return tmp_path / "sd"


@pytest.fixture
def loads(monkeypatch):
    """The text encoders that were loaded, as weak references."""
    made, init = [], PromptEncoder.__init__

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self.encoder))

    monkeypatch.setattr(PromptEncoder, "__init__", counted)
    monkeypatch.setattr(text, "_embeddings", type(text._embeddings)())
    return made


LONG = (
    "grinning face with smiling eyes and a long tail of words that no tokenizer of sixteen tokens can hold, red apple"
)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])  # CLIP ViT-L/14 of SD 1.5, OpenCLIP ViT-H/14 of SD 2.1
@pytest.mark.parametrize("mask", [False, True])
def test_equal_to_the_base_pipeline(folder, activation, mask):
    """diffusers' own StableDiffusionPipeline.encode_prompt, also for a text that is too long."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import AutoTokenizer, CLIPTextModel

    config = folder / "text_encoder/config.json"
    told = json.loads(config.read_text()) | {"hidden_act": activation, "use_attention_mask": mask}
    config.write_text(json.dumps(told))
    pipeline = StableDiffusionPipeline(
        vae=standins.vae(),
        unet=standins.unet(),
        text_encoder=CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    texts = ["grinning face", "", LONG]
    with torch.no_grad():
        expected = pipeline.encode_prompt(texts, "cpu", 1, False)[0]
    torch.testing.assert_close(embed(texts, folder), expected)


def test_too_long_text_is_cut_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "cleandift_backbones"):
        PromptEncoder(folder)(["cat", LONG])
    (record,) = caplog.records
    assert "longer than 16 tokens" in record.message and "red apple" in record.message


def test_loaded_on_first_use_kept_by_text_and_released(folder, loads):
    model = timm.create_model("test_cleandift")
    assert not loads
    both = embed(["cat", "dog"], folder)
    assert len(loads) == 1 and loads[0]() is None
    assert torch.equal(embed(["dog", "cat", "dog"], folder), both[[1, 0, 1]]) and len(loads) == 1
    embed(["dog", "fox"], folder)
    assert len(loads) == 2
    config = folder / "text_encoder/config.json"
    config.write_text(config.read_text() + " ")  # another encoder: nothing old is used
    embed("dog", folder)
    assert len(loads) == 3
    with pytest.raises(ValueError, match="no text encoder is known for prompt 'cat'"):
        model.set_prompt("cat")


def test_from_the_hub_by_revision(hub, loads):
    repo = hub.place("mirror/sd", standins.diffusers_files())
    repo.tags["v1"] = repo.refs["main"]
    tokenizer, encoder = standins.text_encoder()
    ids = tokenizer(["cat"], padding="max_length", max_length=3, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(ids)[0]
    torch.testing.assert_close(embed("cat", "mirror/sd"), expected)
    torch.testing.assert_close(embed("cat", "mirror/sd@v1"), expected)
    assert len(loads) == 1, "the same commit is the same encoder"
    model = timm.create_model("test_cleandift", prompt="cat", text_encoder="mirror/sd")
    torch.testing.assert_close(model.prompt_embeds, expected)
    with pytest.raises(OSError, match="mirror/sd.*no revision 'v9'"):
        embed("cat", "mirror/sd@v9")


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="prompts must be strings"):
        PromptEncoder(TEXT)(["a", 3])
    with pytest.raises(OSError, match=str(tmp_path)):
        PromptEncoder(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert make()(X)[0].shape == (2, 112, 8, 8), "no text, no transformers"
    with pytest.raises(ImportError, match=r"pip install 'cleandift_backbones\[text\]'"):
        make(prompt="a text never seen before")
