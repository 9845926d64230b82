"""Weights into models: from one native checkpoint, or put together from the places where the parts are published."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from .. import checkpoints
from ..checkpoints import Weights, hub
from ..checkpoints.hub import HubError, HubFile
from ..checkpoints.remote import NoRanges, RemoteFile
from ..utils.errors import DependencyError, InputError, MissingWeightsError, StateError
from . import text
from .architectures import Architecture, spec_of
from .last_map import check_reaches
from .learned import given_timestep, learned_timestep

if TYPE_CHECKING:
    from .cleandift import CleanDIFT

#: parts that weights may come from, and what each gives
PARTS = {
    "unet": "unet.",
    "vae": "vae.",
    "timestep": "timestep",
    "text_encoder": "prompt_embeds",
    "heads": "heads.",
}


@dataclass(frozen=True)
class WeightSources:
    """Where each part of a model's weights comes from. Precedence: argument, published default.

    Args:
        name: of the model, "cleandift_sd21".
        published: part -> source (see `hub.parse_source`).
        given: the same, of the user.
        latent_encoder: "default" or "tiny": which encoder the part `vae` is.

    Raises:
        ValueError: an unknown part.
    """

    name: str
    published: Mapping[str, str]
    given: Mapping[str, str] = field(default_factory=dict)
    latent_encoder: str = "default"

    def __post_init__(self):
        unknown = sorted(set(self.given) - set(PARTS))
        if unknown:
            raise InputError(f"sources has unknown parts {unknown}: the parts are {', '.join(PARTS)}")

    def _key(self, part: str) -> str:
        return "vae_tiny" if part == "vae" and self.latent_encoder == "tiny" else part

    def get(self, part: str) -> str | None:
        source = self.given.get(part) or self.published.get(self._key(part))
        return str(source) if source else None

    def main(self, cfg: Mapping) -> Path | HubFile:
        """Where the UNet, or a whole checkpoint, is: what was given, else what a timm pretrained_cfg says.

        Raises:
            RuntimeError: no weights are known. FileNotFoundError: no such path.
        """
        of_cfg = None
        if cfg.get("file"):
            of_cfg = Path(os.path.expanduser(cfg["file"])).absolute()
        elif cfg.get("hf_hub_id"):
            repo, _, revision = cfg["hf_hub_id"].partition("@")
            of_cfg = HubFile(repo, cfg.get("hf_hub_filename") or "", revision or None)
        if of_cfg is not None and "unet" not in self.given and str(of_cfg) != self.published.get("unet"):
            return of_cfg
        if self.get("unet") is None:
            raise StateError(
                f"no weights are known for {self.name}: pass pretrained=False for random weights, or "
                "pretrained_cfg_overlay=dict(file=PATH) with a file or folder of yours"
            )
        return hub.parse_source(self.get("unet"))


def open_parts(
    main: Path | HubFile | Weights,
    sources: WeightSources,
    arch: Architecture,
    fixed: set[str] = frozenset(),
    teacher: bool = False,
    cache_dir: str | Path | None = None,
) -> tuple[Weights, dict[str, Tensor]]:
    """Weights of `main`, and from `sources` what they lack, or what the user gave there.

    All is asked for before anything large is fetched.

    Args:
        main: a UNet, or more than a UNet; opened already if it is in memory.
        sources: of the rest.
        arch: of the model.
        fixed: native names that need not be there.
        teacher: take the teacher's UNet of a CompVis full file.

    Returns:
        the weights, and the constants `timestep` and `prompt_embeds` if they come from elsewhere.

    Raises:
        MissingWeightsError: files are missing; each is named, with the reason, and how to place it.
        checkpoints.CheckpointError: see `checkpoints.open_checkpoint`; a UNet of another family; no teacher; an
            encoder of another kind.
    """
    missing: list[str] = []

    def attempt(part: str, action: Callable, *args):
        try:
            return action(*args)
        except (HubError, FileNotFoundError, ImportError) as error:
            missing.append(f"{part}: {error}")

    weights = attempt("unet", open_header, main, cache_dir)
    if weights is not None:
        if not weights.has("unet."):
            raise checkpoints.CheckpointError(
                f"{weights.label} ({weights.form}) holds no UNet, but {weights.describe() or 'nothing that is known'}: "
                "give a file, folder or repository with one"
            )
        checkpoints.check_family(weights, arch.denoiser.config["cross_attention_dim"])
        _settle_encoder(weights, sources)
    own = own_text_encoder(main, weights, cache_dir)
    places = {part: sources.get(part) for part in PARTS if part != "unet"}
    places["text_encoder"] = sources.given.get("text_encoder") or own or places["text_encoder"]
    lacking = [
        part
        for part, place in places.items()
        if place
        and PARTS[part] not in fixed
        and (part in sources.given or not (weights is not None and weights.has(PARTS[part])))
    ]
    for part, check in (("vae", _check_vae), ("text_encoder", _check_text_encoder), ("heads", _check_vae)):
        if part in lacking:
            attempt(part, check, places[part], cache_dir)
    if missing:
        raise MissingWeightsError(missing_message(sources, missing), sources.name, missing)
    full = weights.form == "CompVis full checkpoint"
    if isinstance(weights.files()[0], RemoteFile) and not full:
        weights = checkpoints.open_checkpoint(hub.fetch_checkpoint(main, cache_dir))
    if teacher and full:
        weights = weights.teacher()
    if "vae" in lacking:
        weights.drop("vae.").put(open_encoder(places["vae"], sources.latent_encoder, cache_dir), "vae.")
    if "heads" in lacking:
        weights.put(open_header(hub.parse_source(places["heads"]), cache_dir), "heads.")
    constants = {}
    own_number = weights.has("timestep") or "timestep" in weights.metadata
    if own_number and "timestep" in lacking and "timestep" in sources.given:  # in the place of their own
        constants["timestep"] = given_timestep(places["timestep"], cache_dir)
    elif "timestep" not in fixed and ("timestep" in lacking or not weights.has("timestep")):
        constants["timestep"] = learned_timestep(places["timestep"], arch.defaults.timestep, weights, cache_dir)
    if "text_encoder" in lacking:
        constants["prompt_embeds"] = text.embed("", places["text_encoder"], cache_dir, keep=True)
    return weights, constants


#: latent_encoder -> what its weights are, in words
_ENCODERS = {"default": "the encoder of an AutoencoderKL", "tiny": "a light encoder (AutoencoderTiny's form)"}


def _settle_encoder(weights: Weights, sources: WeightSources) -> None:
    """Drops the VAE of a checkpoint if it is not of the kind asked for, and another is known.

    Raises:
        CheckpointError: none is known; or a light encoder is held, which its UNet was trained for, and none was given.
    """
    held, wanted = weights.latent_encoder(), sources.latent_encoder
    if held in (None, wanted) or "vae" in sources.given:
        return
    if held == "tiny" or sources.get("vae") is None:
        raise checkpoints.CheckpointError(
            f"{weights.label} holds {_ENCODERS[held]}, the model wants {_ENCODERS[wanted]}: pass "
            f"latent_encoder={held!r}, or sources=dict(vae=SOURCE) with another encoder"
        )
    weights.drop("vae.")


def open_encoder(source: str, latent_encoder: str, cache_dir: str | Path | None = None) -> Weights:
    """Weights that hold an encoder of this kind ("default" or "tiny").

    Raises:
        CheckpointError: they hold another kind, or none. HubError, FileNotFoundError: unavailable.
    """
    weights = checkpoints.open_checkpoint(hub.fetch_checkpoint(hub.parse_source(source), cache_dir))
    held = weights.latent_encoder()
    if held is None:
        raise checkpoints.CheckpointError(f"{weights.label} ({weights.form}) holds no VAE, but {weights.describe()}")
    if held != latent_encoder:
        raise checkpoints.CheckpointError(
            f"{weights.label} ({weights.form}) holds {_ENCODERS[held]}, the model wants {_ENCODERS[latent_encoder]}: "
            f"pass latent_encoder={held!r}, or another source of the VAE"
        )
    return weights


def open_header(main: Path | HubFile | Weights, cache_dir: str | Path | None = None) -> Weights:
    """Opened; a single file that is not in the cache only by its header, over HTTP, where the server gives ranges."""
    if isinstance(main, Weights):
        return main
    if isinstance(main, Path):
        return checkpoints.open_checkpoint(main)
    if main.path.endswith(".safetensors") and not hub.cached(main, cache_dir):
        with suppress(NoRanges):
            return checkpoints.open_files(main, [RemoteFile(main)])
    return checkpoints.open_checkpoint(hub.fetch_checkpoint(main, cache_dir))


def own_text_encoder(
    main: Path | HubFile | Weights, weights: Weights | None, cache_dir: str | Path | None = None
) -> Path | HubFile | None:
    """The text encoder that stands beside a UNet in diffusers' layout, if there is one."""
    if isinstance(main, Path):
        return main if (main / "text_encoder").is_dir() else None
    if not isinstance(main, HubFile) or weights is None or weights.form != "diffusers folder":
        return None
    try:
        hub.check(main.join("text_encoder/config.json"), cache_dir)
        return main
    except HubError:
        return None


