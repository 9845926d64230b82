"""Backbones in checkpoints of mmengine, as version 0.1.0 wrote them. tests/fixtures holds them as safetensors."""

import pytest
import torch
from fixtures import make
from safetensors.torch import load_file

pytest.importorskip("mmengine")

from cleandift_backbones.mm.backbone import CleanDIFT


@pytest.mark.parametrize(
    "name, pretrained", [("whole", False), ("without_frozen", str(make.HERE / "native.safetensors"))]
)
def test_a_checkpoint_of_mmengine(name, pretrained):
    state = load_file(make.HERE / f"mm/{name}.safetensors")
    model = CleanDIFT(pretrained=pretrained, save_frozen=name == "whole", **make.MM)
    if not pretrained:
        with torch.no_grad():
            assert model.train().model.unet.conv_in.weight.std() > 0
    model.load_state_dict({key.removeprefix("backbone."): tensor for key, tensor in state.items()})
    expected = load_file(make.HERE / "recorded.safetensors")["native/mid"]
    with torch.no_grad():
        (found,) = model.eval()(make.image())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
