"""Weights of one form into another: told what they are by keys and shapes, completed, written."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from torch import Tensor

from . import checkpoints, download
from .checkpoints import CheckpointError, Weights
from .download import HubFile
from .errors import InputError
from .hub import CardInfo, model_card, timm_config
from .latents import latent_stride
from .learned import START_TIMESTEP, stored_timestep
from .models import ARCHITECTURES, SOURCES, architecture_of, with_encoder
from .pretrained import Sources, check_configs, fit_model, open_header, open_parts
from .training_data import training_data
from .unet import FeatureUNet


def find_architecture(weights: Weights) -> str:
    """The entry of `models.ARCHITECTURES` that a UNet's shapes are of.

    Raises:
        CheckpointError: none of them.
    """
    for name, cfg in ARCHITECTURES.items():
        widths, context = cfg["unet"]["block_out_channels"], cfg["unet"]["cross_attention_dim"]
        shapes = {
            "unet.conv_in.weight": (widths[0], 4, 3, 3),
            "unet.mid_block.resnets.0.conv1.weight": (widths[-1], widths[-1], 3, 3),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (widths[-1], context),
        }
        if all(key in weights and weights.shape(key) == shape for key, shape in shapes.items()):
            return name
    family, known = weights.unet_family(), ", ".join(name for name in ARCHITECTURES if name != "test")
    raise CheckpointError(
        f"{weights.label} ({weights.form}) holds no UNet of a known architecture ({known})"
        + (f", but one of another family: {family}" if family else f", but {weights.describe() or 'nothing'}")
    )


def find_model(weights: Weights, teacher: bool = False) -> str:
    """The model that weights are of: as their metadata says, else by shapes; a diffusers folder is taken for DIFT's."""
    stored = weights.metadata.get("model")
    if stored and timm.is_model(stored) and timm.model_entrypoint(stored).__module__.startswith(__package__):
        return stored
    arch = find_architecture(weights)
    if arch == "test":
        return "test_cleandift"
    return f"{'dift' if teacher or weights.form == 'diffusers folder' else 'cleandift'}_{arch}"


def deepest_map(weights: Weights, cfg: dict) -> str:
    """The finest map whose UNet is held whole; "mid" if not even that is."""
    with torch.device("meta"):
        unet = FeatureUNet.build(cfg["unet"])
    for name in reversed(unet.map_names):
        unet.truncate(name)
        if all(f"unet.{key}" in weights for key in unet.state_dict()):
            return name
    return "mid"


def _unet_names(cfg: dict, last_map: str | None = None) -> list[str]:
    """Native names of the UNet's tensors down to a map, or of all of them, also of those that run after the last."""
    with torch.device("meta"):
        unet = FeatureUNet(**cfg["unet"]) if last_map is None else FeatureUNet.build(cfg["unet"], last_map)
    return sorted(f"unet.{name}" for name in unet.state_dict())


