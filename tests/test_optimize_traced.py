"""optimize() where Python is not simply run: exported, traced, compiled by somebody else, replicated."""

import pytest
import torch
from optimized import build, images

from cleandift_backbones import optimize


@pytest.mark.parametrize("options", [{}, dict(winograd=True), dict(compile=True)], ids=str)
def test_export_and_trace(options):
    model, x = build(num_classes=0), images(1, 3, 64, 64)
    expected = model(x).detach()
    fast = optimize(model, **options)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(fast, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(winograd=True), dict(compile=True)], ids=str)
def test_compiled_by_the_user(options):
    torch._dynamo.reset()
    model, x = build(num_classes=0), images(1, 3, 64, 64)
    expected = model(x).detach()
    fast = torch.compile(optimize(model, **options), fullgraph=True, backend="eager")
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(compile=True)], ids=str)
def test_replica_of_data_parallel(options):
    """torch.nn.parallel.replicate needs GPUs; what it makes are such copies, with tensors of another device."""
    model, x = optimize(build(num_classes=0), **options), images(1, 3, 64, 64)
    replica = model._replicate_for_data_parallel()
    replica._buffers = {name: buffer.clone() for name, buffer in model._buffers.items()}
    torch.testing.assert_close(replica(x), optimize(build(num_classes=0))(x))
    replica.timestep.fill_(3.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        replica(x)


@pytest.mark.slow
def test_single_images_of_any_size_meet_no_limit_of_graphs():
    """On a CPU a layer takes another convolution of single images above some size: each time one more graph."""
    torch._dynamo.reset()
    model = build(num_classes=0)
    pictures = images(1, 3, 64, 64), images(1, 3, 96, 96)
    expected = [model(x).detach() for x in pictures]
    fast = optimize(model, compile=dict(dynamic=True, backend="eager"))
    with torch._dynamo.config.patch(cache_size_limit=1):
        for x, y in zip(pictures, expected):
            torch.testing.assert_close(fast(x), y, rtol=1e-4, atol=1e-5)


def test_compiled_pyramid_whose_final_map_is_not_of_the_pyramid():
    torch._dynamo.reset()
    model, x = build("cleandift_tiny_pyramid", final_map="us10", global_pool=""), images(1, 3, 70, 64)
    expected = model(x).detach()
    fast = optimize(model, compile=dict(backend="eager", dynamic=False))
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
