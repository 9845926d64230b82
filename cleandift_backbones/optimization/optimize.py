"""optimize(model): the same maps for less time, once weights, timestep and prompt stay as they are.

Exact steps: what a constant timestep and prompt give is computed once and their weights are dropped, and resnets write
into the tensors they own (`fold.py`); memory formats that the device's convolutions take as they are; on CPUs,
convolutions in fewer multiplications (`cpu_winograd.py`). Steps that are asked for by name: memory that the process
keeps between passes (`cpu_malloc.py`); approximate ones, 16-bit weights and torch.compile (which fuses what is left
between products).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.cleandift import CleanDIFT, lacks_bfloat16
from ..models.dift import DIFT
from ..utils.errors import InputError, InputTypeError, StateError
from .cpu_any_size_conv import AnySizeConv, in_one_graph
from .cpu_malloc import keep_freed_memory
from .cpu_winograd import WinogradConv
from .fold import check_foldable, lean, replace
from .fold import fold as fold_constants

MOST_GRAPHS = 64  # of all compiled models: each kind, choice of maps, number of prompts and seed of noise makes one
#: torch.compile modes that replay CUDA graphs: their outputs live in memory that the next call writes over
_GRAPHS = ("reduce-overhead", "max-autotune")


def _winograd(root: nn.Module, everywhere: bool) -> None:
    """WinogradConv in place of convolutions: where it pays for its memory (in SD: the VAE, the UNet's 320 and 640
    channels), or everywhere."""
    for name, conv in list(root.named_modules()):
        size = (conv.in_channels, conv.out_channels) if WinogradConv.fits(conv) else ()
        pays = size and min(size) >= 128 and size[0] * size[1] <= 1 << 20
        if size and not name.endswith("conv_in") and (everywhere or pays):
            replace(root, name, WinogradConv(conv))


def _any_size(root: nn.Module) -> None:
    """AnySizeConv in place of convolutions."""
    for conv in root.modules():
        if AnySizeConv.fits(conv):
            conv.__class__ = AnySizeConv


class _Optimized:
    """What an optimised model does in another way, and what it refuses."""

    _folded: tuple[str, ...]  # names of the buffers whose values are in the weights now
    own_keys: bool  # whether the state dict is no longer the native one
    _compile: dict[str, Any] | None  # arguments of torch.compile

    def _maps(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        self._check_input(x)
        weight = self.denoiser.conv_in.weight
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not traced:
            self._check_constants()
            if torch.is_grad_enabled() and (x.requires_grad or self._learns()):
                raise self._refusal("a gradient of its weights or images")
        height, width = x.shape[-2:]
        with torch.no_grad():
            x = x.to(weight.dtype)
            if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
                x = x.contiguous(memory_format=torch.channels_last)
            # A replica of DataParallel lives for one call: too short to be compiled.
            if self._compile is None or traced or getattr(self, "_is_replica", False):
                return super()._maps(x, names)
            # The compiled part sees whole cells only, so that no size takes a path of its own.
            stride = self.vae.stride
            bottom, right = -height % stride, -width % stride
            x = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
            if self._compiled is None:
                self._compiled = torch.compile(self._for_all_sizes, **self._compile)
            graphs = x.is_cuda and self._compile.get("mode") in _GRAPHS
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            # Without the first a square image would bind height to width, and the next would compile again; without
            # the second the ninth graph would be an error.
            with (
                torch.fx.experimental._config.patch(use_duck_shape=False),
                torch._dynamo.config.patch(cache_size_limit=MOST_GRAPHS),
            ):
                maps = self._compiled(x, tuple(names))
            maps = {name: y.clone() for name, y in maps.items()} if graphs else maps
        reductions = {info.name: info.stride * stride for info in self.denoiser.infos}
        reductions |= {name: reduction for name, (_, reduction) in self.vae.map_infos.items()}
        return {n: y[..., : -(-height // reductions[n]), : -(-width // reductions[n])] for n, y in maps.items()}

    def _for_all_sizes(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return in_one_graph(super()._maps, x, names)

    def _learns(self) -> bool:
        """Whether somebody wants gradients of what computes the maps (a classifier's are given)."""
        return any(p.requires_grad for module in (self.denoiser, self.vae) for p in module.parameters())

    def _remember(self) -> None:
        """Notes the folded constants: which tensors they are, how often these were written to, and their values."""
        self._known = {}
        with torch.inference_mode(False):
            for name in self._folded:
                tensor = self.get_buffer(name)
                if tensor.is_inference():  # such a tensor does not count what is written to it
                    tensor = tensor.clone()
                    setattr(self, name, tensor)
                self._known[name] = tensor, tensor._version, tensor.clone()

    def _stands(self, name: str, now: Tensor) -> bool:
        """Whether a constant is what was folded: the same tensor, or equal to it (DistributedDataParallel writes the
        same values anew, DataParallel's replicas have copies)."""
        tensor, version, value = self._known[name]
        if now is tensor and tensor._version == version:
            return True
        return now.shape == value.shape and torch.equal(now.to(value), value)

    def _check_constants(self) -> None:
        for name in self._folded:
            if not self._stands(name, self.get_buffer(name)):
                raise self._refusal(f"another {name}")

    def _apply(self, fn, recurse=True):
        self._check_constants()
        super()._apply(fn, recurse)
        self._compiled = None
        self._remember()  # moved, not changed
        return self

    def __getstate__(self) -> dict:
        self._check_constants()
        return self.__dict__ | dict(_compiled=None, _known=None)  # copies compile anew

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._remember()

    @staticmethod
    def _refusal(what: str) -> RuntimeError:
        return RuntimeError(
            f"this model is optimised for inference: {what} is not possible any more. Do it with the model as "
            "timm.create_model gives it, before cleandift_backbones.optimize, or on a copy made before"
        )

    def train(self, mode: bool = True):
        """Stays in eval mode, so that training loops may call train() on a model that has a head to learn."""
        return super().train(False)

    def set_prompt(self, prompt, text_encoder=None) -> None:
        if "prompt_embeds" in self._folded:
            raise self._refusal("another prompt (unless with fold='timestep')")
        super().set_prompt(prompt, text_encoder)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise self._refusal("gradient checkpointing")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes what a model optimised in the same way has saved, or nothing: folded weights are of one piece."""
        given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if given and self.own_keys:
            shapes = {prefix + name: tensor.shape for name, tensor in self.state_dict().items()}
            if {name: tensor.shape for name, tensor in given.items()} != shapes or not all(
                self._stands(name, given[prefix + name]) for name in self._folded
            ):
                raise self._refusal("loading weights that a model optimised in another way, or not at all, has saved")
        super()._load_from_state_dict(state_dict, prefix, *args)


class OptimizedCleanDIFT(_Optimized, CleanDIFT):
    """A CleanDIFT after `optimize`."""


class OptimizedDIFT(_Optimized, DIFT):
    """A DIFT after `optimize`."""

    def set_noise(
        self, timestep: int | None = None, ensemble_size: int | None = None, noise_seed: int | None = None
    ) -> None:
        if "timestep" in self._folded and timestep not in (None, self.timestep.item()):
            raise self._refusal("another timestep (unless with fold=False)")
        self._check_constants()
        super().set_noise(timestep, ensemble_size, noise_seed)
        self._remember()  # the same timestep, in a new tensor


def _backbone_of(model: nn.Module) -> CleanDIFT:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, CleanDIFT)]
    if len(found) != 1:
        raise InputTypeError(f"expected a model with one backbone of this package, found {len(found)} in {type(model)}")
    if isinstance(found[0], _Optimized):
        raise InputError("this model has been optimised already")
    if any(tensor.is_meta for tensor in found[0].state_dict().values()):
        raise InputError("a model on the meta device has no values to fold: load or initialise it first")
    return found[0]


def slow_16bit(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether this CPU multiplies matrices of the dtype one number at a time, hundreds of times slower than float32."""
    known_here = torch.backends.mkldnn.is_available()  # without oneDNN torch does not say
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not known_here:
        return False
    known = dict(bfloat16="_is_mkldnn_bf16_supported", float16="_is_mkldnn_fp16_supported")
    return not getattr(torch.ops.mkldnn, known[str(dtype).removeprefix("torch.")])()


def _rebuild(
    backbone: CleanDIFT,
    fold: bool | str,
    dtype: torch.dtype,
    channels_last: bool,
    winograd: bool | str,
    compiled: bool = False,
) -> None:
    """Other layers in place of the backbone's; `winograd`: True = everywhere, "where it pays", False."""
    if fold:
        fold_constants(backbone.denoiser, backbone.timestep, backbone.prompt_embeds if fold is True else None)
    lean(backbone)
    backbone.to(dtype=dtype)
    if winograd:
        _winograd(backbone, everywhere=winograd is True)
    if compiled:
        _any_size(backbone)
    if channels_last:
        backbone.to(memory_format=torch.channels_last)


def _compile_arguments(compile: bool | str | dict) -> dict[str, Any] | None:
    """Those of torch.compile, which looks at them at once; None without it."""
    if not isinstance(compile, (bool, str, dict)):
        raise InputError(f"compile must be True, False, a mode or a dict of torch.compile's arguments, got {compile!r}")
    if compile is False:
        return None
    named = compile if isinstance(compile, dict) else dict(dynamic=True) if compile is True else dict(mode=compile)
    arguments = dict(fullgraph=True) | named
    try:
        torch.compile(lambda: None, **arguments)
    except Exception as error:  # of many types: unknown modes, backends, options, arguments
        raise InputError(f"compile={compile!r} is not what torch.compile takes: {error}") from error
    return arguments


def optimize(
    model: nn.Module,
    *,
    fold: bool | str = True,
    channels_last: bool | None = None,
    winograd: bool | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | str | dict = False,
    keep_memory: bool = False,
) -> nn.Module:
    """Makes a model of this package faster for inference, in place, and returns it.

    Works on what `timm.create_model` returns, with features_only or without, and on larger models that hold one such
    backbone (a segmenter of segmentation_models_pytorch, transformers' TimmBackbone). The interface stays; images of
    any floating-point dtype are taken; maps carry no gradients, but heads on them learn: train() of the whole leaves
    the backbone in eval mode, and state dicts of the whole can be saved and loaded again (docs/performance.md).
    Afterwards the backbone refuses, with a RuntimeError: another prompt or timestep; gradients of its weights or of
    images; weights that a model optimised in the same way has not saved. Optimise a `copy.deepcopy` to keep the
    original. A refused call changes nothing.

    Args:
        fold: exact to rounding (1e-5 of a map in float32). The timestep's embedding goes into the resnets' biases, keys
            and values of the prompt are held, and the weights that they came from are dropped. "timestep" leaves the
            prompt open to `set_prompt`; with False, and winograd=False, state dicts stay the native ones. One prompt
            per image, set before, is held as such: batches must then have as many images.
        channels_last: memory format of the convolutions' weights, exact. Default: on a CPU, and on a GPU in 16 bit.
        winograd: exact to rounding (2e-5 of a map). Most 3 x 3 convolutions by Winograd's algorithm, two to three times
            faster on a CPU, with four times the memory for their weights; True takes all of them (sd21, us6: 8.5 GiB of
            weights, not 2.9). Default: where it pays, on a CPU in float32. Moved to another dtype or device, under
            autocast, when exported or in a torch.compile that is not ours, these layers are plain convolutions again.
        dtype: approximate. torch.bfloat16 or torch.float16 halve memory; maps stay at a cosine similarity of at
            least 0.999 to float32's. Default: as it is.
        compile: approximate in the last digits. True compiles once for all image sizes above 64 px a side (and once for
            batches of one, each choice of maps, number of prompts and seed of noise), on the first call, for minutes;
            "reduce-overhead" also replays CUDA graphs, one for each image size; a dict holds arguments of
            torch.compile.
        keep_memory: exact, and for the whole process: memory that a pass frees is kept for the next one, as torch does
            on a GPU, in place of new pages from the kernel (`cpu_malloc.keep_freed_memory`): a fifth to a quarter of
            the time on a CPU. The commands of this package ask for it.

    Raises:
        TypeError: no backbone of this package, or several. ValueError: optimised already, on the meta device, unknown
            values, what torch.compile does not take, layers that cannot be folded, winograd elsewhere than in float32
            on a CPU. RuntimeError: the device has no bfloat16.
    """
    if not (isinstance(fold, bool) or fold == "timestep"):
        raise InputError(f"fold must be True, False or 'timestep', got {fold!r}")
    for name, value in (("channels_last", channels_last), ("winograd", winograd)):
        if not (value is None or isinstance(value, bool)):
            raise InputError(f"{name} must be True, False or None, got {value!r}")
    if not isinstance(keep_memory, bool):
        raise InputError(f"keep_memory must be True or False, got {keep_memory!r}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or None, got {dtype!r}")
    compile_arguments = _compile_arguments(compile)
    backbone = _backbone_of(model)
    weight = backbone.denoiser.conv_in.weight
    device, dtype = weight.device, dtype or weight.dtype
    fits = device.type == "cpu" and dtype == torch.float32
    if winograd and not fits:
        raise InputError(f"winograd=True is for float32 on a CPU, got dtype={dtype} on {device}")
    if fold:
        check_foldable(backbone.denoiser, text=fold is True)
    if dtype == torch.bfloat16 and lacks_bfloat16(device):
        raise StateError(f"{device} has no bfloat16: use dtype=torch.float16 or torch.float32")
    if slow_16bit(dtype, device):
        warnings.warn(
            f"this CPU has no instructions for {dtype}: it will run hundreds of times slower than torch.float32",
            stacklevel=2,
        )
    if channels_last is None:
        channels_last = device.type == "cpu" or dtype != torch.float32
    # Nothing was changed so far: a refusal leaves the model as it was.
    backbone.eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        winograd = winograd or (winograd is None and fits and "where it pays")
        _rebuild(backbone, fold, dtype, channels_last, winograd, compiled=compile_arguments is not None)
    backbone._compile, backbone._compiled = compile_arguments, None
    backbone._folded = {True: ("timestep", "prompt_embeds"), "timestep": ("timestep",), False: ()}[fold]
    backbone.own_keys = bool(fold) or any(isinstance(module, WinogradConv) for module in backbone.modules())
    backbone.__class__ = OptimizedDIFT if isinstance(backbone, DIFT) else OptimizedCleanDIFT
    backbone._remember()
    if keep_memory:
        keep_freed_memory()
    return model