def _check_vae(source: str, cache_dir: str | Path | None) -> None:
    place = hub.parse_source(source)
    if isinstance(place, HubFile):
        if place.path.endswith(".safetensors"):
            return hub.check(place, cache_dir)
        try:
            hub.check(place.join("config.json"), cache_dir)
        except HubError:
            hub.check(place.join("vae/config.json"), cache_dir)
    return None


def _check_text_encoder(source: str | Path, cache_dir: str | Path | None) -> None:
    if text.kept("", source, cache_dir):
        return
    place = hub.parse_source(source)
    if isinstance(place, HubFile):
        hub.check(place.join("text_encoder/config.json"), cache_dir)
    if not text.has_transformers():
        raise DependencyError(f"{source} needs transformers, once, for the empty prompt: {text.INSTALL}")


def missing_message(sources: WeightSources, missing: list[str]) -> str:
    parts = [line.split(":")[0] for line in missing]
    lines = "".join(f"\n  {line}" for line in missing)
    return (
        f"{sources.name} cannot be loaded, because of{lines}\n"
        "Without a network: fetch them on a machine that has one (hf download REPOSITORY FILE), place them anywhere "
        f"here, and name them by create_model(..., sources=dict({', '.join(f'{part}=PATH' for part in parts)})). Or "
        f"make one native folder there, `cleandift convert {sources.name} --out FOLDER`, and pass "
        "pretrained_cfg_overlay=dict(file=FOLDER)"
    )


