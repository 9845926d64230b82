"""The backbone in configs of mmsegmentation, mmdetection, and whatever else stands on mmengine.

    backbone=dict(type="cleandift_backbones.CleanDIFT", model_name="cleandift_sd21", out_indices=["us6"], frozen=True)

Also with `custom_imports = dict(imports=["cleandift_backbones.mm"])` and plain `type="CleanDIFT"`, or by the full path
`type="cleandift_backbones.mm.CleanDIFT"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..mm_checks import MapTable, check_launcher, check_model, check_packages, describe
from ..models.architectures import find_spec, spec_of
from ..models.inputs import reach
from ..utils.errors import InputError, StateError

check_packages()
check_launcher()

from mmengine.hooks import Hook  # noqa: E402  (first the check, whose message says what to do)
from mmengine.model import BaseModule, is_model_wrapper  # noqa: E402
from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402

from ..registry import HOOKS, MODELS  # noqa: E402

#: parts that can be frozen -> modules of the model
PARTS = {
    "vae": ("vae.",),
    "unet_down": ("unet.conv_in.", "unet.time_embedding.", "unet.down_blocks."),
    "unet_mid": ("unet.mid_block.",),
    "unet_up": ("unet.up_blocks.",),
    "heads": ("heads.",),  # projection heads, with projected_timestep
}
RECORD = "frozen_weights"  # in checkpoints that leave frozen weights out: which they are, as JSON in a uint8 tensor
NOT_GIVEN: Any = object()


def _source(pretrained: bool | str | None, init_cfg: Mapping | None) -> bool | str:
    """Where weights come from: True = as published, a path or Hub name, False = from a checkpoint that follows."""
    if isinstance(init_cfg, Mapping):
        if init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"} or pretrained is True:
            raise InputError(
                f"init_cfg {dict(init_cfg)!r} with pretrained={pretrained}: expected init_cfg=dict(type='Pretrained', "
                "checkpoint=PATH_OR_HUB_NAME), and pretrained left out"
            )
        pretrained = init_cfg["checkpoint"]
    elif init_cfg not in (None, NOT_GIVEN):
        raise InputError(f"init_cfg must be one dict(type='Pretrained', checkpoint=...), got {init_cfg!r}")
    if pretrained is None:
        # mmseg.apis.init_model and mmdet.apis.init_detector put init_cfg=None where a checkpoint will follow.
        return init_cfg is NOT_GIVEN
    if isinstance(pretrained, bool):
        return pretrained
    if not isinstance(pretrained, (str, Path)):
        raise InputError(
            "pretrained must be True, False, a path or OWNER/NAME on the Hub, got "
            f"{type(pretrained).__name__}: tensors in memory go to pretrained_cfg_overlay=dict(state_dict=...)"
        )
    place = str(pretrained)
    for prefix in ("local-dir:", "hf-hub:"):  # timm's
        place = place.removeprefix(prefix)
    path = os.path.expanduser(place)
    return os.path.abspath(path) if os.path.exists(path) else place


@MODELS.register_module()
@MMENGINE_MODELS.register_module()
class CleanDIFT(BaseModule):
    """Maps of a diffusion UNet as a backbone: B x 3 x H x W in [-1, 1], H and W >= 64 -> a tuple of maps.

    Maps are B x out_channels[i] x ceil(H / strides[i]) x ceil(W / strides[i]), ordered like out_indices. Pixels come as
    the model wants them by `data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)`.

    Args:
        model_name: "cleandift_sd21", "cleandift_sd15", "cleandift_tiny", "dift_...", "cleandift_..._pyramid".
        pretrained: True: the published weights; a native file or folder, a published file, or OWNER/NAME on the Hub:
            those; False: none, a checkpoint must follow. Default: init_cfg, and without it True.
        out_indices: which maps, see `describe`; names ("us6") do as well.
        frozen: the whole backbone: eval mode, no gradients, no graph, also after train().
        frozen_parts: of PARTS: "vae", "unet_down", "unet_mid", "unet_up", "heads".
        with_cp: recompute activations in the backward pass: less memory, same results.
        prompt: text instead of the empty prompt (needs transformers).
        dtype: of a frozen backbone, e.g. "bfloat16"; its maps are cast back to the dtype of the images.
        save_frozen: False leaves frozen weights out of checkpoints; on load they are those of `pretrained`, or of the
            place that the checkpoint names, and are checked to be the same.
        init_cfg: dict(type="Pretrained", checkpoint=...): another way to say `pretrained`.
        **kwargs: of the timm model: timestep, ensemble_size, noise_seed, sources, text_encoder, in_chans, ...

    Attributes:
        out_channels, strides: lists, one entry per map.

    Raises:
        ValueError: unknown model, map or part; dtype without frozen; init_cfg of another kind.
        RuntimeError, checkpoints.CheckpointError: weights that are unavailable, or do not fit.
    """

    def __init__(
        self,
        model_name: str = "cleandift_sd21",
        pretrained: bool | str | None = None,
        out_indices: int | Sequence[int | str] | None = None,
        frozen: bool = False,
        frozen_parts: Sequence[str] = ("vae",),
        with_cp: bool = False,
        prompt: str | None = None,
        dtype: str | torch.dtype | None = None,
        save_frozen: bool = True,
        init_cfg: Mapping | None = NOT_GIVEN,
        **kwargs: Any,
    ):
        super().__init__()
        unknown = [part for part in frozen_parts if part not in PARTS]
        if isinstance(frozen_parts, str) or unknown:
            raise InputError(f"frozen_parts {frozen_parts!r}: expected some of {tuple(PARTS)}")
        if dtype is not None and not frozen:
            raise InputError(f"dtype={dtype!r} needs frozen=True; a trained backbone takes AmpOptimWrapper")
        maps = describe(model_name, out_indices)
        self.model_name, self.indices = model_name, maps.indices
        self.out_channels, self.strides = maps.out_channels, maps.strides
        self.frozen, self.dtype, self.save_frozen = frozen, dtype, save_frozen
        self.frozen_parts = tuple(PARTS) if frozen else tuple(frozen_parts)
        self.source = _source(pretrained, init_cfg)
        self.arguments = {**kwargs} if prompt is None else {**kwargs, "prompt": prompt}
        self.model = self._create(self.source)
        self.has_weights = self._is_init = bool(self.source)  # init_weights() then leaves them alone
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self._is_frozen(name))
        self.model.set_grad_checkpointing(with_cp)
        self._seen_images = False
        self.register_state_dict_post_hook(_leave_frozen_out)
        self.train()

    @staticmethod
    def describe(model_name: str, out_indices: int | Sequence[int | str] | None = None) -> MapTable:
        """Names, indices, out_channels and strides of the maps, without building anything; for writing configs."""
        return describe(model_name, out_indices)

    def _create(self, source: bool | str) -> nn.Module:
        """The timm model, without its wrapper that returns lists."""
        arguments = dict(self.arguments)
        if isinstance(source, str):
            arguments["sources"] = {**arguments.get("sources", {}), "unet": source}
        return timm.create_model(
            self.model_name,
            pretrained=bool(source),
            features_only=True,
            out_indices=self.indices,
            dtype=self.dtype,
            **arguments,
        ).model

    def _is_frozen(self, name: str) -> bool:
        """Whether a tensor of the model stays as it is. Its constants, timestep and prompt, do if all of it does."""
        return self.frozen or name.startswith(tuple(p for part in self.frozen_parts for p in PARTS[part]))

    def train(self, mode: bool = True) -> CleanDIFT:
        super().train(mode)
        for name, module in self.model.named_modules():
            if name and self._is_frozen(f"{name}."):
                module.eval()
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """B x 3 x H x W in [-1, 1] -> maps in the order of out_indices."""
        if not self._seen_images:
            self._check_first(x)
        if not self.frozen:
            return tuple(self.model.forward_intermediates(x, self.indices, intermediates_only=True))
        # autocast would undo the dtype that was asked for
        mixed = self.dtype is not None and torch.amp.is_autocast_available(x.device.type)  # not on meta
        plain = torch.autocast(x.device.type, enabled=False) if mixed else nullcontext()
        with torch.no_grad(), plain:
            images = x.to(next(self.model.parameters()).dtype)
            maps = self.model.forward_intermediates(images, self.indices, intermediates_only=True)
        return tuple(found.to(x.dtype) for found in maps)

    def _check_first(self, x: Tensor) -> None:
        """What is wrong with the first images is wrong with all; looking at every batch would cost time."""
        if self.frozen_parts and not self.has_weights:
            raise StateError(
                f"{self.model_name} is frozen ({', '.join(self.frozen_parts)}) but has random weights: give pretrained="
                "True, a path or a Hub name, or load a checkpoint that holds the backbone; to train it from nothing, "
                "pretrained=False, frozen=False, frozen_parts=()"
            )
        low, high = reach(x)
        # In training, colour jitter that does not clip (mmdetection's) leaves [-1, 1], about as far as other
        # statistics would: there CheckBackboneHook compares mean and std, and only pixels of 0..255 are caught here.
        limit = 5.0 if self.training else 1.1
        if low < -limit or high > limit:
            raise InputError(
                f"the images reach from {low:.4g} to {high:.4g}, but this backbone expects [-1, 1]: set "
                "data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True)"
            )
        self._seen_images = not self.training

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @staticmethod
    def _state(model: nn.Module) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}

    def frozen_state(self) -> dict[str, Tensor]:
        """State dict of what is frozen: what checkpoints leave out with save_frozen=False."""
        return {n: t for n, t in self._state(self.model).items() if self._is_frozen(n.removeprefix("model."))}

    def _record(self) -> dict:
        """Which frozen weights these are; `probe` holds the last number and the mean size of each tensor."""
        state = self.frozen_state()
        probe = torch.stack([_probe(tensor) for tensor in state.values()]).tolist()
        kind = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return dict(model_name=self.model_name, source=self.source, dtype=kind, probe=dict(zip(state, probe)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Puts frozen weights that a checkpoint left out back, and refuses checkpoints of other backbones."""
        stored = state_dict.pop(prefix + RECORD, None)
        record = None if stored is None else json.loads(bytes(stored.tolist()))
        own = self._state(self.model)
        given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        left_out = record["probe"] if record else {} if self.save_frozen else self.frozen_state()
        if given or record:
            self._check_fits(own, given, left_out, record)
        absent = [name for name in own if name in left_out and name not in given]
        if absent and (record or self.has_weights):
            state = self._state_of(record) if record else own
            state_dict.update({prefix + name: state[name] for name in absent})
        if given or record:
            self.has_weights = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_fits(self, own: Mapping, given: Mapping, left_out: Mapping, record: Mapping | None) -> None:
        differing = [name for name in own if name in given and own[name].shape != given[name].shape]
        wrong = [f"{name} is {tuple(given[name].shape)}, here {tuple(own[name].shape)}" for name in differing]
        wrong += [f"{name} is missing" for name in own if name not in given and name not in left_out]
        kind = record["model_name"] if record else self.model_name
        there, here = find_spec(kind), spec_of(self.model_name)
        if there is None or (there.arch, there.kind) != (here.arch, here.kind):
            wrong = [f"it is of {kind}"]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise StateError(
                f"the checkpoint's backbone does not fit {self.model_name} with maps {self.indices}: "
                f"{'; '.join(wrong[:3])}{more}. Take the config that it was trained with"
            )

    def _state_of(self, record: Mapping) -> dict[str, Tensor]:
        """The weights that a checkpoint left out: the model's own, or read from the recorded place."""
        own = self._state(self.model)
        if self.has_weights and self._matches(own, record):
            return own
        state = self._state(self._create(record["source"])) if record["source"] else {}
        if not self._matches(state, record):
            raise StateError(
                f"the checkpoint was trained on frozen weights of {record['model_name']} from "
                f"{_place(record['source'])}, which it does not hold; those from {_place(self.source)} differ from "
                "them: set pretrained= to the weights (and prompt= to the text, timestep= ...) of that training"
            )
        self.source = record["source"]
        return state

    def _matches(self, state: Mapping[str, Tensor], record: Mapping) -> bool:
        """Equal numbers, or as near as the coarser of the two dtypes allows."""
        kinds = {getattr(torch, record["dtype"]), next(self.model.parameters()).dtype}
        near = 0.0 if len(kinds) == 1 else max(torch.finfo(kind).eps for kind in kinds)
        probe = {name: value for name, value in record["probe"].items() if name in state}  # it may have been deeper
        if not probe:
            return False
        wanted = torch.tensor(list(probe.values()))
        apart = (torch.stack([_probe(state[name]).cpu() for name in probe]) - wanted).abs()
        # Sums depend a little on the device that takes them.
        return bool((apart <= torch.tensor([near, max(near, 1e-4)]) * (wanted.abs() + 1e-3)).all())


def _probe(tensor: Tensor) -> Tensor:
    """(last number, mean absolute value) of a tensor."""
    wide = tensor.detach().flatten().float()
    return torch.stack([wide[-1], wide.abs().mean()])


def _place(source: bool | str) -> str:
    return source if isinstance(source, str) else "where they are published" if source else "nowhere"


def _leave_frozen_out(module: CleanDIFT, state: dict, prefix: str, metadata: dict) -> None:
    """After state_dict(): drops the frozen weights, and says which they were."""
    if module.save_frozen or not module.frozen_parts or next(module.model.parameters()).is_meta:  # no numbers to tell
        return
    for name in module.frozen_state():
        state.pop(prefix + name)
    text = json.dumps(module._record()).encode()
    state[prefix + RECORD] = torch.tensor(list(text), dtype=torch.uint8)


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class CheckBackboneHook(Hook):
    """Before training or testing, compares heads and preprocessor with the backbone; see `mm_checks.check_model`.

    In a config: `custom_hooks = [dict(type="cleandift_backbones.CheckBackboneHook")]`.
    """

    priority = "VERY_HIGH"

    def before_run(self, runner) -> None:
        model = runner.model
        check_model(model.module if is_model_wrapper(model) else model)
