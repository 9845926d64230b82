"""What a model's weights were trained on, in words: of published models, of native folders, of Hub repositories."""

from __future__ import annotations

import re
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load
from timm.models._hub import hf_split

from ..models.architectures import TRAINED_ON

MOST_CHARACTERS = 400  # of what a card says


def training_data(model: str) -> str:
    """What a model's weights were trained on, as in "emoji (small demo model)" or "3000 images, 768 px".

    Args:
        model: a timm name, "local-dir:FOLDER" or "hf-hub:OWNER/NAME[@REVISION]".

    Returns:
        Plain text that follows "Trained on": of this package's models the `description` in timm's pretrained config; of
        a folder or repository the paragraph "Data: ..." of its README.md, which `card.model_card` writes, or the
        `datasets` of the file's header. "" where nothing is known: a card is optional, and may be unreachable.
    """
    source, colon, place = model.partition(":")
    if not colon:
        config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
        told = (config.description if config else None) or ""
        return told.removeprefix(TRAINED_ON) if told.startswith(TRAINED_ON) else ""
    try:
        if source == "local-dir":
            return _of_card(Path(place, "README.md"))
        repository, revision = hf_split(place)
        return _of_card(Path(hf_hub_download(repository, "README.md", revision=revision)))
    except Exception:  # a missing, damaged or unreachable card says nothing
        return ""


def _of_card(card: Path) -> str:
    found = re.search(r"^Data: (.+?)(?:\n\s*\n|\Z)", card.read_text(encoding="utf-8"), re.M | re.S)
    if found:
        words = found[1]
    else:
        named = (metadata_load(card) or {}).get("datasets") or ""
        words = named if isinstance(named, str) else ", ".join(map(str, named))
    return " ".join(words.split())[:MOST_CHARACTERS]
