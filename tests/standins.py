"""Small stand-ins for the published files: their key names, the shapes of `test_cleandift`, random numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save
from timm.models import _registry
from torch import Tensor

from cleandift_backbones.models import entrypoints
from cleandift_backbones.models.architectures import ARCHITECTURES, MODELS, Architecture, Published, published
from cleandift_backbones.models.projection_heads import ProjectionHeads

CFG = ARCHITECTURES["test"]
TIMESTEP = 247.5
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@contextmanager
def registry_kept() -> Iterator[None]:
    """Forgets afterwards what is registered inside of it."""
    tables = [ARCHITECTURES, MODELS, entrypoints.default_cfgs, _registry._model_entrypoints]
    tables += [_registry._model_to_module, _registry._model_default_cfgs]
    before, names = [dict(table) for table in tables], set(_registry._module_to_models["entrypoints"])
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)
        _registry._module_to_models["entrypoints"] = names


def put(patch, arch: Architecture) -> None:
    """An architecture, and its models, in the place of those of its name."""
    patch.setitem(ARCHITECTURES, arch.name, arch)
    for spec in list(MODELS.values()):
        if spec.arch.name == arch.name:
            patch.setitem(MODELS, spec.name, replace(spec, arch=arch))


def use_parts(patch, name: str, arch: Architecture) -> None:
    """The models of architecture `name` have the parts of `arch`; their size and published weights stay."""
    kept = ("name", "published", "base_model", "listed", "image_size")
    put(patch, replace(arch, **{field: getattr(ARCHITECTURES[name], field) for field in kept}))


def publish(patch, model: str, **parts: str) -> None:
    """Only these parts are published of a model's weights."""
    spec = MODELS[model]
    tag = spec.published[0].tag if spec.published else "test"
    published = {**spec.arch.published, spec.kind: (Published(tag, parts, "mit"),)}
    put(patch, replace(spec.arch, published=published))


@cache
def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**CFG.denoiser.config).eval()


@cache
def vae() -> AutoencoderKL:
    torch.manual_seed(10)
    levels = len(CFG.vae["block_out_channels"])
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return AutoencoderKL(**CFG.vae, **blocks).eval()


@cache
def text_encoder():
    """(tokenizer, text encoder) of 3 tokens and width 6."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(20)
    words = f"{published('dift_tiny')['text_encoder']}/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(words, model_max_length=CFG.conditions.length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CFG.denoiser.config["cross_attention_dim"],
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CFG.conditions.length,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config).eval()


def empty_prompt() -> Tensor:
    tokenizer, encoder = text_encoder()
    ids = tokenizer([""], padding="max_length", max_length=CFG.conditions.length, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids)[0]


@cache
def heads() -> ProjectionHeads:
    torch.manual_seed(30)
    made = ProjectionHeads({m.name: m.channels for m in CFG.denoiser.maps()}, conditioning="adarms")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half().contiguous() for name, tensor in state.items()}


def old_names(state: dict[str, Tensor], convolutions: bool = False) -> dict[str, Tensor]:
    """The VAE's tensors under diffusers' attention names before 0.17; the oldest had 1 x 1 convolutions there."""
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            for new, old in OLD.items():
                if f".{new}." in name:
                    name = name.replace(f".{new}.", f".{old}.")
                    tensor = tensor[:, :, None, None] if convolutions and name.endswith("weight") else tensor
        renamed[name] = tensor
    return renamed


def compvis_unet() -> bytes:
    return save(half(unet(0).state_dict()))


def compvis_full() -> bytes:
    """The student is unet(0), the teacher unet(1)."""
    state = {f"unet_feature_extractor_cleandift.{n}": t for n, t in unet(0).state_dict().items()}
    state |= {f"unet_feature_extractor_base.{n}": t for n, t in unet(1).state_dict().items()}
    state |= {f"ae.ae.{n}": t for n, t in vae().state_dict().items()}
    state |= heads().state_dict()
    return save(half(state) | {"timestep": torch.tensor(TIMESTEP)})


def sd_vae() -> bytes:
    return save({n: t.contiguous() for n, t in old_names(vae().state_dict()).items()})


@cache
def diffusers_files() -> dict[str, bytes]:
    """A repository in diffusers' layout around the teacher, unet(1)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer, encoder = text_encoder()
        unet(1).save_pretrained(folder / "unet")
        vae().save_pretrained(folder / "vae")
        encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        DDIMScheduler(**CFG.schedule.config).save_pretrained(folder / "scheduler")
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    config = json.loads(files["tokenizer/tokenizer_config.json"])
    files["tokenizer/tokenizer_config.json"] = json.dumps(
        {**config, "model_max_length": CFG.conditions.length, "tokenizer_class": "PreTrainedTokenizerFast"}
    ).encode()
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def expected_maps(x: Tensor, seed: int = 0, timestep: float = TIMESTEP, dtype: torch.dtype = torch.float16) -> dict:
    """Named maps worked out with diffusers' own VAE and UNet: hooks on its forward. Weights are rounded to `dtype`."""
    from copy import deepcopy

    encoder, model = deepcopy(vae()), deepcopy(unet(seed))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    found = {}
    for info in CFG.denoiser.maps():
        module = model.get_submodule(info.module)
        module.register_forward_hook(
            lambda module, inputs, output, name=info.name: found.update(
                {name: output[0] if isinstance(output, tuple) else getattr(output, "sample", output)}
            )
        )
    with torch.no_grad():
        latents = encoder.encode(x).latent_dist.mode() * encoder.config.scaling_factor
        prompt = empty_prompt().expand(len(x), -1, -1)
        model(latents, torch.tensor(timestep), prompt)
    return found
