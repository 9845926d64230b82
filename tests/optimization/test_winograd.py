"""Winograd's convolutions: a convolution, in fewer multiplications, and only where it is as exact as one."""

import copy
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import standins
import torch
import torch.nn.functional as F
from optimized import apart, build, gflop, held, images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cleandift_backbones import optimize
from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.optimization.cpu_any_size_conv import in_one_graph
from cleandift_backbones.optimization.cpu_winograd import WinogradConv
from cleandift_backbones.optimization.optimize import _rebuild


@pytest.fixture(autouse=True)
def exact_products():
    """Another test may have let products be rounded, as training does: then layers are plain convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def winograd_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, WinogradConv)]


@pytest.mark.parametrize("shape", [(1, 5, 7, 32, 32), (2, 8, 8, 1, 1), (3, 160, 12, 9, 14), (1, 4, 4, 3, 33)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_is_a_convolution(shape, memory_format):
    batch, channels, out, height, width = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, 3, padding=1)
    x = images(batch, channels, height, width).contiguous(memory_format=memory_format)
    expected = conv.double()(x.double())
    with torch.no_grad():
        y = WinogradConv(conv.float())(x)
    assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-5)


def test_multiplies_a_quarter():
    with FakeTensorMode():
        conv = nn.Conv2d(640, 640, 3, padding=1).requires_grad_(False)
        x = torch.empty(1, 640, 64, 64)
        assert gflop(WinogradConv(conv), x) < 0.35 * gflop(conv, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_another_dtype_it_is_the_plain_convolution(dtype):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(128, 64, 3, padding=1).requires_grad_(False), images(1, 128, 16, 16)
    exact, layer = conv(x), WinogradConv(conv)
    assert apart([layer.kernel()], [conv.weight]) < 1e-6
    moved = nn.Sequential(layer).to(dtype)[0]
    assert moved.weight.shape == conv.weight.shape and not list(moved.buffers())
    plain = apart([conv.to(dtype)(x.to(dtype)).float()], [exact])
    for found in (moved, copy.deepcopy(moved), moved.float().to(dtype)):
        assert apart([found(x.to(dtype)).float()], [exact]) < 1.1 * plain + 1e-6


def test_under_autocast_it_is_the_plain_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(128, 64, 3, padding=1).requires_grad_(False), images(1, 128, 16, 16)
    exact, layer = conv(x), WinogradConv(conv)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = layer(x), conv(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert apart([found.float()], [exact]) < 1.1 * apart([plain.float()], [exact])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_where_products_are_rounded_it_is_the_plain_convolution(precision):
    """CPUs with bfloat16 instructions round float32 products after torch.set_float32_matmul_precision."""
    conv, x = nn.Conv2d(128, 64, 3, padding=1).requires_grad_(False), images(1, 128, 16, 16)
    layer = WinogradConv(conv)
    torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.kernel(), conv.bias, padding=1), rtol=0, atol=0)


def test_before_torch_had_a_precision_of_its_own_for_cpus(monkeypatch):
    """torch below 2.9 has one setting for all products."""
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    conv = nn.Conv2d(4, 4, 3, padding=1)
    monkeypatch.setattr(F, "conv2d", lambda *_, **__: "plain")
    for precision, expected in (("highest", False), ("medium", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        with torch.no_grad():
            assert isinstance(WinogradConv(conv)(images(1, 4, 8, 8)), str) == expected


def test_as_one_step_of_a_compiled_graph():
    """Shapes, strides and values are what torch.compile is told; in others' graphs it is a plain convolution."""
    torch._dynamo.reset()
    steps = []

    def backend(graph, _):
        steps.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    layer, step = WinogradConv(conv), torch.ops.cleandift_backbones.winograd.default
    compiled = torch.compile(partial(in_one_graph, layer), fullgraph=True, dynamic=True, backend=backend)
    for shape in ((1, 8, 9, 14), (1, 8, 33, 20)):
        x = images(*shape)
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-5)
        tensors = layer.weight, layer.bias, layer.into, layer.out_of
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(step, (given, *tensors), test_utils=("test_schema", "test_faketensor"))
    assert steps == [step]
    assert step not in [node.target for node in torch.export.export(layer, (x,)).graph.nodes]
    theirs = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(theirs(x), conv(x), rtol=1e-4, atol=1e-5)
    assert steps.count(step) == 1 and len(steps) > 1


