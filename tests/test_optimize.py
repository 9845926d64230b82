"""optimize(): the same maps as before, fewer operations and bytes, and a clear word where something is over."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cleandift_backbones import optimize
from cleandift_backbones.inference import FoldedUNet, LeanResnet
from cleandift_backbones.winograd import WinogradConv

ALL = tuple(range(11))


def build(name="test_cleandift", **kwargs):
    torch.manual_seed(0)
    kwargs = kwargs or dict(features_only=True, out_indices=ALL)
    return timm.create_model(name, **kwargs).eval()


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def apart(found, expected):
    """Largest difference of maps, relative to their norms."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(output.alias_info for output in function._schema.returns) or str(function)[-1] == "_"
        return function(*args, **(kwargs or {}))


def operations(model, x):
    with torch.no_grad(), Operations() as counted:
        model(x)
    return counted.count


def held(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["test_cleandift", "cleandift_tiny", "dift_tiny", "cleandift_tiny_pyramid"])
@pytest.mark.parametrize("options", [{}, dict(fold="timestep"), dict(fold=False), dict(channels_last=False)], ids=str)
def test_maps_are_the_same(name, options):
    model = build(name, features_only=True)
    fast = optimize(copy.deepcopy(model), **options)
    for shape in ((1, 3, 128, 128), (2, 3, 101, 70)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5


def test_every_map_with_winograd_everywhere():
    model = build("cleandift_tiny")
    fast = optimize(copy.deepcopy(model), winograd=True)
    assert sum(isinstance(module, WinogradConv) for module in fast.modules()) > 40
    for shape in ((1, 3, 128, 128), (2, 3, 90, 70)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 1e-4


@pytest.mark.parametrize("shape", [(1, 5, 7, 32, 32), (2, 8, 8, 1, 1), (3, 160, 12, 9, 14), (1, 4, 4, 3, 33)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_winograd_is_a_convolution(shape, memory_format):
    batch, channels, out, height, width = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, 3, padding=1)
    x = images(batch, channels, height, width).contiguous(memory_format=memory_format)
    expected = conv.double()(x.double())
    with torch.no_grad():
        y = WinogradConv(conv.float())(x)
    assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-5)


def test_winograd_multiplies_a_quarter():
    conv = nn.Conv2d(640, 640, 3, padding=1)
    counts = []
    for module in (conv, WinogradConv(conv)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.to("meta")(torch.empty(1, 640, 64, 64, device="meta"))
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.35 * counts[0]


def test_classifiers_projected_maps_and_larger_models():
    x = images(2, 3, 128, 96)
    for kwargs in (dict(num_classes=7), dict(final_map="us6", global_pool=""), dict(in_chans=1)):
        model = build(**kwargs)
        given = x[:, : model.in_chans]
        torch.testing.assert_close(optimize(copy.deepcopy(model))(given), model(given), rtol=1e-4, atol=1e-5)
    model = build(features_only=True, projected_timestep=100.0)
    assert apart(optimize(copy.deepcopy(model))(x), model(x)) < 3e-5
    model = nn.Sequential(build(num_classes=0), nn.Linear(8, 3))
    expected = model(x)
    optimize(model)
    model[1].weight.grad = None
    model(x).sum().backward()  # a head on top still learns
    assert model[1].weight.grad is not None
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_one_prompt_per_image():
    model = build(features_only=True)
    model.model.set_prompt(torch.randn(2, 3, 6))
    x = images(2, 3, 64, 64)
    fast = optimize(copy.deepcopy(model))
    assert apart(fast(x), model(x)) < 3e-5
    with pytest.raises(ValueError, match="2 prompts were set, but the batch has 3"):
        fast(images(3, 3, 64, 64))
    noisy = build("dift_tiny", features_only=True, ensemble_size=3)
    noisy.model.set_prompt(torch.randn(2, 16, 96))
    assert apart(optimize(copy.deepcopy(noisy))(x), noisy(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_maps_point_the_same_way(dtype):
    model = build("cleandift_tiny", pretrained=True, features_only=True, out_indices=ALL)
    x = images(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CPUs without such instructions
        fast = optimize(copy.deepcopy(model), dtype=dtype)
    assert {p.dtype for p in fast.parameters()} == {dtype} and fast.model.timestep.dtype == torch.float32
    for found, expected in zip(fast(x), model(x), strict=True):
        assert found.dtype == dtype
        assert torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.999


def test_what_is_over_is_refused():
    model = optimize(build(num_classes=3))
    for forbidden in (
        lambda: model.train(),
        lambda: model.set_prompt(torch.randn(1, 3, 6)),
        lambda: model.set_grad_checkpointing(),
        lambda: model.state_dict(),
        lambda: model.load_state_dict({}),
        lambda: nn.Sequential(model).state_dict(),
    ):
        with pytest.raises(RuntimeError, match="optimised for inference.*before cleandift_backbones.optimize"):
            forbidden()
    model.eval()
    model(images(1, 3, 64, 64))
    model.timestep.fill_(100.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        model(images(1, 3, 64, 64))


def test_a_replaced_prompt_is_noticed():
    model = optimize(build(num_classes=0))
    model.prompt_embeds = torch.zeros(1, 3, 6)
    with pytest.raises(RuntimeError, match="another prompt_embeds"):
        model(images(1, 3, 64, 64))


def test_fold_timestep_leaves_the_prompt_open():
    model, text = build(num_classes=0), torch.randn(1, 3, 6)
    fast = optimize(copy.deepcopy(model), fold="timestep")
    model.set_prompt(text)
    fast.set_prompt(text)
    torch.testing.assert_close(fast(images(1, 3, 64, 64)), model(images(1, 3, 64, 64)), rtol=1e-4, atol=1e-5)


def test_without_folding_the_state_dict_is_the_native_one():
    model = build(num_classes=0)
    fast = optimize(copy.deepcopy(model), fold=False, winograd=False)
    state = fast.state_dict()
    assert set(state) == set(model.state_dict())
    fast.load_state_dict({name: tensor + 0.01 for name, tensor in state.items()})
    model.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(images(1, 3, 64, 64)), model(images(1, 3, 64, 64)), rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="expected a model with one backbone"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="optimised already"):
        optimize(optimize(build()))
    with pytest.raises(ValueError, match="fold must be"):
        optimize(build(), fold="prompt")
    with pytest.raises(ValueError, match="dtype must be"):
        optimize(build(), dtype=torch.float64)
    with pytest.raises(ValueError, match="winograd=True is for float32"):
        optimize(build(), winograd=True, compile=True)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        optimize(build())


def test_adapters_must_be_merged_first():
    peft = pytest.importorskip("peft")
    model = build(num_classes=0)
    model.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"]))
    with pytest.raises(ValueError, match="conv1|resnets.*cannot be folded"):
        optimize(model)


def test_copies_moves_and_other_dtypes():
    model = optimize(build(features_only=True))
    x = images(1, 3, 64, 64)
    expected = model(x)
    assert apart(copy.deepcopy(model)(x), expected) == 0
    assert apart(pickle.loads(pickle.dumps(model))(x), expected) == 0
    assert apart(model.to("cpu")(x), expected) == 0
    assert apart(model(x.double()), expected) < 1e-6  # images of any dtype
    changed = copy.deepcopy(model)
    changed.model.timestep.fill_(3.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        copy.deepcopy(changed)


def test_what_was_folded_is_gone():
    model = build("cleandift_tiny")
    fast = optimize(copy.deepcopy(model), winograd=False)
    assert type(fast.model.unet) is FoldedUNet and any(isinstance(m, LeanResnet) for m in fast.modules())
    names = [name for name, _ in fast.named_parameters()]
    assert not [name for name in names if "time_emb" in name or "attn2.to_k" in name or "attn2.to_v" in name]
    assert held(fast) < 0.94 * held(model)


def test_fewer_operations():
    """Kernels, not seconds: what a pass dispatches, views apart."""
    model, x = build("cleandift_tiny"), images(1, 3, 128, 128)
    before = operations(model, x)
    after = operations(optimize(copy.deepcopy(model), winograd=False, channels_last=False), x)
    assert after <= 0.75 * before, (before, after)


# GFLOP of one image of 512 x 512 down to each map, by torch's counter, attention included, in order of execution: mid,
# us1 ... us10. A change here is a change of every user's cost.
GFLOP = [1379, 1385, 1391, 1404, 1446, 1488, 1556, 1609, 1653, 1723, 1795]


def test_gflop_per_map_of_sd21():
    counts = []
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, 3, 512, 512)
        for index in reversed(ALL):
            model = build("cleandift_sd21", features_only=True, out_indices=(index,))
            with FlopCounterMode(display=False) as counter:
                model(x)
            counts.append(round(counter.get_total_flops() / 1e9))
    assert counts == GFLOP


def test_import_stays_light():
    code = "import sys, cleandift_backbones; assert 'diffusers' not in sys.modules; cleandift_backbones.optimize"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_compiled_once_for_all_sizes():
    """One compilation for batches of one and one for larger ones; no graph breaks (fullgraph).

    Sizes stay below the one where an input of this model's layers has 20,480 numbers: there torch takes another
    convolution for batches of one, and compiles for it.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(features_only=True, out_indices=(4, 10))
    fast = optimize(copy.deepcopy(model), compile=dict(dynamic=True, backend="eager"))
    for shape in ((1, 3, 128, 128), (1, 3, 192, 128), (1, 3, 131, 250), (1, 3, 200, 200)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1, stats
    for shape in ((2, 3, 128, 128), (3, 3, 192, 131)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
