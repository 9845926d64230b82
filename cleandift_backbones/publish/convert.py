"""Weights of one form into another: identified by keys and shapes, completed, written."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor

from .. import checkpoints
from ..checkpoints import CheckpointError, Weights, hub
from ..checkpoints.hub import HubFile
from ..checkpoints.ldm import TEXT
from ..models.architectures import ARCHITECTURES, MODELS, Architecture, model_of, published, spec_of
from ..models.last_map import last_map_of, trained_last_map
from ..models.latent_maps import latent_stride
from ..models.latents import build_latent_encoder
from ..models.learned import stored_timestep
from ..models.pretrained import WeightSources, fit_model, missing_message, open_encoder, open_header, open_parts
from ..utils.errors import InputError, MissingWeightsError, StateError
from ..utils.records import read_json
from .card import CardInfo, save_folder
from .training_data import training_data

#: what LDM files hold and no feature needs: copied from the source, or from `fill`
LDM_PARTS = ("vae.decoder.", "vae.post_quant_conv.", TEXT)


def _holds(weights: Weights, arch: Architecture) -> bool:
    """Whether all of the denoiser's tensors in weights are of an architecture, by names and shapes."""
    prefix, config = f"{arch.denoiser.part}.", arch.denoiser.config
    first = f"{prefix}conv_in.weight"
    widths = config["block_out_channels"]
    if first not in weights or weights.shape(first) != (widths[0], config.get("in_channels", 4), 3, 3):
        return False  # which spares building the network
    with torch.device("meta"):
        expected = arch.denoiser.network(**config).state_dict()
    own = [name for name in weights.names() if name.startswith(prefix)]
    like = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in expected.items()}
    return all(tuple(weights.shape(name)) == like.get(name) for name in own)


def find_architecture(weights: Weights) -> Architecture:
    """The architecture that the denoiser's tensors are of.

    Raises:
        CheckpointError: none of them.
    """
    checkpoints.check_inputs(weights)
    for arch in ARCHITECTURES.values():
        if _holds(weights, arch):
            return arch
    family, known = weights.unet_family(), ", ".join(name for name, arch in ARCHITECTURES.items() if arch.listed)
    raise CheckpointError(
        f"{weights.label} ({weights.form}) holds no UNet of a known architecture ({known})"
        + (f", but one of another family: {family}" if family else f", but {weights.describe() or 'nothing'}")
    )


def find_model(weights: Weights, teacher: bool = False) -> str:
    """The model that weights are of: as their metadata says, else by shapes.

    A diffusers folder and an LDM file are taken for DIFT's: base models come so.
    """
    stored = weights.metadata.get("model")
    if stored in MODELS:
        return stored
    arch = find_architecture(weights)
    base = weights.form == "diffusers folder" or "LDM" in weights.form
    return (model_of(arch, "noisy") if teacher or base else None) or model_of(arch, "clean")


def _denoiser_names(arch: Architecture, last_map: str | None = None) -> list[str]:
    """Native names of the tensors down to a map, or of all of them, also of those that run after the last."""
    denoiser = arch.denoiser
    with torch.device("meta"):
        network = denoiser.network(**denoiser.config) if last_map is None else denoiser.build(last_map)
    return sorted(f"{denoiser.part}.{name}" for name in network.state_dict())


def open_main(source: str) -> tuple[Path | HubFile, Weights]:
    """The place of a source, or of a published model's UNet, and its weights.

    A file on the Hub that is not in the cache is opened by its header; a native checkpoint here is verified.

    Raises:
        FileNotFoundError, hub.HubError: unavailable. CheckpointError: no known form, or damaged.
    """
    main = hub.parse_source(published(source).get("unet", source))
    weights = open_header(main)
    if isinstance(main, Path) and "sha256" in weights.metadata:
        checkpoints.verify(main)
    return main, weights


def _stored_arguments(main: Path | HubFile, weights: Weights) -> dict:
    """What a native folder's config.json says of how its model was built."""
    if weights.form != "native checkpoint":
        return {}
    folder = main if isinstance(main, Path) else Path(weights.label)
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    kept = ("in_chans", "global_pool", "ensemble_size", "noise_seed", "timestep", "final_map", "heads")
    arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key in kept}
    if weights.has("head."):
        if not config.get("num_classes"):
            raise CheckpointError(f"{weights.label} holds a classifier, but no config.json says how it was built")
        arguments["num_classes"] = config["num_classes"]
    return arguments


