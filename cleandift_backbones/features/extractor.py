"""Feature maps of any timm model, by name: the one door through which evaluation and extraction get them.

extractor = load_extractor("cleandift_tiny", size=128)
maps = extract(extractor, pictures)          # {"us10": N x C x h x w, ..., "mid": ...}
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cleandift_backbones

from ..data.images import stack_pixels, to_tensor, unit_range
from ..data.resize import resize
from ..models.architectures import ModelSpec, find_spec
from ..models.inputs import map_index
from ..utils.errors import InputError, MissingWeightsError, is_out_of_memory
from ..utils.progress import tqdm
from .latent_cache import RememberedLatents, bytes_of

PIXELS = "pixels"
Pictures = Sequence[Image.Image | np.ndarray | torch.Tensor] | torch.Tensor


class ModelError(InputError):
    """A model, map or device that is unavailable; the message says what to give instead."""


class OutOfMemory(ModelError):
    """A batch that is too large for the device."""


class Pixels(nn.Module):
    """The picture itself as its only map, 32 x 32: the baseline that every feature has to beat."""

    side = 32

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True, align_corners=False)]


@dataclass
class Extractor:
    """A model with all it needs to be fed plain pictures; call it with B x 3 x H x W, uint8 or float in 0..1.

    Attributes:
        name: the model's name.
        maps, channels: names of the maps it returns, in order, and their channel counts.
        mean, std: the model's own normalisation.
        size: (height, width) that pictures are squashed to, None for as they come.
        dtype: that the model computes in, and of the maps.
    """

    name: str
    model: nn.Module
    maps: tuple[str, ...]
    channels: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    device: torch.device
    first_prompt: torch.Tensor | None = None  # embeddings that the model had before `set_prompts`
    dtype: torch.dtype = torch.float32
    optimized: str | None = None  # "exact" or "compile" after `optimize`
    _weights: str = ""  # their hash before `optimize`

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures B x 3 x H x W, uint8 or in 0..1 -> {map name: B x C x h x w} on the model's device."""
        with memory_told(self.name, len(pictures)):
            x = unit_range(pictures.to(self.device, non_blocking=True))
            if self.size:
                x = resize(x, self.size)
            mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
            x = ((x - mean) / std).to(self.dtype, memory_format=torch.channels_last)
            try:
                outputs = self.model(x)
            except (AssertionError, RuntimeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"{self.name} cannot take pictures of {x.shape[-1]}x{x.shape[-2]}: {_line(error)}"
                ) from error
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":  # Swin and others
            outputs = [y.permute(0, 3, 1, 2) for y in outputs]
        return dict(zip(self.maps, outputs, strict=True))

    @property
    def core(self) -> nn.Module:
        """The model, out of timm's wrapper for features_only."""
        return getattr(self.model, "model", self.model)

    @property
    def spec(self) -> ModelSpec | None:
        """The model's entry if it is one of this package, else None."""
        return find_spec((getattr(self.core, "pretrained_cfg", None) or {}).get("architecture") or "")

    def weights_digest(self) -> str:
        """Hash of the weights, prompt and timestep that were loaded or set, whether or not they are optimised now."""
        return self._weights or weights_digest(self.model)

    def optimize(self, fixed_prompt: bool = True, compile: bool = False) -> None:
        """Makes a model of this package faster, by the exact steps of `cleandift_backbones.optimize`; others stay.

        Args:
            fixed_prompt: the prompt that is set now stays; False leaves `set_prompts` open, for less speed.
            compile: also compile it, once for all sizes, on the first pass.

        Raises:
            ModelError: a model that cannot be optimised, or not any more; `compile` with one of another package.
        """
        vae = getattr(self.core, "vae", None)
        if isinstance(vae, RememberedLatents):
            raise ModelError(f"{self.name} remembers latents already: optimize it before")
        if self.spec is None:
            if compile:
                raise ModelError(f"{self.name} is no model of this package: only these are compiled")
            return
        self._weights = weights_digest(self.model)
        try:
            cleandift_backbones.optimize(self.model, fold=True if fixed_prompt else "timestep", compile=compile)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{self.name} cannot be optimised: {_line(error)}") from error
        self.optimized = "compile" if compile else "exact"

    def remember_latents(self, memory: dict[bytes, torch.Tensor]) -> None:
        """Shares encoded pictures with other runs through `memory`, if the model is one of this package's.

        Raises:
            ModelError: it remembers latents already, or is compiled, and so encodes within one graph.
        """
        vae = getattr(self.core, "vae", None)
        if isinstance(vae, RememberedLatents):
            raise ModelError(f"{self.name} remembers latents already")
        if self.spec is not None:
            if self.optimized == "compile":
                raise ModelError(f"{self.name} is compiled: what it encodes cannot be remembered; optimize without")
            self.core.vae = RememberedLatents(vae, memory)

    @property
    def takes_prompts(self) -> bool:
        """Whether the model is conditioned on text and knows a text encoder."""
        return self.spec is not None and bool(self.core.text_encoder)

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Conditions the model on texts, one per picture of the next batch; none: on what it was conditioned at first.

        Raises:
            ModelError: a model that takes no text, or whose text encoder is unavailable.
        """
        if not self.takes_prompts:
            raise ModelError(f"{self.name} takes no prompts, or knows no text encoder; give --prompt none")
        if self.first_prompt is None:
            self.first_prompt = self.core.prompt_embeds
        try:
            if not prompts:
                self.core.set_prompt(self.first_prompt)
            else:
                self.core.set_prompt(prompts[0] if len(set(prompts)) == 1 else list(prompts))
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(f"{self.name}: {_line(error)}; or give --prompt none") from error

    def reseed(self, seed: int) -> bool:
        """Draws other noises from now on, if the model is one that uses noise (DIFT); says whether it is."""
        noisy = self.spec is not None and self.spec.noisy
        if noisy:
            self.core.noise_seed = seed
        return noisy


def weights_digest(model: nn.Module) -> str:
    """Hash of all that a model computes with: its parameters and buffers, also those that checkpoints leave out."""
    state = hashlib.blake2b()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(bytes_of(tensor))
    return state.hexdigest()


@contextmanager
def memory_told(name: str, count: int) -> Iterator[None]:
    """Raises OutOfMemory for whatever torch raises in the block when memory for `count` pictures runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lower = "lower the batch size (--batch-size)" if count > 1 else "lower the size (--size)"
        raise OutOfMemory(f"{name}: out of memory with a batch of {count}; {lower}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def resolve_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU if there is one. Raises ModelError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used ({_line(error)}); give cpu or auto") from None


