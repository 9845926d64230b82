"""CleanDIFT: one deterministic pass of a diffusion UNet over the clean image, under timm's model contract."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from ..utils.errors import InputError, InputTypeError, StateError
from .architectures import Architecture
from .denoisers.base import Denoiser
from .feature_info import FeatureInfo
from .inputs import CHECKED_CALLS, can_look, number_in_range, warn_of_range
from .latents import build_latent_encoder
from .precise_numbers import KeepsNumbers
from .projection_heads import ProjectionHeads
from .text import embed

PUBLISHED_HEADS = dict(depth=3, conditioning="adarms", gated=True)  # METHOD: the published weights and public config


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 fail there: NVIDIA GPUs before Ampere, macOS before 14."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)


class CleanDIFT(KeepsNumbers):
    """Image -> latent -> UNet at a fixed timestep -> named maps (CleanDIFT, arXiv 2412.03439).

    `feature_info` runs fine to coarse (index 0 = us10 ... 10 = mid): the reverse of the order of execution.

    Args:
        arch: the parts to build, and their defaults.
        latent_encoder: "default" for the VAE's encoder, "tiny" for the light one.
        in_chans: channels of the images; pretrained first convolutions are adapted.
        num_classes: 0 gives pooled features, otherwise a linear classifier stands on them.
        global_pool: timm's pooling type for the classifier ("avg", "max", ...; "" returns the 4-D map).
        drop_rate: dropout in front of the classifier.
        final_map: the model ends at this map, and holds nothing that runs after it; default: the architecture's.
        pyramid: offer strides 2, 4, 8, ... (see `FeatureInfo`) instead of all maps of the denoiser.
        timestep: overrides the timestep stored with the weights (learned; before training the architecture's default),
            0..999.
        prompt: text to condition on, one or one per image, instead of the stored empty prompt.
        text_encoder: folder or Hub repository with `tokenizer/` and `text_encoder/`, for `prompt`.
        projected_timestep: give the maps as the projection heads map them to this timestep of the teacher, 0..999.
        heads: arguments of `projection_heads.ProjectionHeads` (default: those of the published weights).

    Raises:
        ValueError: unknown final_map; timestep out of range.
    """

    numbers = ("timestep",)
    _unchecked_calls = CHECKED_CALLS

    def __init__(
        self,
        arch: Architecture,
        latent_encoder: str = "default",
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        final_map: str | None = None,
        pyramid: bool = False,
        timestep: float | None = None,
        prompt: str | Sequence[str] | None = None,
        text_encoder: str | None = None,
        projected_timestep: float | None = None,
        heads: dict | None = None,
    ):
        super().__init__()
        timestep = number_in_range("timestep", timestep)
        projected_timestep = number_in_range("projected_timestep", projected_timestep)
        if not all(hasattr(value, "__index__") for value in (in_chans, num_classes)):
            raise InputTypeError(
                f"in_chans and num_classes must be whole numbers, got {in_chans!r} and {num_classes!r}"
            )
        if in_chans < 1 or num_classes < 0:
            raise InputError(
                f"in_chans must be at least 1 and num_classes at least 0, got {in_chans} and {num_classes}"
            )
        if num_classes and not global_pool:
            raise InputError("a classifier needs pooled features: give global_pool='avg', or num_classes=0 for the map")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.text_encoder = text_encoder
        self.cache_dir: str | None = None  # of the Hub's files, for set_prompt
        #: what arguments fix, weights loaded later must not replace
        self.fixed: set[str] = {n for n, v in (("timestep", timestep), ("prompt_embeds", prompt)) if v is not None}
        self.arch = arch
        final_map = arch.defaults.final_map if final_map is None else final_map
        self.vae = build_latent_encoder(arch.encoder_config(latent_encoder), in_chans)
        self.add_module(arch.denoiser.part, arch.denoiser.build(final_map))
        self.feature_info = FeatureInfo(arch, pyramid, latent_encoder)
        self.projected_timestep, self.heads = projected_timestep, None
        if projected_timestep is not None:
            held = self.denoiser.map_names
            channels = {info.name: info.channels for info in self.denoiser.infos if info.name in held}
            self.heads = ProjectionHeads(channels, **(heads or PUBLISHED_HEADS))
        # A given timestep is real even while the model is laid out on the meta device.
        device = None if timestep is None else "cpu"
        number = torch.tensor(
            arch.defaults.timestep if timestep is None else timestep, dtype=torch.float32, device=device
        )
        self.register_buffer("timestep", number)
        for name, shape in arch.conditions.shapes().items():
            self.register_buffer(name, torch.randn(shape))
        self.num_features = self.head_hidden_size = self.denoiser.infos[self.feature_info.position(final_map)].channels
        try:
            self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        except AssertionError as error:
            raise InputError(
                f"global_pool={global_pool!r} is none of timm's poolings of maps: 'avg', 'max', 'avgmax', 'catavgmax', "
                "'fast', or '' for the map itself"
            ) from error
        if prompt is not None:
            self.set_prompt(prompt)

    @property
    def denoiser(self) -> Denoiser:
        """The network, registered under its part's name, so that tensors have diffusers' names behind it."""
        return self._modules[self.arch.denoiser.part]

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The constants of the prompt by name, 1 or N x ... each."""
        return {name: getattr(self, name) for name in self.arch.conditions.shapes()}

    # --- configuration -------------------------------------------------------------------------------------------

    def set_prompt(self, prompt: str | Sequence[str] | Tensor, text_encoder: str | None = None) -> None:
        """Conditions on text (one prompt, or one per image of the batch) or on given embeddings N x L x C.

        Raises:
            ValueError: no text encoder is known for this model, or the embeddings have another width.
        """
        if not isinstance(prompt, Tensor):
            source = text_encoder or self.text_encoder
            if source is None:
                raise InputError(f"no text encoder is known for prompt {prompt!r}: pass text_encoder=FOLDER_OR_REPO")
            prompt = embed(prompt, source, self.cache_dir)
        if prompt.ndim != 3 or prompt.shape[-1] != self.prompt_embeds.shape[-1]:
            width = self.prompt_embeds.shape[-1]
            raise InputError(f"prompt embeddings must be N x L x {width}, got {tuple(prompt.shape)}")
        # While weights are awaited the buffer lies on the meta device; given embeddings stay real.
        device = None if self.prompt_embeds.is_meta else self.prompt_embeds.device
        self.prompt_embeds = prompt.to(device=device, dtype=self.prompt_embeds.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        own = self.denoiser
        if own.dtype == torch.bfloat16 and lacks_bfloat16(own.device):
            raise StateError(f"{own.device} has no bfloat16: use dtype=torch.float16 or torch.float32")
        return self

    @property
    def _keys_to_ignore_on_load_unexpected(self) -> list[str]:
        """For transformers' wrapper: tensors of a file that this model leaves out by its arguments, as patterns."""
        part = self.arch.denoiser.part
        dropped = [rf"(^|\.){part}\.{re.escape(key)}$" for key in sorted(self.denoiser.dropped_keys)]
        return dropped + ([r"(^|\.)heads\."] if self.heads is None else [])

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise learning rates, shallow to deep in the order of execution."""
        part = self.arch.denoiser.part
        groups = self.denoiser.layer_groups(coarse)
        named = {name: "|".join(rf"^{part}\.{one}" for one in pattern.split("|")) for name, pattern in groups.items()}
        return {**named, "stem": rf"^vae|{named['stem']}"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, layer by layer: same outputs and gradients, less memory."""
        self.vae.grad_checkpointing = self.denoiser.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if num_classes and not (self.head.global_pool.pool_type if global_pool is None else global_pool):
            global_pool = "avg"  # a classifier needs pooled features
        self.head.reset(num_classes, global_pool)
        self.head.to(device=self.denoiser.device, dtype=self.denoiser.dtype)

    # --- features ------------------------------------------------------------------------------------------------

    def _take(self, indices: int | str | Sequence[int | str] | None) -> list[int]:
        """Absolute feature indices: None = all that are held, n = the n coarsest, a sequence = those, in its order."""
        info = self.feature_info
        return info.held(self.denoiser.last_map) if indices is None else info.take(indices)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise InputError(f"expected images B x {self.in_chans} x H x W, got a tensor of shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise InputTypeError(f"expected floating-point images normalised to [-1, 1], got {x.dtype}")
        least = self.arch.defaults.min_side
        if x.shape[2] < least or x.shape[3] < least:
            raise InputError(f"images must be at least {least} x {least}, got {x.shape[2]} x {x.shape[3]}: resize them")
        if can_look(x) and self._unchecked_calls:  # in this order, or torch.compile would guard the number
            self._unchecked_calls -= 1
            warn_of_range(x)

    def _encode(self, x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The latent encoder's result; its error where images and weights are of different dtypes is explained."""
        if torch.compiler.is_compiling():
            return self.vae(x, names)
        try:
            return self.vae(x, names)
        except RuntimeError as error:
            own = next(self.vae.parameters()).dtype
            if x.dtype == own or torch.is_autocast_enabled(x.device.type):
                raise
            raise InputTypeError(
                f"the images are {x.dtype}, the weights {own}: cast the images (images.to({own})), or call the model "
                f"under torch.autocast({x.device.type!r})"
            ) from error

    def _maps(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Named maps of images B x C x H x W."""
        self._check_input(x)
        latents, found = self._encode(x, names)
        conditions = self.conditions
        for one in conditions.values():
            if one.shape[0] not in (1, x.shape[0]):
                raise InputError(f"{one.shape[0]} prompts were set, but the batch has {x.shape[0]} images")
        return found | self._denoiser_maps(latents, conditions, [name for name in names if name not in found])

    def _denoiser_maps(
        self, latents: Tensor, conditions: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        maps = self.denoiser(latents, self.timestep, conditions, names)
        if self.heads is None:
            return maps
        return self.heads(maps, self.timestep.new_full((len(latents),), self.projected_timestep))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | str | Sequence[int | str] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ):
        """timm's feature interface.

        Args:
            x: B x in_chans x H x W in [-1, 1], H and W >= 64.
            indices: into feature_info, or names of maps ("us6"); the order is kept; int n: the n coarsest; None: all
                that the model holds.
            norm: ignored, there is no norm.
            stop_early: stop after the deepest map asked for, so that the first return is that map.
            output_fmt: only "NCHW".
            intermediates_only: return only the maps.
            output_dict: return dict(image_features=final map, image_intermediates=[maps]).

        Returns:
            (final map, list of maps): maps are B x num_chs x ceil(H / reduction) x ceil(W / reduction), and the final
            map equals forward_features(x).

        Raises:
            ValueError: index out of range, map not held, wrong format, wrong images. TypeError: images not float.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r} is not supported: maps are NCHW")
        wanted = [self.feature_info[i]["name"] for i in self._take(indices)]
        if intermediates_only or stop_early:
            # VAE maps alone end in front of the denoiser; the final map is then the denoiser's first.
            position = self.feature_info.position
            first = self.denoiser.infos[0].name
            final = max((name for name in wanted if position(name) >= 0), key=position, default=first)
        else:
            final = self.denoiser.last_map
        maps = self._maps(x, wanted if intermediates_only else [*wanted, final])
        intermediates = [maps[name] for name in wanted]
        if output_dict:
            result = dict(image_intermediates=intermediates)
            return result if intermediates_only else dict(image_features=maps[final], **result)
        return intermediates if intermediates_only else (maps[final], intermediates)

    def prune_intermediate_layers(
        self, indices: int | str | Sequence[int | str] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what runs after the deepest of these maps, and the classifier; returns absolute indices."""
        take = self._take(indices)
        last_map = self.feature_info.deepest(take)
        self.denoiser.truncate(last_map)
        self.num_features = self.head_hidden_size = self.denoiser.infos[self.feature_info.position(last_map)].channels
        if self.heads is not None:
            self.heads.keep([self.feature_info[index]["name"] for index in take])
        if prune_head or self.head.in_features != self.num_features:
            self.head.in_features = self.num_features
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """B x num_features x h x w: the final map (`final_map`)."""
        return self._maps(x, [self.denoiser.last_map])[self.denoiser.last_map]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the final map and classifies it (num_classes > 0)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """B x num_features (num_classes = 0), B x num_classes, or the 4-D map (global_pool="")."""
        return self.forward_head(self.forward_features(x))