def to_native(
    source: str,
    out: Path,
    model: str | None = None,
    parts: dict[str, str] | None = None,
    timestep: float | None = None,
    teacher: bool = False,
    dtype: torch.dtype | None = None,
    cut: bool = False,
    max_shard_size: int | str = "5GB",
    latent_encoder: str | None = None,
    heads: bool = True,
) -> tuple[str, Weights]:
    """Writes a native folder, or a native file where `out` ends in .safetensors.

    Args:
        source: file, folder, OWNER/NAME[@REVISION][/PATH] on the Hub, or a published model's name.
        out: folder or file; a native folder that stands there is replaced.
        model: name of the model that the weights are of (default: `find_model`).
        parts: sources of what is lacking, see `pretrained.WeightSources`.
        timestep: 0..999, instead of the one found.
        teacher: take the teacher's UNet of a CompVis full file.
        dtype: of all tensors but the timestep (default: that of the UNet).
        cut: leave out the tensors that run after the finest map.
        max_shard_size: of a file in a folder.
        latent_encoder: "default" or "tiny" (default: the one that the source holds, else "default").
        heads: keep the projection heads of a native checkpoint, which `projected_timestep` and further training need.

    Returns:
        the model's name, and the weights that were found in the source itself.

    Raises:
        CheckpointError: unfit weights. RuntimeError: a part is unavailable. OSError: not written.
        ValueError: timestep out of range.
    """
    if timestep is not None and not 0 <= timestep <= 999:
        raise InputError(f"timestep must lie in 0..999, got {timestep}")
    if out.suffix != ".safetensors":
        checkpoints.check_replaceable(out)
    main, found = open_main(source)
    if teacher:
        found.teacher()  # says so if there is none
    name = model or (source.partition(".")[0] if published(source) else find_model(found, teacher))
    latent_encoder = latent_encoder or found.latent_encoder() or "default"
    arch, noisy = spec_of(name).arch, spec_of(name).noisy
    fixed = {"heads."} | ({"timestep"} if timestep is not None or noisy else set())
    sources = WeightSources(name, published(source) or published(name), parts or {}, latent_encoder)
    if noisy and "timestep" in sources.given:
        raise InputError(f"the timestep of {name} is not learned: give a number, not {sources.given['timestep']}")
    weights, constants = open_parts(main, sources, arch, fixed, teacher or noisy)
    checkpoints.check_configs(weights, arch.configs(latent_encoder))
    arguments = _stored_arguments(main, weights)
    settings, final_map = arguments.pop("heads", None), arguments.pop("final_map", None)
    if timestep is not None:
        constants["timestep"] = torch.tensor(float(timestep))
        if noisy:  # whose timestep is an argument: config.json holds it
            arguments["timestep"] = int(timestep) if timestep == int(timestep) else timestep
    elif noisy:  # DIFT's is an argument; a file holds one all the same
        constants["timestep"] = torch.tensor(float(arguments.get("timestep", arch.defaults.timestep)))
    dtype = checkpoints.check_dtype(dtype) or weights.dtype()
    infos = arch.denoiser.maps()
    last = trained_last_map(weights, infos) or arch.defaults.final_map
    depth = final_map if arguments.get("num_classes") else last
    with torch.device("meta"):
        built = timm.create_model(name, latent_encoder=latent_encoder, final_map=depth, **arguments)
    built.fixed.clear()
    state: dict[str, Tensor] = fit_model(built, weights, constants, dtype)
    cut = cut or last != last_map_of(weights.names(), infos)
    more = _denoiser_names(arch, last if cut else None)
    if heads and weights.form == "native checkpoint":  # their arguments are in its config.json
        more += sorted(key for key in weights.names() if key.startswith("heads."))
    state |= {key: checkpoints.cast(key, weights[key], dtype) for key in more if key not in state and key in weights}
    label = main.name if isinstance(main, Path) else str(main)
    kept = {key: value for key, value in weights.metadata.items() if key not in ("format", "sha256", "timestep")}
    metadata = {**kept, "model": name, "source": label, "form": weights.form}
    if out.suffix == ".safetensors":
        checkpoints.save_native(state, out, metadata)
    else:
        known = training_data(source if published(source) else f"local-dir:{source}")
        card = CardInfo(
            data=known or None, recipe=kept.get("recipe"), notes=f"Converted from {label} ({weights.form})."
        )
        stored = {"final_map": final_map, "heads": settings if heads else None}
        save_folder(built, out, card, metadata, max_shard_size=max_shard_size, state=state, arguments=stored)
    return name, found


