"""optimize(model): the same maps for less time, once weights, timestep and prompt stay as they are.

Exact steps: what a constant timestep and prompt give is computed once and their weights are dropped (`FoldedUNet`);
resnets write into the tensors they own (`LeanResnet`); memory formats that the device's convolutions take as they are;
on CPUs, convolutions in fewer multiplications (`winograd.py`) and memory that is kept between passes (`allocator.py`).
Approximate steps, each asked for by name: 16-bit weights, torch.compile (which fuses what is left between products).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .allocator import keep_freed_memory
from .backbone import CleanDIFT, lacks_bfloat16
from .noisy import DIFT
from .unet import FeatureUNet
from .winograd import WinogradConv

#: torch.compile modes that replay CUDA graphs: their outputs live in memory that the next call writes over
_GRAPHS = ("reduce-overhead", "max-autotune")


class LeanResnet(nn.Module):
    """diffusers' ResnetBlock2D for inference, on the same norms and convolutions.

    Activations and sums are written into tensors that the block itself made, and nothing is divided by one. A constant
    time embedding B x T (B = 1) is added to the first convolution's bias.
    """

    def __init__(self, block: ResnetBlock2D, temb: Tensor | None = None):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut, self.scale = block.conv_shortcut, float(block.output_scale_factor)
        self.time_emb_proj = block.time_emb_proj
        if temb is not None and self.time_emb_proj is not None:
            shift = block.time_emb_proj(F.silu(temb.float()))[0]
            self.conv1 = _with_bias(self.conv1, self.conv1.bias + shift)
            self.time_emb_proj = None

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is a resnet of the kind that Stable Diffusion is made of."""
        return (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
            and block.upsample is None
            and block.downsample is None
            and isinstance(block.nonlinearity, nn.SiLU)
            and type(block.conv1) is nn.Conv2d
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None:
            y += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y if self.scale == 1 else y.div_(self.scale)


class FixedText(nn.Module):
    """Attention processor of a cross attention whose text is known: keys and values are held, not computed.

    Args:
        attention: the layer; its to_k and to_v are not used any more.
        text: N x L x C, one text for all images or one per image.
    """

    def __init__(self, attention: Attention, text: Tensor):
        super().__init__()

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2).contiguous()  # N x heads x L x d

        self.register_buffer("key", heads(attention.to_k(text)))
        self.register_buffer("value", heads(attention.to_v(text)))

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Whether it is a plain cross attention, run by diffusers' default processor."""
        return (
            isinstance(attention, Attention)
            and type(attention.processor) is AttnProcessor2_0
            and attention.is_cross_attention
            and not (attention.norm_cross or attention.norm_q or attention.norm_k)
            and attention.group_norm is None
            and attention.spatial_norm is None
            and attention.rescale_output_factor == 1
            and not attention.residual_connection
        )

    def forward(self, attention: Attention, x: Tensor, **_: Any) -> Tensor:
        """x: B x tokens x channels, where B is a multiple of N (DIFT runs several noises of an image)."""
        query = attention.to_q(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        key, value = self.key, self.value
        if len(key) == 1:
            key, value = (t.expand(x.shape[0], -1, -1, -1) for t in (key, value))
        elif len(key) != x.shape[0]:
            key, value = (t.repeat_interleave(x.shape[0] // len(t), dim=0) for t in (key, value))
        return attention.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FoldedUNet(FeatureUNet):
    """A FeatureUNet at one timestep, and, if `fixed_text`, one prompt: its layers hold what these give."""

    fixed_text = True

    def forward(self, latents: Tensor, timestep: Any = None, prompt_embeds: Any = None, maps=None) -> dict[str, Tensor]:
        maps = self.map_names if maps is None else tuple(maps)
        self.check_maps(maps)
        text = None if self.fixed_text else prompt_embeds.to(latents.dtype).expand(len(latents), -1, -1)
        return self.walk(latents, None, text, maps)


def _with_bias(conv: nn.Conv2d, bias: Tensor) -> nn.Conv2d:
    """The convolution with another bias, on the same weight tensor."""
    with torch.device("meta"):
        new = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=True
        ).eval()
    new.weight, new.bias = conv.weight, nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return new


def _fold(unet: FeatureUNet, timestep: Tensor, prompt_embeds: Tensor | None) -> None:
    """Computes, in float32, what the timestep and the prompt (None: left open) give, and drops what it came from."""
    modules = dict(unet.named_modules())
    resnets = {n: m for n, m in modules.items() if isinstance(m, ResnetBlock2D)}
    attentions = {n: m for n, m in modules.items() if isinstance(m, Attention) and m.is_cross_attention}
    others = [n for n, m in resnets.items() if not LeanResnet.fits(m)]
    others += [n for n, m in attentions.items() if prompt_embeds is not None and not FixedText.fits(m)]
    if others:
        raise ValueError(
            f"{others[0]} cannot be folded: it is not a plain Stable Diffusion layer, or has adapters or an attention "
            "processor of its own. Merge or remove these first, or pass fold=False"
        )
    dtype = unet.conv_in.weight.dtype
    temb = unet.time_embedding.float()(unet.time_proj(timestep.reshape(1).float()))
    for name, block in resnets.items():
        block.time_emb_proj.float()
        _replace(unet, name, LeanResnet(block, temb))
    for attention in attentions.values() if prompt_embeds is not None else ():
        attention.to_k.float(), attention.to_v.float()
        attention.set_processor(FixedText(attention, prompt_embeds.float()).to(dtype))
        attention.to_k = attention.to_v = None
    unet.time_embedding = unet.time_proj = None
    unet.__class__ = FoldedUNet
    unet.fixed_text = prompt_embeds is not None


def _lean(module: nn.Module) -> None:
    """LeanResnet in place of every resnet that it fits."""
    for name, block in list(module.named_modules()):
        if LeanResnet.fits(block):
            _replace(module, name, LeanResnet(block))


def _winograd(root: nn.Module, everywhere: bool) -> None:
    """WinogradConv in place of convolutions: where it pays for its memory (in SD: the VAE, the UNet's 320 and 640
    channels), or everywhere."""
    for name, conv in list(root.named_modules()):
        size = (conv.in_channels, conv.out_channels) if WinogradConv.fits(conv) else ()
        pays = size and min(size) >= 128 and size[0] * size[1] <= 1 << 20
        if size and not name.endswith("conv_in") and (everywhere or pays):
            _replace(root, name, WinogradConv(conv))


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = new


class _Optimized:
    """What an optimised model does in another way, and what it refuses."""

    _folded: tuple[str, ...]  # names of the buffers whose values are in the weights now
    _own_keys: bool  # whether the state dict is no longer the native one
    _compile: dict[str, Any] | None  # arguments of torch.compile

    def _maps(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        self._check_input(x)
        self._check_constants()
        weight = self.unet.conv_in.weight
        height, width = x.shape[-2:]
        with torch.no_grad():
            x = x.to(weight.dtype)
            if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
                x = x.contiguous(memory_format=torch.channels_last)
            if self._compile is None:
                return super()._maps(x, names)
            # The compiled part sees whole cells only, so that no size takes a path of its own.
            stride = self.vae.stride
            bottom, right = -height % stride, -width % stride
            x = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
            if self._compiled is None:
                self._compiled = torch.compile(super()._maps, **self._compile)
            graphs = x.is_cuda and self._compile.get("mode") in _GRAPHS
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            # Without this a first square image would bind height to width, and the next one would compile again.
            with torch.fx.experimental._config.patch(use_duck_shape=False):
                maps = self._compiled(x, tuple(names))
            maps = {name: y.clone() for name, y in maps.items()} if graphs else maps
        reductions = {info["name"]: info["reduction"] for info in self.feature_info}
        return {n: y[..., : -(-height // reductions[n]), : -(-width // reductions[n])] for n, y in maps.items()}

    def _stamp(self) -> list[tuple[Tensor, int]]:
        """The folded constants, and how often each was written to."""
        return [(buffer, buffer._version) for buffer in map(self.get_buffer, self._folded)]

    def _check_constants(self) -> None:
        for name, (known, version), (now, writes) in zip(self._folded, self._known, self._stamp()):
            if known is not now or version != writes:
                raise self._refusal(f"another {name}")

    def _apply(self, fn, recurse=True):
        self._check_constants()
        super()._apply(fn, recurse)
        self._compiled, self._known = None, self._stamp()  # moved, not changed
        return self

    def __getstate__(self) -> dict:
        self._check_constants()
        return self.__dict__ | dict(_compiled=None, _known=None)  # copies compile anew

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._known = self._stamp()

    @staticmethod
    def _refusal(what: str) -> RuntimeError:
        return RuntimeError(
            f"this model is optimised for inference: {what} is not possible any more. Do it with the model as "
            "timm.create_model gives it, before cleandift_backbones.optimize, or on a copy made before"
        )

    def train(self, mode: bool = True):
        if mode:
            raise self._refusal("training")
        return super().train(False)

    def set_prompt(self, prompt, text_encoder=None) -> None:
        if "prompt_embeds" in self._folded:
            raise self._refusal("another prompt (unless with fold='timestep')")
        super().set_prompt(prompt, text_encoder)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise self._refusal("gradient checkpointing")

    def state_dict(self, *args, **kwargs):
        if self._own_keys:
            raise self._refusal("saving or taking its state_dict (unless with fold=False and winograd=False)")
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        if self._own_keys:
            raise self._refusal("loading weights (unless with fold=False and winograd=False)")
        return super()._load_from_state_dict(*args, **kwargs)


class OptimizedCleanDIFT(_Optimized, CleanDIFT):
    """A CleanDIFT after `optimize`."""


class OptimizedDIFT(_Optimized, DIFT):
    """A DIFT after `optimize`."""


def _backbone_of(model: nn.Module) -> CleanDIFT:
    found = [module for module in model.modules() if isinstance(module, CleanDIFT)]
    if len(found) != 1:
        raise TypeError(f"expected a model with one backbone of this package, found {len(found)} in {type(model)}")
    if isinstance(found[0], _Optimized):
        raise ValueError("this model has been optimised already")
    if any(tensor.is_meta for tensor in found[0].state_dict().values()):
        raise ValueError("a model on the meta device has no values to fold: load or initialise it first")
    return found[0]


def slow_16bit(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether this CPU multiplies matrices of the dtype one number at a time, hundreds of times slower than float32."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    known = dict(bfloat16="_is_mkldnn_bf16_supported", float16="_is_mkldnn_fp16_supported")
    return not getattr(torch.ops.mkldnn, known[str(dtype).removeprefix("torch.")])()


def optimize(
    model: nn.Module,
    *,
    fold: bool | str = True,
    channels_last: bool | None = None,
    winograd: bool | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | str | dict = False,
    keep_memory: bool | None = None,
) -> nn.Module:
    """Makes a model of this package faster for inference, in place, and returns it.

    Works on what `timm.create_model` returns, with features_only or without, and on larger models that hold one such
    backbone (a segmenter of segmentation_models_pytorch, transformers' TimmBackbone). The interface stays; images of
    any floating-point dtype are taken; outputs carry no gradients. Afterwards the backbone refuses, with a
    RuntimeError: training; another prompt or timestep; taking, saving or loading a state dict. Optimise a
    `copy.deepcopy` to keep the original.

    Args:
        fold: exact to rounding (1e-5 of a map in float32). The timestep's embedding goes into the resnets' biases, keys
            and values of the prompt are held, and the weights that they came from are dropped. "timestep" leaves the
            prompt open to `set_prompt`; with False, and winograd=False, state dicts can still be taken too. One prompt
            per image, set before, is held as such: batches must then have as many images.
        channels_last: memory format of the convolutions' weights, exact. Default: on a CPU, and on a GPU in 16 bit.
        winograd: exact to rounding (1e-5 of a map). Most 3 x 3 convolutions by Winograd's algorithm, two to three times
            faster on a CPU, with four times the memory for their weights; True takes all of them (sd21, us6: 5.4 GB
            more). Default: where it pays, on a CPU in float32 without `compile`.
        dtype: approximate. torch.bfloat16 or torch.float16 halve memory; maps stay at a cosine similarity of at
            least 0.999 to float32's. Default: as it is.
        compile: approximate in the last digits. True compiles once for any image size (and once for batches of one),
            on the first call, for minutes; "reduce-overhead" also replays CUDA graphs, one for each image size; a dict
            holds arguments of torch.compile.
        keep_memory: exact, and for the whole process: memory that a pass frees is kept for the next one, as torch does
            on a GPU, in place of new pages from the kernel (`allocator.keep_freed_memory`). Default: on a CPU.

    Raises:
        TypeError: no backbone of this package, or several. ValueError: optimised already, on the meta device, unknown
            `fold` or dtype, layers that cannot be folded, winograd in 16 bit or with `compile`. RuntimeError: the
            device has no bfloat16.
    """
    if fold not in (True, False, "timestep"):
        raise ValueError(f"fold must be True, False or 'timestep', got {fold!r}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or None, got {dtype!r}")
    backbone = _backbone_of(model)
    weight = backbone.unet.conv_in.weight
    device, dtype = weight.device, dtype or weight.dtype
    if slow_16bit(dtype, device):
        warnings.warn(
            f"this CPU has no instructions for {dtype}: it will run hundreds of times slower than torch.float32",
            stacklevel=2,
        )
    if dtype == torch.bfloat16 and lacks_bfloat16(device):
        raise RuntimeError(f"{device} has no bfloat16: use dtype=torch.float16 or torch.float32")
    if channels_last is None:
        channels_last = device.type == "cpu" or dtype != torch.float32
    if winograd and (dtype != torch.float32 or compile):
        raise ValueError(f"winograd=True is for float32 without compile, got dtype={dtype} and compile={compile!r}")
    backbone.eval().requires_grad_(False)
    with torch.no_grad():
        if fold:
            _fold(backbone.unet, backbone.timestep, backbone.prompt_embeds if fold is True else None)
        _lean(backbone)
        backbone.to(dtype=dtype)
        if winograd or (winograd is None and device.type == "cpu" and dtype == torch.float32 and not compile):
            _winograd(backbone, everywhere=bool(winograd))
        if channels_last:
            backbone.to(memory_format=torch.channels_last)
    if isinstance(compile, str):
        compile = dict(mode=compile)
    if compile is True or isinstance(compile, dict):
        compile = dict(fullgraph=True) | (dict(dynamic=True) if compile is True else compile)
    backbone._compile = compile or None
    backbone._compiled = None
    backbone._folded = {True: ("timestep", "prompt_embeds"), "timestep": ("timestep",), False: ()}[fold]
    backbone._own_keys = bool(fold) or any(isinstance(module, WinogradConv) for module in backbone.modules())
    backbone.__class__ = OptimizedDIFT if isinstance(backbone, DIFT) else OptimizedCleanDIFT
    backbone._known = backbone._stamp()
    if keep_memory or (keep_memory is None and device.type == "cpu"):
        keep_freed_memory()
    return model
