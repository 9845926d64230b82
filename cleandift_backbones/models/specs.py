"""What an architecture and a model are: plain data. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..utils.errors import InputError
from .conditions import TextConditions
from .denoisers.maps import MapInfo, unet_maps
from .latent_maps import latent_stride
from .schedule import Schedule

if TYPE_CHECKING:
    from .denoisers.base import Denoiser

TRAINED_ON = "Trained on "  # how the description of weights begins: `training_data` reads what follows


class Family(NamedTuple):
    """Networks of one kind: the maps of a config, and module and name of a `Denoiser`, imported when one is built."""

    maps: Callable[[Mapping[str, Any]], tuple[MapInfo, ...]]
    network: tuple[str, str]


FAMILIES = {"unet": Family(unet_maps, (".denoisers.unet", "FeatureUNet"))}


@dataclass(frozen=True)
class DenoiserSpec:
    """The network that denoises.

    Attributes:
        config: arguments of diffusers' class, e.g. UNet2DConditionModel.
        family: of FAMILIES.
        part: the part of a diffusers folder, and the prefix of native tensor names.
    """

    config: Mapping[str, Any]
    family: str = "unet"
    part: str = "unet"

    def maps(self) -> tuple[MapInfo, ...]:
        """All maps, in the order of execution."""
        return FAMILIES[self.family].maps(self.config)

    @property
    def network(self) -> type[Denoiser]:
        """The class; called with the config it gives the whole network, with what runs after the last map."""
        module, name = FAMILIES[self.family].network
        return getattr(import_module(module, __package__), name)

    def build(self, last_map: str | None = None) -> Denoiser:
        """The network with random weights, only as deep as `last_map` (default: the deepest map)."""
        return self.network.build(self.config, last_map)


@dataclass(frozen=True)
class Defaults:
    """What is used where the user names nothing.

    Attributes:
        map: for one map per image, as in matching and extraction.
        shown: maps to look at side by side, coarse to fine.
        searched: maps that a search for the best map chooses from.
        final_map: the map that a model without features_only ends at and pools.
        out: maps of features_only, fine to coarse; None: the last map of each block.
        timestep: of noisy features, and where the training of a student's timestep starts (DIFT, section 4).
        ensemble_size: noises that noisy features are averaged over (DIFT, section 4).
        min_side: smallest side of an image in pixels: one cell of the coarsest map.
    """

    map: str = "us6"
    shown: tuple[str, ...] = ("us3", "us6", "us9")
    searched: tuple[str, ...] = ("us3", "us5", "us6", "us7", "us8")
    final_map: str = "mid"
    out: tuple[str, ...] | None = None
    timestep: float = 261.0
    ensemble_size: int = 8
    min_side: int = 64


@dataclass(frozen=True)
class Published:
    """Weights of a model that can be loaded by their tag.

    Attributes:
        tag: as in timm's "model.tag".
        parts: part ("unet", "vae", "vae_tiny", "timestep", "heads", "text_encoder") -> a file or folder, or
            OWNER/NAME[@REVISION][/PATH] on the Hub.
        license: by the Hub's name.
        data: what they were trained on, in words.
    """

    tag: str
    parts: Mapping[str, str]
    license: str
    data: str = ""

    @property
    def description(self) -> str:
        return f"{TRAINED_ON}{self.data}" if self.data else ""


Kind = Literal["clean", "noisy"]


@dataclass(frozen=True)
class Architecture:
    """A diffusion model as a source of features.

    Attributes:
        name: "sd21": its models are cleandift_sd21, cleandift_sd21_pyramid and dift_sd21.
        title: in words, for descriptions.
        denoiser: the network.
        vae: config of diffusers' AutoencoderKL: what of it is used, `latents.LatentEncoder` says.
        vae_tiny: config of the light encoder of AutoencoderTiny's form, if there is one.
        conditions: the named constants of a prompt.
        schedule: how noise is added.
        image_size: side of the images that it was trained on, in pixels.
        defaults: see `Defaults`.
        published: weights of its clean and noisy models, the default ones first.
        base_model: Hub name of the diffusion model, for model cards.
        listed: False for models of tests: they can be created, but are not listed.
    """

    name: str
    title: str
    denoiser: DenoiserSpec
    vae: Mapping[str, Any]
    conditions: TextConditions
    schedule: Schedule
    image_size: int
    vae_tiny: Mapping[str, Any] | None = None
    defaults: Defaults = field(default_factory=Defaults)
    published: Mapping[Kind, tuple[Published, ...]] = field(default_factory=dict)
    base_model: str | None = None
    listed: bool = True

    def __post_init__(self):
        for kind, weights in self.published.items():
            if kind not in ("clean", "noisy"):
                raise InputError(f"architecture {self.name!r}: published[{kind!r}]: the kinds are 'clean' and 'noisy'")
            if not isinstance(weights, tuple) or not all(isinstance(one, Published) for one in weights):
                raise InputError(f"architecture {self.name!r}: published[{kind!r}] must be a tuple of Published")
        config, width = self.denoiser.config, self.conditions.width
        if config.get("cross_attention_dim", width) != width:
            raise InputError(
                f"architecture {self.name!r}: conditions are {width} wide, and cross_attention_dim is "
                f"{config['cross_attention_dim']}: give both the same"
            )
        if config.get("addition_embed_type"):
            raise InputError(
                f"architecture {self.name!r}: addition_embed_type={config['addition_embed_type']!r} is not supported"
            )
        if not isinstance(config.get("layers_per_block", 2), int):
            raise InputError(f"architecture {self.name!r}: layers_per_block must be one number for all levels")
        if not 0 <= self.defaults.timestep < self.schedule.steps:
            raise InputError(
                f"architecture {self.name!r}: the default timestep {self.defaults.timestep} is none of the schedule's "
                f"0..{self.schedule.steps - 1}"
            )

    def encoder_config(self, latent_encoder: str = "default") -> Mapping[str, Any]:
        """Config of the image encoder: "default" (AutoencoderKL's), or "tiny" (AutoencoderTiny's form).

        Raises:
            InputError: unknown encoder, or an architecture without a light one.
        """
        if latent_encoder not in ("default", "tiny"):
            raise InputError(
                f"latent_encoder must be 'default' (the VAE's) or 'tiny' (TAESD's form), got {latent_encoder!r}"
            )
        if latent_encoder == "tiny" and self.vae_tiny is None:
            raise InputError(f"latent_encoder='tiny': {self.name} has no light encoder; leave it out")
        return self.vae_tiny if latent_encoder == "tiny" else self.vae

    def stride(self, name: str) -> int:
        """Pixels of the image per cell of a denoiser's map."""
        return next(info.stride for info in self.denoiser.maps() if info.name == name) * latent_stride(self.vae)

    def configs(self, latent_encoder: str = "default") -> dict[str, Mapping[str, Any]]:
        """Configs of the parts, named as in a diffusers folder."""
        return {self.denoiser.part: self.denoiser.config, "vae": self.encoder_config(latent_encoder)}


@dataclass(frozen=True)
class ModelSpec:
    """One registered model.

    Attributes:
        name: without a tag. arch: its architecture. kind: "clean" or "noisy".
        pyramid: one map per stride from 2 on, instead of all maps of the denoiser.
    """

    name: str
    arch: Architecture
    kind: Kind
    pyramid: bool = False

    @property
    def noisy(self) -> bool:
        return self.kind == "noisy"

    @property
    def published(self) -> tuple[Published, ...]:
        return self.arch.published.get(self.kind, ())

    def weights(self, tag: str | None = None) -> Published | None:
        """The published weights of a tag (default: the first ones), or None."""
        return next((one for one in self.published if tag in (None, "", one.tag)), None)