def open_main(source: str) -> tuple[Path | HubFile, Weights]:
    """The place of a source, or of a published model's UNet, and its weights.

    A file on the Hub that is not in the cache is opened by its header; a native checkpoint here is verified.

    Raises:
        FileNotFoundError, download.HubError: not to be had. CheckpointError: no known form, or damaged.
    """
    main = download.parse_source(SOURCES.get(source, {}).get("unet", source))
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
    config = json.loads(path.read_text()) if path.is_file() else {}
    kept = ("in_chans", "global_pool", "ensemble_size", "noise_seed", "timestep")
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key in kept}
    if weights.has("head."):
        if not config.get("num_classes"):
            raise CheckpointError(f"{weights.label} holds a classifier, but no config.json says how it was built")
        arguments |= dict(num_classes=config["num_classes"], final_map=config["model_args"].get("final_map", "mid"))
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
) -> tuple[str, Weights]:
    """Writes a native folder, or a native file where `out` ends in .safetensors.

    Args:
        source: file, folder, OWNER/NAME[@REVISION][/PATH] on the Hub, or a published model's name.
        out: folder or file; a native folder that stands there is replaced.
        model: name of the model that the weights are of (default: `find_model`).
        parts: sources of what is lacking, see `pretrained.Sources`.
        timestep: 0..999, instead of the one found.
        teacher: take the teacher's UNet of a CompVis full file.
        dtype: of all tensors but the timestep (default: that of the UNet).
        cut: leave out the tensors that run after the finest map.
        max_shard_size: of a file in a folder.
        latent_encoder: "default" or "tiny" (default: the one that the source holds, else "default").

    Returns:
        the model's name, and the weights that were found in the source itself.

    Raises:
        CheckpointError: unfit weights. RuntimeError: a part is not to be had. OSError: not written.
        ValueError: timestep out of range.
    """
    if timestep is not None and not 0 <= timestep <= 999:
        raise InputError(f"timestep must lie in 0..999, got {timestep}")
    if out.suffix != ".safetensors":
        checkpoints.check_replaceable(out)
    main, found = open_main(source)
    if teacher:
        found.teacher()  # says so if there is none
    name = model or (source if source in SOURCES else find_model(found, teacher))
    latent_encoder = latent_encoder or found.latent_encoder() or "default"
    cfg, noisy = with_encoder(architecture_of(name), latent_encoder), name.startswith("dift")
    fixed = {"heads."} | ({"timestep"} if timestep is not None or noisy else set())
    sources = Sources(name, SOURCES.get(name, {}), parts or {}, latent_encoder)
    weights, constants = open_parts(main, sources, cfg, fixed, teacher or noisy)
    check_configs(weights, cfg)
    arguments = _stored_arguments(main, weights)
    if timestep is not None:
        constants["timestep"] = torch.tensor(float(timestep))
    elif noisy:  # DIFT's is an argument; a file holds one all the same
        constants["timestep"] = torch.tensor(float(arguments.get("timestep", START_TIMESTEP)))
    dtype = checkpoints.check_dtype(dtype) or weights.dtype()
    deepest = deepest_map(weights, cfg)
    with torch.device("meta"):
        built = timm.create_model(name, latent_encoder=latent_encoder, **{"final_map": deepest, **arguments})
    built.fixed.clear()
    state: dict[str, Tensor] = fit_model(built, weights, constants, dtype)
    more = _unet_names(cfg, deepest if cut else None)
    state |= {key: checkpoints.cast(key, weights[key], dtype) for key in more if key not in state and key in weights}
    label = main.name if isinstance(main, Path) else str(main)
    kept = {key: value for key, value in weights.metadata.items() if key not in ("format", "sha256", "timestep")}
    metadata = {**kept, "model": name, "source": label, "form": weights.form}
    if out.suffix == ".safetensors":
        checkpoints.save_native(state, out, metadata)
    else:
        config = timm_config(built)
        for key in ("held", "final_map"):
            config["model_args"].pop(key, None)
        if deepest != built.unet.infos[-1].name:
            config["model_args"]["held"] = deepest
        if arguments.get("final_map", "mid") != "mid":
            config["model_args"]["final_map"] = arguments["final_map"]
        known = training_data(source if source in SOURCES else f"local-dir:{source}")
        card = model_card(
            config,
            CardInfo(data=known or None, recipe=kept.get("recipe"), notes=f"Converted from {label} ({weights.form})."),
        )
        checkpoints.save_folder(state, out, config, card, metadata, max_shard_size=max_shard_size)
    return name, found


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
    main, weights = open_main(source)
    if weights.form != "CompVis full checkpoint":
        weights = checkpoints.open_checkpoint(download.fetch_checkpoint(main))
    if teacher:
        weights = weights.teacher()
    name = model or find_model(weights, teacher)
    cfg = architecture_of(name)
    with torch.device("meta"):
        like = {f"unet.{key}": tensor for key, tensor in FeatureUNet(**cfg["unet"]).state_dict().items()}
    missing = sorted(key for key in like if key not in weights)
    if missing and fill:
        weights.fill(open_main(fill)[1], missing)
        missing = [key for key in missing if key not in weights]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of the whole UNet ({', '.join(missing[:3])}, ...): it was saved "
            "only as deep as its finest map. Give --fill SOURCE to take them from another UNet; no feature needs them"
        )
    dtype = checkpoints.check_dtype(dtype) or weights.dtype()
    state = checkpoints.fit(weights, like, lambda key: not key.startswith("unet."), dtype=dtype)
    side = timm.get_pretrained_cfg(name).input_size[-1] // latent_stride(cfg["vae"])
    config = {**cfg["unet"], "sample_size": side, "_diffusers_version": diffusers.__version__}
    label = main.name if isinstance(main, Path) else str(main)
    metadata = {"model": name, "source": label}
    timestep = stored_timestep(weights)
    if timestep is not None:
        metadata["timestep"] = str(timestep.item())
    state = {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    checkpoints.save_diffusers_unet(state, out, config, metadata)
    return name, weights