def check_model_name(name: str) -> None:
    """Raises ModelError for a name that neither timm nor this package knows; names with a scheme (hf-hub:) pass."""
    if name != PIXELS and ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], [*timm.list_models(), PIXELS], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
        raise ModelError(f"model {name!r} is unknown; {hint}")


def map_names(infos: Sequence[dict]) -> tuple[str, ...]:
    """Names of maps from timm's feature_info dicts: their own name, or else that of the module."""
    return tuple(info.get("name") or info["module"] for info in infos)


def list_maps(model_name: str, **create_kwargs) -> list[dict]:
    """timm's feature_info of all maps that a model can give: dicts with name, num_chs, reduction; builds no weights.

    Raises:
        ModelError: unknown model, or one without feature maps.
    """
    check_model_name(model_name)
    if model_name == PIXELS:
        return [dict(name=PIXELS, module=PIXELS, num_chs=3, reduction=1)]

    def build() -> nn.Module:
        return timm.create_model(model_name, pretrained=False, features_only=True, **create_kwargs)

    try:
        try:
            with torch.device("meta"):
                model = build()
        except (NotImplementedError, RuntimeError):  # some models compute with real numbers while they are built
            model = build()
    except Exception as error:
        raise ModelError(f"{model_name} cannot be built with features_only=True: {_line(error)}") from error
    infos = model.feature_info.info
    return [info | dict(name=name) for info, name in zip(infos, map_names(infos), strict=True)]


def map_indices(infos: Sequence[dict], maps: str | int | Iterable[str | int] | None) -> list[int]:
    """Indices of maps given by name or index (negative ones count from the end); None means all.

    Raises:
        ModelError: a map that the model does not have.
    """
    names = [info["name"] for info in infos]
    if maps is None:
        return list(range(len(names)))
    wanted = [maps] if isinstance(maps, (str, int)) else list(maps)
    found = [map_index(names, item) for item in wanted]
    if None in found:
        wrong = wanted[found.index(None)]
        raise ModelError(f"map {wrong!r} is not one of {', '.join(names)} (or an index 0..{len(names) - 1})")
    return found


