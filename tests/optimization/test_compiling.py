"""Convolutions of graphs that hold for all image sizes, as torch's own compiler builds them."""

import shutil

import pytest
import torch
from optimized import images
from torch import nn

from cleandift_backbones.optimization.cpu_any_size_conv import AnySizeConv, convolution, in_one_graph
from cleandift_backbones.optimization.cpu_winograd import WinogradConv

#: sides of which a plain convolution of 8 channels, for a single image, makes two graphs: 20,480 numbers lie between
SIDES = (16, 24), (96, 80), (51, 49), (130, 8)


def small_model(any_size: bool) -> nn.Sequential:
    """One channel in, as of grey images; wide, narrow, strided, grouped, dilated."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)]
    layers += [nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, (3, 5), padding=(2, 4), dilation=2, groups=4)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 3, 1, bias=False)).requires_grad_(False)
    if any_size:
        model[3] = WinogradConv(model[3])
        for layer in model:
            if AnySizeConv.fits(layer):
                layer.__class__ = AnySizeConv
    return model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(x):
        return in_one_graph(model, x)

    return torch.compile(run, fullgraph=True, dynamic=True, backend=backend)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_all_sizes(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor compiles with g++")
    plain, ours = small_model(any_size=False), small_model(any_size=True)
    fast = compiled(ours, backend)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for side in SIDES:
            x = images(1, 1, *side)
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_plain_convolutions_need_several():
    """What the steps are there for: if torch makes one graph of these some day, they can go."""
    fast = compiled(small_model(any_size=False), "eager")
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for side in SIDES:
            fast(images(1, 1, *side))
    assert graphs() > 1


def test_the_steps_shapes_and_strides():
    for layer in small_model(any_size=True):
        if isinstance(layer, AnySizeConv):
            sizes = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
            for shape in ((1, 9, 14), (2, 9, 14), (1, 5, 5)):
                x = images(shape[0], layer.in_channels, *shape[1:])
                for weight in (layer.weight, layer.weight.contiguous()):
                    for given in (x, x.contiguous(memory_format=torch.channels_last)):
                        arguments = given, weight, layer.bias, *sizes
                        torch.library.opcheck(convolution, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("state", ["float32", "bfloat16 and back", "float64", "autocast"])
def test_steps_are_for_float32(state):
    plain, ours = small_model(any_size=False), small_model(any_size=True)
    x, steps = images(1, 1, 24, 24), []
    if state == "float64":
        plain, ours, x = plain.double(), ours.double(), x.double()
    if state == "bfloat16 and back":  # where WinogradConv is a plain convolution from there on
        plain, ours = plain.bfloat16().float(), ours.bfloat16().float()

    def backend(graph, _):
        steps.append([node.target for node in graph.graph.nodes if "cleandift" in str(node.target)])
        return graph

    fast = compiled(ours, backend)
    fast(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast"):
        found, expected = fast(x), plain(x)
    assert [len(found) for found in steps] == {"float64": [0], "autocast": [5, 0]}.get(state, [5])
    loose = 0.1 if state == "autocast" else 0
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4 + loose, atol=1e-5 + loose)


@pytest.mark.parametrize("strict", [False, True])
def test_programs_of_others_hold_plain_convolutions(strict):
    model, x = small_model(any_size=True), images(1, 1, 24, 24)
    program = torch.export.export(model, (x,), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("aten.conv2d.default") == 5 and not [name for name in names if "cleandift" in name]
