"""Weights of one form into another: told what they are by keys and shapes, completed, written."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor

from . import checkpoints, download
from .checkpoints import CheckpointError, Weights
from .download import HubFile
from .hub import CardInfo, model_card, timm_config
from .models import ARCHITECTURES, SOURCES
from .pretrained import START_TIMESTEP, Sources, check_configs, fit_model, open_parts
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
    family = weights.unet_family()
    raise CheckpointError(
        f"{weights.label} ({weights.form}) holds no UNet of a known architecture ({', '.join(ARCHITECTURES)})"
        + (f", but one of another family: {family}" if family else f", but {weights.describe() or 'nothing'}")
    )


def find_model(weights: Weights, teacher: bool = False) -> str:
    """The model that weights are of: as their metadata says, else by shapes; a diffusers folder is taken for DIFT's."""
    stored = weights.metadata.get("model")
    if stored and timm.is_model(stored):
        return stored
    arch = find_architecture(weights)
    if arch == "test":
        return "test_cleandift"
    return f"{'dift' if teacher or weights.form == 'diffusers folder' else 'cleandift'}_{arch}"


def architecture_of(model: str) -> dict:
    """The entry of `models.ARCHITECTURES` behind a model's name ("cleandift_sd21", "test_cleandift")."""
    (arch,) = (part for part in model.split("_") if part in ARCHITECTURES)
    return ARCHITECTURES[arch]


def deepest_map(weights: Weights, cfg: dict) -> str:
    """The finest map whose UNet is held whole; "mid" if not even that is."""
    with torch.device("meta"):
        unet = FeatureUNet.build(cfg["unet"])
    for name in reversed(unet.map_names):
        unet.truncate(name)
        if all(f"unet.{key}" in weights for key in unet.state_dict()):
            return name
    return "mid"


def _whole_unet(cfg: dict) -> list[str]:
    """Native names of all tensors of diffusers' UNet, also of those that run after the last map."""
    with torch.device("meta"):
        unet = FeatureUNet(**cfg["unet"])
    return sorted(f"unet.{name}" for name in unet.state_dict())


def open_main(source: str) -> tuple[Path | HubFile, Weights]:
    """The place of a source, or of a published model's UNet, and its weights; a native checkpoint is verified.

    Raises:
        FileNotFoundError, download.HubError: not to be had. CheckpointError: no known form, or damaged.
    """
    main = download.parse_source(SOURCES.get(source, {}).get("unet", source))
    path = download.fetch_checkpoint(main)
    weights = checkpoints.open_checkpoint(path)
    if isinstance(main, Path) and "sha256" in weights.metadata:
        checkpoints.verify(path)
    return main, weights


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
) -> tuple[str, Weights]:
    """Writes a native folder, or a native file where `out` ends in .safetensors.

    Args:
        source: file, folder, OWNER/NAME[@REVISION][/PATH] on the Hub, or a published model's name.
        out: folder or file; a folder that stands there is replaced.
        model: name of the model that the weights are of (default: `find_model`).
        parts: sources of what is lacking, see `pretrained.Sources`.
        timestep: instead of the one found.
        teacher: take the teacher's UNet of a CompVis full file.
        dtype: of all tensors but the timestep (default: that of the UNet).
        cut: leave out the tensors that run after the finest map.
        max_shard_size: of a file in a folder.

    Returns:
        the model's name, and the weights that were found in the source itself.

    Raises:
        CheckpointError: unfit weights. RuntimeError: a part is not to be had. OSError: not written.
    """
    # The header is enough to tell what it is; what a full file on the Hub holds is read by ranges.
    main, found = open_main(source) if source not in SOURCES else (None, None)
    name = model or (source if source in SOURCES else find_model(found, teacher))
    if teacher and found is not None:
        found.teacher()  # says so if there is none
    sources = Sources(name, SOURCES.get(name, {}), parts or {})
    main = main or sources.main(timm.get_pretrained_cfg(name).to_dict())
    cfg = architecture_of(name)
    fixed = {"timestep"} if timestep is not None or "cleandift" not in name else set()
    weights, constants = open_parts(main, sources, fixed, teacher or "cleandift" not in name)
    check_configs(weights, cfg)
    if "timestep" in fixed:
        constants["timestep"] = torch.tensor(START_TIMESTEP if timestep is None else float(timestep))
    dtype = dtype or weights["unet.conv_in.weight"].dtype
    final_map = deepest_map(weights, cfg)
    with torch.device("meta"):
        built = timm.create_model(name, final_map=final_map)
    built.fixed.clear()  # DIFT's timestep is an argument; a file holds one all the same
    state: dict[str, Tensor] = fit_model(built, weights, constants, dtype)
    if not cut:
        state |= {key: weights[key].to(dtype) for key in _whole_unet(cfg) if key not in state and key in weights}
    label = main.name if isinstance(main, Path) else str(main)
    kept = {key: value for key, value in weights.metadata.items() if key not in ("format", "sha256", "timestep")}
    metadata = {**kept, "model": name, "source": label, "form": weights.form}
    if out.suffix == ".safetensors":
        checkpoints.save_native(state, out, metadata)
    else:
        config = timm_config(built)
        if final_map == built.unet.infos[-1].name:
            config["model_args"].pop("final_map")  # it holds every map: whoever loads it chooses
        card = model_card(
            config, CardInfo(recipe=kept.get("recipe"), notes=f"Converted from {label} ({weights.form}).")
        )
        checkpoints.save_folder(state, out, config, card, metadata, max_shard_size=max_shard_size)
    return name, found or weights


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

    main, weights = open_main(source)
    if teacher:
        weights = weights.teacher()
    name = model or find_model(weights, teacher)
    cfg = architecture_of(name)
    names = _whole_unet(cfg)
    missing = [key for key in names if key not in weights]
    if missing and fill:
        weights.fill(open_main(fill)[1], missing)
        missing = [key for key in missing if key not in weights]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of the whole UNet ({', '.join(missing[:3])}, ...): it was saved "
            "only as deep as its finest map. Give --fill SOURCE to take them from another UNet; no feature needs them"
        )
    with torch.device("meta"):
        like = {f"unet.{key}": tensor for key, tensor in FeatureUNet(**cfg["unet"]).state_dict().items()}
    dtype = dtype or weights["unet.conv_in.weight"].dtype
    state = checkpoints.fit(weights, like, lambda key: not key.startswith("unet."), dtype=dtype)
    side = timm.get_pretrained_cfg(name).input_size[-1] // 2 ** (len(cfg["vae"]["block_out_channels"]) - 1)
    config = {**cfg["unet"], "sample_size": side, "_diffusers_version": diffusers.__version__}
    label = main.name if isinstance(main, Path) else str(main)
    metadata = {"model": name, "source": label}
    if "timestep" in weights:
        metadata["timestep"] = str(weights["timestep"].item())
    state = {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    checkpoints.save_diffusers_unet(state, out, config, metadata)
    return name, weights