def load_extractor(
    model_name: str,
    map: str | int | Iterable[str | int] | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    size: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    **create_kwargs,
) -> Extractor:
    """Any timm model as an extractor of feature maps, in evaluation mode.

    Args:
        model_name: a timm model name (`cleandift_tiny`, `resnet18`, `vit_small_patch14_dinov2`, `hf-hub:...`), or
            "pixels".
        map: the map or maps wanted, by name (`us6`, `layer3`, `blocks.11`) or index; None for all. Nothing that only
            other maps need is computed where the model allows that.
        pretrained: False for random weights.
        device: where to compute; "auto" takes the GPU if there is one.
        size: side (or height and width) in pixels that pictures are squashed to. None: as they come, or the model's own
            size if it takes only one. Models of fixed size (ViTs) are built for `size`, rounded to their patches.
        dtype: to compute in. Pictures are resized and normalised in float32 all the same.
        **create_kwargs: for `timm.create_model` (timestep, ensemble_size, pretrained_cfg_overlay, ...).

    Raises:
        ModelError: unknown model, map or device; weights that are unavailable; arguments that the model does not know.
    """
    infos = list_maps(model_name, **create_kwargs)
    indices = map_indices(infos, map)
    device = resolve_device(str(device))
    size = (size, size) if isinstance(size, int) else size
    names, channels = zip(*((infos[i]["name"], infos[i]["num_chs"]) for i in indices))
    if model_name == PIXELS:
        return Extractor(PIXELS, Pixels(), names, channels, (0.5,) * 3, (0.5,) * 3, size, device, dtype=dtype)
    try:
        if ":" not in model_name:
            config = timm.get_pretrained_cfg(model_name, allow_unregistered=False)
            if config and config.fixed_input_size and "img_size" not in create_kwargs:
                size = tuple(_rounded(infos, size)) if size else tuple(config.input_size[1:])
                create_kwargs["img_size"] = size
        model = timm.create_model(
            model_name, pretrained=pretrained, features_only=True, out_indices=indices, **create_kwargs
        )
    except MissingWeightsError as error:
        raise ModelError(
            f"{model_name} cannot be loaded, because of {'; '.join(error.reasons)}. Where there is a network, run "
            f"`cleandift convert {error.name} --out FOLDER`; then give local-dir:FOLDER as the model here"
        ) from error
    except Exception as error:
        raise ModelError(f"{model_name}: {_line(error)}") from error
    config = timm.data.resolve_model_data_config(model)
    try:
        model = model.eval().to(device, dtype, memory_format=torch.channels_last)
    except RuntimeError as error:  # out of memory, or no bfloat16 there
        raise ModelError(f"{model_name} in {dtype} on {device}: {_line(error)}") from error
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Extractor(model_name, model, names, channels, mean, std, size, device, dtype=dtype)


def _rounded(infos: Sequence[dict], size: tuple[int, int]) -> list[int]:
    stride = max(info["reduction"] for info in infos)
    return [max(1, round(side / stride)) * stride for side in size]


def extract(
    extractor: Extractor,
    pictures: Pictures,
    batch_size: int = 32,
    progress: bool | str = True,
    store: str | torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """All maps of all pictures, computed in batches.

    Args:
        extractor: from `load_extractor`.
        pictures: N x 3 x H x W, uint8 or in 0..1, or a sequence of what `images.to_tensor` takes; they need one common
            size unless the extractor resizes.
        batch_size: pictures per pass.
        progress: shows a bar; a string is its label.
        store: device that keeps the maps; None: where they are computed.

    Returns:
        {map name: N x C x h x w}, float32.

    Raises:
        ModelError: out of memory, or a size that the model does not take. ImageError: pictures that cannot be used.
        ValueError: no pictures, or pictures of different sizes and an extractor without a size.
    """
    if len(pictures) == 0:
        raise InputError("no pictures to extract features from; give at least one")
    label = progress if isinstance(progress, str) else extractor.name
    collected: dict[str, list[torch.Tensor]] = {name: [] for name in extractor.maps}
    with tqdm(total=len(pictures), desc=label, unit="img", disable=not progress, leave=False) as bar:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            if not isinstance(batch, torch.Tensor):
                batch = _stack([to_tensor(picture) for picture in batch], extractor.size)
            for name, maps in extractor(batch).items():
                collected[name].append(maps.to(store) if store else maps)
            bar.update(len(batch))
    return {name: torch.cat(parts) for name, parts in collected.items()}


def _stack(tensors: list[torch.Tensor], size: tuple[int, int] | None) -> torch.Tensor:
    if size:
        tensors = [resize(t, size) for t in tensors]
    shapes = {tuple(t.shape[-2:]) for t in tensors}
    if len(shapes) > 1:
        found = f"{sorted(shapes)[:3]}, ..."
        raise InputError(f"pictures of different sizes ({found}) in one batch; load the extractor with size=")
    return stack_pixels(tensors)