def load_pretrained(
    model: CleanDIFT,
    sources: WeightSources,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Loads the weights that `model.pretrained_cfg` names, strictly; what they lack comes from `sources`.

    Args:
        model: may be on the meta device; its tensors are replaced.
        sources: of the parts.
        cache_dir: of the Hub's files (default: the Hub's own).
        dtype: of the parameters; "auto": that of the UNet in the file (`Weights.dtype`); None: as the model has it.
        state: tensors by name, in any of the forms of files, in the place of a file.

    Returns:
        source of the text encoder that stands beside these weights, if there is one.

    Raises:
        checkpoints.CheckpointError: a file does not fit, is damaged, or is a pickle.
        RuntimeError: files are missing.
    """
    pretrained_cfg = model.pretrained_cfg
    if state is not None and "unet" in sources.given:
        raise InputError("both a state_dict and sources=dict(unet=...) are given: give one of them")
    main = sources.main(pretrained_cfg) if state is None else checkpoints.open_state(state)
    arch, noisy = model.arch, spec_of(pretrained_cfg["architecture"]).noisy
    fixed = model.fixed | ({"heads."} if model.heads is None else set())
    weights, constants = open_parts(main, sources, arch, fixed, noisy, cache_dir)
    checkpoints.check_configs(weights, arch.configs(model.vae.kind))
    if dtype == "auto":
        dtype = weights.dtype()
    _check_heads(model, weights)
    classes = model.num_classes
    keep_head = classes and classes == pretrained_cfg.get("num_classes")
    if not keep_head:
        model.reset_classifier(0)
    load_weights(model, weights, constants, dtype)
    if classes and not keep_head:
        model.reset_classifier(classes)
    own = own_text_encoder(main, weights, cache_dir)
    return str(own) if own else None


_FIRST = ("vae.encoder.conv_in.weight", "vae.encoder.layers.0.weight")  # made for another number of channels
#: what a file may hold beyond a model: decoders, classifiers, the other UNet and heads of a full checkpoint, LDM's rest
BESIDE = ("vae.decoder.", "vae.post_quant_conv.", "head.", "teacher.", "heads.", "ldm.")


def _check_heads(model: CleanDIFT, weights: Weights) -> None:
    """Raises CheckpointError where projected features are asked for of maps that no heads were trained for."""
    if model.heads is None:
        return
    held = {name.split(".")[2] for name in weights.names() if name.startswith("heads.adapters.")}
    lacking = sorted(set(model.heads.adapters) - held)
    if lacking:
        have = f"has them for {', '.join(sorted(held))}" if held else "has none"
        raise checkpoints.CheckpointError(
            f"projected_timestep={model.projected_timestep} needs projection heads for {', '.join(lacking)}; "
            f"{weights.label} ({weights.form}) {have}. Ask for other maps, give sources=dict(heads=SOURCE) with a "
            "checkpoint that holds them (cleandift_sd15 and cleandift_sd21 have published ones), or leave "
            "projected_timestep out"
        )


def load_weights(
    model: CleanDIFT,
    weights: Weights,
    given: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assigns weights to everything that a model holds (also one on the meta device), strictly; see `fit_model`."""
    model.load_state_dict(fit_model(model, weights, given, dtype), strict=True, assign=True)


