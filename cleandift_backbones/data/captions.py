"""Captions and labels of images, as side-car files, metadata files and shards hold them."""

from __future__ import annotations

from ..utils.atomic import is_text
from ..utils.errors import InputError
from ..utils.records import decode_text, parse_json

CAPTION_KEYS = ("caption", "text", "prompt")  # of a JSON side-car or a line of metadata, the first that is there


def caption_of_json(content: object) -> str:
    """The caption in a JSON side-car: its "caption" (img2dataset), "text" or "prompt"; a bare string is one itself.

    Raises:
        InputError: there is none that is a string.
    """
    if isinstance(content, str):
        return content.strip()
    found = next((content[key] for key in CAPTION_KEYS if content.get(key)), "") if isinstance(content, dict) else 0
    if not isinstance(found, str):
        raise InputError(f"a caption must be a string under caption, text or prompt, got {str(content)[:80]!r}")
    return found.strip()


def read_caption(name: str, data: bytes) -> str:
    """The caption in a side-car file .txt, .caption or .json, in a folder or in a shard.

    Raises:
        InputError: no UTF-8, no JSON, or no caption in it that is a string; `name` is in the message.
    """
    text = decode_text(name, data)
    if not name.lower().endswith(".json"):
        return text.strip()
    content = parse_json(name, text)
    try:
        return caption_of_json(content)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def checked_label(name: str, label: object) -> str:
    """A label as text; "" for None.

    Raises:
        InputError: it is neither text nor a whole number; `name` is in the message.
    """
    label = "" if label is None else label
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not is_text(str(label)):
        raise InputError(f"{name}: a label must be text or a whole number, got {str(label)[:80]!r}")
    return str(label).strip()