def _open_whole(
    source: str, model: str | None, teacher: bool, fill: str | None
) -> tuple[str, Weights, dict[str, Tensor], dict[str, str]]:
    """A source whose UNet is whole, or is completed: (model's name, weights, like, metadata for what is written).

    `like` are the tensors of the whole UNet, under native names, on the meta device.

    Raises:
        CheckpointError: not the whole UNet, and `fill` does not have the rest.
    """
    main, weights = open_main(source)
    if weights.form != "CompVis full checkpoint":
        weights = checkpoints.open_checkpoint(hub.fetch_checkpoint(main))
    if teacher:
        weights = weights.teacher()
    name = model or find_model(weights, teacher)
    denoiser = spec_of(name).arch.denoiser
    with torch.device("meta"):
        network = denoiser.network(**denoiser.config)
    like = {f"{denoiser.part}.{key}": tensor for key, tensor in network.state_dict().items()}
    if fill:
        other = open_main(fill)[1]
        lacking = other.names() - weights.names()
        weights.fill(other, [key for key in lacking if key in like or key.startswith(LDM_PARTS)])
    missing = sorted(key for key in like if key not in weights)
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of the whole UNet ({', '.join(missing[:3])}, ...): it was saved "
            "only as deep as its finest map. Give --fill SOURCE to take them from another UNet; no feature needs them"
        )
    metadata = {"model": name, "source": main.name if isinstance(main, Path) else str(main)}
    timestep = stored_timestep(weights)
    if timestep is not None:
        metadata["timestep"] = str(timestep.item())
    return name, weights, like, metadata


def to_diffusers(
    source: str,
    out: Path,
    model: str | None = None,
    teacher: bool = False,
    fill: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, Weights]:
    """Writes a folder that `diffusers.UNet2DConditionModel.from_pretrained` loads; the timestep goes into its metadata.

    Args:
        source, out, model, teacher, dtype: as for `to_native`.
        fill: source of another UNet, for tensors that run after the last map, where the source was saved without them.

    Raises:
        CheckpointError: unfit weights, or not the whole UNet. OSError: not written.
    """
    import diffusers

    checkpoints.check_replaceable(out)
    name, weights, like, metadata = _open_whole(source, model, teacher, fill)
    arch = spec_of(name).arch
    dtype = checkpoints.check_dtype(dtype) or weights.dtype()
    state = checkpoints.fit(weights, like, lambda key: not key.startswith("unet."), dtype=dtype)
    side = arch.image_size // latent_stride(arch.vae)
    config = {**arch.denoiser.config, "sample_size": side, "_diffusers_version": diffusers.__version__}
    state = {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    checkpoints.save_diffusers_unet(state, out, config, metadata)
    return name, weights


def to_ldm(
    source: str,
    out: Path,
    model: str | None = None,
    teacher: bool = False,
    vae: str | None = None,
    fill: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, Weights]:
    """Writes one safetensors file with the keys of the original Stable Diffusion code: UNet, VAE, and a text encoder.

    The timestep goes into its metadata. VAE decoder and text encoder are those of the source or of `fill`, or absent.

    Args:
        source, model, teacher, dtype: as for `to_native`.
        out: file to write.
        vae: source of the VAE (default: the one in the source, else where it is published).
        fill: source of what is lacking: tensors that run after the last map, VAE decoder, an LDM file's text encoder.

    Returns:
        the model's name, and the weights that were written, with what was added to the source.

    Raises:
        CheckpointError: unfit weights, not the whole UNet, or an encoder of AutoencoderTiny's form, for which LDM has
            no keys. StateError: the VAE is unavailable. OSError: not written.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"an LDM checkpoint is one file: give an output NAME.safetensors, not {out}")
    name, weights, like, metadata = _open_whole(source, model, teacher, fill)
    places = published(source) or published(name)
    arch, sources = spec_of(name).arch, WeightSources(name, places, {"vae": vae} if vae else {})
    held = weights.latent_encoder()
    if held == "tiny" and not vae:
        raise CheckpointError(
            f"{source} has a light encoder of AutoencoderTiny's form, for which LDM has no keys: give --vae SOURCE"
        )
    if vae or held is None:
        place = sources.get("vae")
        if place is None:
            raise StateError(f"{source} holds no VAE, and none is published for {name}: give --vae SOURCE")
        try:
            found = open_encoder(place, "default")
        except (hub.HubError, FileNotFoundError) as error:
            missing = [f"vae: {error}"]
            raise MissingWeightsError(missing_message(sources, missing), name, missing) from error
        weights.drop("vae.").put(found, "vae.")
    checkpoints.check_configs(weights, arch.configs())
    with torch.device("meta"):
        like |= {f"vae.{key}": tensor for key, tensor in build_latent_encoder(arch.vae).state_dict().items()}
    dtype = checkpoints.check_dtype(dtype) or weights.dtype()
    state = checkpoints.fit(weights, like, lambda key: not key.startswith("unet."), dtype=dtype)
    for key in sorted(key for key in weights.names() if key.startswith(LDM_PARTS)):
        tensor = weights[key]
        state[key] = checkpoints.cast(key, tensor, dtype) if tensor.is_floating_point() else tensor
    checkpoints.save_ldm(state, out, metadata)
    return name, weights