def fit_model(
    model: CleanDIFT,
    weights: Weights,
    given: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The state dict of a model, read from weights.

    Args:
        weights: of `checkpoints.open_checkpoint`.
        given: tensors to use instead of those in the file, by name (what the model's arguments fix is kept anyway).
        dtype: of everything but the numbers that are no weights (default: as the model has it).

    Raises:
        CheckpointError: the UNet of the weights ends at a coarser map; see also `checkpoints.fit`.
    """

    prefix = f"{model.arch.denoiser.part}."

    def ignorable(name: str) -> bool:
        deeper = name.startswith(prefix) and name.removeprefix(prefix) in model.denoiser.dropped_keys
        return name in fixed or deeper or name.startswith(BESIDE)

    def adapt(name: str, tensor: Tensor) -> Tensor:
        if name in _FIRST and tensor.ndim == 4 and tensor.shape[1] != model.in_chans:
            return adapt_input_conv(model.in_chans, tensor)
        return tensor

    check_reaches(weights, model.denoiser)
    expected = model.state_dict()
    fixed = {**(given or {}), **{name: expected[name] for name in model.fixed}}
    state = checkpoints.fit(weights, {k: v for k, v in expected.items() if k not in fixed}, ignorable, adapt, dtype)
    for name, tensor in fixed.items():
        like = expected[name].shape
        if name in model.conditions and tensor.shape[1:] != like[1:]:
            raise checkpoints.CheckpointError(
                f"the text encoder gives prompts of {' x '.join(map(str, tensor.shape[1:]))} numbers, the model of "
                f"{weights.label} needs {' x '.join(map(str, like[1:]))}: give the text encoder that it was "
                "trained with"
            )
        state[name] = checkpoints.cast(name, tensor, dtype or expected[name].dtype)
    return state
