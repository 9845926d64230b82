"""Text -> prompt embeddings. A text encoder is loaded only when somebody gives text; transformers is an extra."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoints
from ..checkpoints import hub, memo
from ..utils.errors import DependencyError, FileError, InputTypeError, UnknownKeyError

INSTALL = "pip install 'cleandift_backbones[text]'"
_logger = logging.getLogger(__name__)
_embeddings: OrderedDict[tuple[str, str], Tensor] = OrderedDict()  # (text encoder, text) -> L x C
_MOST = 512  # of them: 77 x 1024 floats each, 160 MB


class PromptEncoder:
    """Tokenizer and text encoder of a Stable Diffusion, in float32.

    As in the base pipelines (diffusers' StableDiffusionPipeline.encode_prompt): padded to the tokenizer's length (77),
    the output of the encoder's last layer (SD 2.1's encoder has 23 of OpenCLIP ViT-H/14's 24 layers) after its final
    norm, the attention mask only where the encoder's config asks for it.

    Args:
        source: a folder in diffusers' layout or a Hub source, with `tokenizer/` and `text_encoder/`.
        cache_dir: of the Hub's files.
        device: to run on.

    Raises:
        ImportError: transformers is not installed.
        OSError: the source is not there or holds no text encoder.
    """

    def __init__(self, source: str | Path, cache_dir: str | Path | None = None, device: torch.device | str = "cpu"):
        try:
            from transformers import AutoTokenizer, CLIPTextModel
        except ImportError as error:
            raise DependencyError(f"prompts need transformers: {INSTALL}") from error
        try:
            place = hub.parse_source(source)
            options = dict(cache_dir=cache_dir)
            variant = _variant(place, cache_dir)
            if isinstance(place, hub.HubFile):
                options["revision"] = place.revision
                folder, prefix = place.repo, place.path
            else:
                folder, prefix = str(place), ""
            with _quiet(), torch.device("cpu"):  # a model under construction may have made meta the default device
                self.tokenizer = AutoTokenizer.from_pretrained(
                    folder, subfolder=f"{prefix}/tokenizer".lstrip("/"), **options
                )
                encoder = CLIPTextModel.from_pretrained(
                    folder,
                    subfolder=f"{prefix}/text_encoder".lstrip("/"),
                    use_safetensors=True,
                    variant=variant,
                    **options,
                )
        except (OSError, ValueError) as error:
            raise FileError(
                f"no text encoder could be loaded from {source} (a folder or Hub repository with tokenizer/ and "
                f"text_encoder/ is wanted): {str(error).splitlines()[0]}"
            ) from error
        self.encoder, self.device = encoder.float().eval().to(device), device

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """One or more prompts -> N x L x C. A text longer than L tokens is cut, with a warning, as in the pipelines."""
        texts = _texts(texts)
        length = self.tokenizer.model_max_length
        with torch.device("cpu"), torch.no_grad():
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            for text, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids):
                if len(ids) > length:
                    lost = self.tokenizer.decode(ids[length - 1 : -1]).strip()
                    _logger.warning(f"the prompt {text[:40]!r}... is longer than {length} tokens: cut off is {lost!r}")
            mask = tokens.attention_mask if getattr(self.encoder.config, "use_attention_mask", False) else None
            mask = None if mask is None else mask.to(self.device)
            return self.encoder(tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state


def _variant(place: Path | hub.HubFile, cache_dir: str | Path | None) -> str | None:
    """The variant of a text encoder's weights ("fp16") where no plain file is there, by the rule of all weights."""
    if isinstance(place, hub.HubFile):
        names = hub.list_files(place.join("text_encoder"), cache_dir)
    else:
        names = {path.name for path in (place / "text_encoder").glob("*")}
    chosen = checkpoints.choose_file(names, checkpoints.NATIVE_NAME)
    return chosen[1] if chosen else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar of weights, which take a moment and come often."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _texts(texts: str | Sequence[str]) -> list[str]:
    """Raises TypeError if they are not strings."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputTypeError(f"prompts must be strings, got {texts!r}")
    return texts


def check(texts: str | Sequence[str]) -> None:
    """Says before any long work what stands in the way of encoding texts.

    Raises:
        TypeError: they are not strings. ImportError: transformers is not installed, and they are not known already.
    """
    known = {text for _, text in _embeddings}
    if not set(_texts(texts)) <= known and not has_transformers():
        raise DependencyError(f"prompts need transformers: {INSTALL}")


def has_transformers() -> bool:
    try:
        return find_spec("transformers") is not None
    except ValueError:  # a module without a spec, as when an import is blocked
        return False


def encoder_identity(source: str | Path, cache_dir: str | Path | None = None) -> str:
    """Which text encoder this is: a repository's commit, or a folder's files."""
    place = hub.parse_source(source)
    if isinstance(place, hub.HubFile):
        return f"{place.repo}/{place.path} at {memo.commit_of(place.join('text_encoder/config.json'), cache_dir)}"
    files = sorted(p for part in ("tokenizer", "text_encoder") for p in (place / part).glob("*"))
    return " ".join([str(place.resolve()), *(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)])


def embed(
    texts: str | Sequence[str], source: str | Path, cache_dir: str | Path | None = None, keep: bool = False
) -> Tensor:
    """Embeddings of prompts, N x L x C in float32. The encoder is loaded for texts not seen before, then released.

    Args:
        texts: one or more.
        source: of the text encoder, see `PromptEncoder`.
        cache_dir: of the Hub's files.
        keep: keep one text's embedding on the disk too, beside the Hub's cache.

    Raises:
        TypeError: texts are not strings. ImportError, OSError: see `PromptEncoder`.
    """
    texts = _texts(texts)
    if keep:
        place = hub.parse_source(source)

        def compute() -> Tensor:
            return PromptEncoder(source, cache_dir)(texts[0])

        if isinstance(place, hub.HubFile):
            config = place.join("text_encoder/config.json")
            return memo.remember_of(f"prompt {texts[0]!r}", config, compute, cache_dir)
        return memo.remember(f"prompt {texts[0]!r} of {encoder_identity(source, cache_dir)}", compute, cache_dir)
    identity = encoder_identity(source, cache_dir)
    new = [text for text in dict.fromkeys(texts) if (identity, text) not in _embeddings]
    found = {text: _embeddings[identity, text] for text in texts if text not in new}
    if new:
        found |= dict(zip(new, PromptEncoder(source, cache_dir)(new)))
    for text, embedding in found.items():
        _embeddings[identity, text] = embedding
        _embeddings.move_to_end((identity, text))
    while len(_embeddings) > _MOST:
        _embeddings.popitem(last=False)
    return torch.stack([found[text] for text in texts])


def kept(text: str, source: str | Path, cache_dir: str | Path | None = None) -> bool:
    """Whether `embed(..., keep=True)` kept this text's embedding."""
    place = hub.parse_source(source)
    if not isinstance(place, hub.HubFile):
        return memo.recall(f"prompt {text!r} of {encoder_identity(source, cache_dir)}", cache_dir) is not None
    try:
        config = place.join("text_encoder/config.json")
        memo.remember_of(f"prompt {text!r}", config, _not_kept, cache_dir)
        return True
    except (LookupError, hub.HubError):
        return False


def _not_kept() -> Tensor:
    raise UnknownKeyError("not kept")
