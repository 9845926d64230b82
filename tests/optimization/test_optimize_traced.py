"""optimize() where Python is not simply run: exported, traced, compiled by somebody else, replicated."""

import copy

import pytest
import torch
from optimized import apart, build, images

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
def test_graphs_of_a_compiled_model_meet_no_limit():
    """Each choice of maps makes one; torch's own limit of 8, here 1, would be an error."""
    torch._dynamo.reset()
    model, x = build(), images(1, 3, 96, 96)
    fast = optimize(copy.deepcopy(model), compile=dict(dynamic=True, backend="eager")).model
    with torch._dynamo.config.patch(cache_size_limit=1):
        for indices in ([0], [1], [0, 1]):
            maps = (each.forward_intermediates(x, indices, intermediates_only=True) for each in (fast, model.model))
            assert apart(*maps) < 3e-5


def test_compiled_pyramid_whose_final_map_is_not_of_the_pyramid():
    torch._dynamo.reset()
    model, x = build("cleandift_tiny_pyramid", final_map="us10", global_pool=""), images(1, 3, 70, 64)
    expected = model(x).detach()
    fast = optimize(model, compile=dict(backend="eager", dynamic=False))
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