def test_on_another_device_it_is_the_plain_convolution():
    model = optimize(build(), winograd=True)
    assert len(winograd_layers(model)) > 40
    model.to("meta")
    assert all(model.get_submodule(name).weight.ndim == 4 for name in winograd_layers(model))


def test_every_map_with_winograd_everywhere():
    model = build("cleandift_tiny")
    fast = optimize(copy.deepcopy(model), winograd=True)
    assert len(winograd_layers(fast)) > 40
    for shape in ((1, 3, 128, 128), (2, 3, 90, 70)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 1e-4


def test_a_model_in_16_bits_afterwards_is_one_optimised_in_16_bits():
    # Winograd in 16 bits is four to five times as far off; below that it is one rounding or another.
    model, x = build("cleandift_tiny", pretrained=True, features_only=True), images(1, 3, 64, 64)
    exact = model(x)
    plain = optimize(copy.deepcopy(model), winograd=False)
    fast = optimize(model, winograd=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(fast(x), exact) < 2.5 * apart(plain(x), exact)
    size = held(plain)
    assert held(fast) > 2 * size
    plain.bfloat16(), fast.bfloat16()
    assert held(fast) == held(plain) < 0.6 * size
    assert apart([y.float() for y in fast(x)], exact) < 2.5 * apart([y.float() for y in plain(x)], exact)


def test_default_choice_of_a_model(monkeypatch):
    """Layers of many channels, on a CPU in float32 (those of too many are in sd21's count below)."""
    vae = dict(block_out_channels=(2, 2, 128, 256), layers_per_block=1, norm_num_groups=2)
    standins.put(monkeypatch, replace(ARCHITECTURES["test"], vae=vae))
    model, x = build(features_only=True), images(1, 3, 96, 80)
    fast = optimize(copy.deepcopy(model))
    assert sorted(winograd_layers(fast)) == sorted(
        name
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1)
        if conv.in_channels >= 128 and conv.out_channels >= 128
    )
    assert 0 < len(winograd_layers(fast)) < len(winograd_layers(optimize(copy.deepcopy(model), winograd=True)))
    assert apart(fast(x), model(x)) < 1e-4
    assert winograd_layers(optimize(copy.deepcopy(model), compile=True)) == winograd_layers(fast)
    for options in (dict(winograd=False), dict(dtype=torch.bfloat16)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of CPUs without 16-bit instructions
            assert not winograd_layers(optimize(copy.deepcopy(model), **options)), options


# sd21 down to us6, 512 x 512: layers that Winograd's algorithm computes, GFLOP, GiB held; a change is every user's cost
VAE = {"vae.encoder.down_blocks": 16, "vae.encoder.mid_block": 4}
UNET = {"unet.down_blocks.0": 4, "unet.down_blocks.1": 4, "unet.down_blocks.2": 1}
SD21 = {False: ({}, 1553, 2.85), "where it pays": (VAE | UNET, 813, 3.45)}


@pytest.mark.parametrize("winograd", SD21)
def test_choice_and_cost_of_optimised_sd21(winograd):
    layers, operations, memory = SD21[winograd]
    with torch.device("meta"), torch.no_grad():
        model = build("cleandift_sd21", features_only=True, out_indices=(4,)).requires_grad_(False)
        _rebuild(model.model, True, torch.float32, False, winograd)  # optimize itself wants weights to have values
        assert round(gflop(model, torch.empty(1, 3, 512, 512))) == operations
    assert Counter(".".join(name.split(".")[1:4]) for name in winograd_layers(model)) == layers
    assert round(held(model) / 2**30, 2) == memory
