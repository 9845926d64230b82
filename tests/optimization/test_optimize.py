"""optimize(): the same maps as before, fewer operations and bytes, and a clear word where something is over."""

import copy
import pickle
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import Attention
from optimized import ALL, apart, build, gflop, held, images
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cleandift_backbones import optimize
from cleandift_backbones.optimization.fold import FoldedUNet, LeanResnet
from cleandift_backbones.publish.card import save_folder


class Operations(TorchDispatchMode):
    """Counts what is dispatched by name, views left out."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(output.alias_info for output in function._schema.returns) or str(function)[-1] == "_":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(model, x):
    with torch.no_grad(), Operations() as counted:
        model(x)
    return counted.calls


@pytest.mark.parametrize("name", ["test_cleandift", "cleandift_tiny", "dift_tiny", "cleandift_tiny_pyramid"])
@pytest.mark.parametrize("options", [{}, dict(fold="timestep"), dict(fold=False), dict(channels_last=False)], ids=str)
def test_maps_are_the_same(name, options):
    model = build(name, features_only=True)
    fast = optimize(copy.deepcopy(model), **options)
    for shape in ((1, 3, 128, 128), (2, 3, 101, 70)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5


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
    x = images(1, 3, 64, 64)
    for forbidden in (
        lambda: model.set_prompt(torch.randn(1, 3, 6)),
        lambda: model.set_grad_checkpointing(),
        lambda: model.load_state_dict(build(num_classes=3).state_dict()),
        lambda: model.load_state_dict(build(num_classes=3).state_dict(), strict=False),
        lambda: model(x.clone().requires_grad_()),  # gradients would be lost without a word
        lambda: nn.Sequential(model).requires_grad_(True)(x),
        lambda: model.unet.down_blocks.requires_grad_(True) and model(x),  # a part of it
    ):
        with pytest.raises(RuntimeError, match="optimised for inference.*before cleandift_backbones.optimize"):
            forbidden()
        model.requires_grad_(False)
    model(x)
    model.timestep.fill_(100.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        model(x)


def test_constants_written_anew_with_the_same_values_stand():
    """DistributedDataParallel sends buffers before every pass; hooks that move weights replace them."""
    model, x = optimize(build(num_classes=0)), images(1, 3, 64, 64)
    expected = model(x)
    model.timestep.copy_(model.timestep.clone())
    model.prompt_embeds = model.prompt_embeds.clone()
    assert torch.equal(model(x), expected)
    with torch.inference_mode():
        model.timestep.fill_(5.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        model(x)


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


def test_inside_a_training_loop():
    """A segmenter as Lightning's, timm's and mmengine's loops treat it: train(), steps, an average, checkpoints."""

    def make():
        head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        return nn.Sequential(nn.Identity(), optimize(build(num_classes=0)), head)

    model, x = make(), images(2, 3, 64, 64)
    average = ModelEmaV3(model, decay=0.5)
    assert model.train() is model and model[2][1].training and not any(m.training for m in model[1].modules())
    before = copy.deepcopy(model[1].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        average.update(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[1].state_dict().items())
    again = make()
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert not torch.equal(average.module.eval()(x), model(x))
    heads = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("1.")}
    again = make()
    again.load_state_dict(heads, strict=False)  # without the backbone's, which were not learnt
    assert torch.equal(again.eval()(x), model(x))


def test_a_classifier_of_its_own_learns():
    model, x = optimize(build(num_classes=3)), images(2, 3, 64, 64)
    model.get_classifier().requires_grad_(True)
    model.train()(x).sum().backward()
    assert model.get_classifier().weight.grad.abs().sum() > 0


def test_state_dicts_of_another_timestep_or_form_are_refused():
    state = optimize(build("dift_tiny", ensemble_size=1)).state_dict()
    same, other = (optimize(build("dift_tiny", ensemble_size=1, timestep=t)) for t in (261, 100))
    same.load_state_dict(state)
    with pytest.raises(RuntimeError, match="loading weights that a model optimised in another way"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="loading weights that a model optimised in another way"):
        optimize(build("dift_tiny", ensemble_size=1), fold="timestep").load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="processor.key"):
        build("dift_tiny", ensemble_size=1).load_state_dict(state)


def test_other_noise_of_an_optimised_dift():
    x = images(1, 3, 64, 64)
    model = build("dift_tiny", features_only=True, ensemble_size=2)
    fast = optimize(copy.deepcopy(model))
    for change in (dict(noise_seed=3), dict(ensemble_size=3), dict(timestep=261, noise_seed=1)):
        fast.model.set_noise(**change)
        model.model.set_noise(**change)
        assert apart(fast(x), model(x)) < 3e-5
    for change in (dict(timestep=100, noise_seed=9), dict(timestep=-1)):
        with pytest.raises(RuntimeError, match="another timestep"):
            fast.model.set_noise(**change)
    assert apart(fast(x), model(x)) < 3e-5  # nothing of what was refused has come in
    free = optimize(build("dift_tiny", features_only=True, ensemble_size=3), fold=False)
    free.model.set_noise(100, noise_seed=1)
    model.model.set_noise(100)
    assert apart(free(x), model(x)) < 3e-5


def test_inside_autocast_and_inference_mode():
    model, x = build(features_only=True), images(1, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        fast = optimize(copy.deepcopy(model))  # folds in float32 all the same
    assert apart(fast(x), expected) < 3e-5
    with torch.inference_mode():
        for fast in (optimize(copy.deepcopy(model)), optimize(build(features_only=True))):
            assert apart(fast(x), expected) < 3e-5
            assert apart(copy.deepcopy(fast)(x), expected) < 3e-5
            assert apart(fast.to("cpu", torch.float64).float()(x), expected) < 3e-5
    head = nn.Conv2d(8, 2, 1)
    head(fast(x)[-1]).sum().backward()  # and out of it
    assert head.weight.grad.abs().sum() > 0
    fast.model.timestep.fill_(3.0)
    with pytest.raises(RuntimeError, match="another timestep"):
        fast(x)


def test_wrong_arguments():
    for other in (nn.Linear(2, 2), "cleandift_tiny", None):
        with pytest.raises(TypeError, match="expected a model with one backbone"):
            optimize(other)
    with pytest.raises(ValueError, match="optimised already"):
        optimize(optimize(build()))
    for wrong, message in (
        (dict(fold="prompt"), "fold must be"),
        (dict(fold=1), "fold must be True, False or 'timestep', got 1"),
        (dict(dtype=torch.float64), "dtype must be"),
        (dict(channels_last="yes"), "channels_last must be True, False or None, got 'yes'"),
        (dict(winograd=1), "winograd must be"),
        (dict(winograd=True, dtype=torch.float16), "winograd=True is for float32"),
        (dict(compile=1), "compile must be"),
        (dict(compile="nonsense"), "compile='nonsense' is not what torch.compile takes.*reduce-overhead"),
        (dict(compile=dict(backend="nonsense")), "nonsense"),
        (dict(compile=dict(backends="eager")), "backends"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize(build(), **wrong)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        optimize(build())


@pytest.mark.parametrize("wrong", [dict(winograd=True, compile="nonsense"), dict(compile="nonsense"), {}], ids=str)
def test_a_refusal_changes_nothing(wrong):
    peft = pytest.importorskip("peft")
    model = build(num_classes=0)
    if not wrong:  # adapters must be merged first
        model.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"]))
    model.train()

    def looks():
        return [(name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()]

    before, kinds = looks(), [(type(module), module.training) for module in model.modules()]
    with pytest.raises(ValueError, match="resnets.*cannot be folded" if not wrong else "compile"):
        optimize(model, **wrong)
    assert looks() == before and [(type(module), module.training) for module in model.modules()] == kinds


def test_torch_without_onednn(monkeypatch):
    """Such builds (Apple's) do not know the operator that tells whether a CPU has 16-bit instructions."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    fast = optimize(build(features_only=True), dtype=torch.bfloat16)
    assert fast(images(1, 3, 64, 64))[0].dtype == torch.bfloat16


def test_optimised_weights_are_not_published(tmp_path):
    with pytest.raises(ValueError, match="save it before cleandift_backbones.optimize"):
        save_folder(optimize(build(features_only=True)), tmp_path / "FOLDER")


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


def test_hooks_pass_to_the_new_layers():
    model, seen, x = build(), [], images(1, 3, 64, 64)
    blocks = [m for m in model.modules() if type(m).__name__ == "ResnetBlock2D"]
    layers = [*blocks, *(block.conv1 for block in blocks)]
    handles = [layer.register_forward_hook(lambda *_: seen.append(_[2].shape)) for layer in layers]
    after, early = dict(with_kwargs=True, always_call=True), dict(with_kwargs=True)
    handles += [layer.register_forward_hook(lambda *_: seen.append(len(_)), **after) for layer in layers]
    handles += [layer.register_forward_pre_hook(lambda *_: seen.append(len(_)), **early) for layer in layers]
    model(x)
    before = seen.copy()
    seen.clear()
    optimize(model, winograd=True)(x)
    assert seen == before and {3, 4} < set(seen)
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == len(before)


def test_fewer_operations():
    """Kernels, not seconds: what a pass dispatches, views apart."""
    model, x = build("cleandift_tiny"), images(1, 3, 128, 128)
    before = operations(model, x).total()
    after = operations(optimize(copy.deepcopy(model), winograd=False, channels_last=False), x).total()
    assert after <= 0.75 * before, (before, after)


def test_attention_stays_fused():
    """Every attention runs in one fused kernel, whatever memory format the weights took."""
    for model in (build("cleandift_tiny"), optimize(build("cleandift_tiny")), optimize(build("dift_tiny"))):
        calls = operations(model.to(memory_format=torch.channels_last), images(1, 3, 128, 128))
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        assert calls["_scaled_dot_product_flash_attention_for_cpu"] == len(layers) > 4
        assert not calls["_safe_softmax"] and not calls["_softmax"]


# GFLOP of one image of 512 x 512 down to each map, by torch's counter, attention included, in order of execution: mid,
# us1 ... us10. A change here is a change of every user's cost.
GFLOP = [1379, 1385, 1391, 1404, 1446, 1488, 1556, 1609, 1653, 1723, 1795]


def test_gflop_per_map_of_sd21():
    counts = []
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, 3, 512, 512)
        for index in reversed(ALL):
            model = build("cleandift_sd21", features_only=True, out_indices=(index,))
            counts.append(round(gflop(model, x)))
    assert counts == GFLOP


def test_import_stays_light():
    code = "import sys, cleandift_backbones; assert 'diffusers' not in sys.modules; cleandift_backbones.optimize"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_compiled_once_for_all_sizes():
    """One compilation for batches of one and one for larger ones; no graph breaks (fullgraph).

    In plain convolutions some of these sizes would make more: see `cpu_any_size_conv.py`.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(features_only=True, out_indices=(4, 10))
    fast = optimize(copy.deepcopy(model), compile=dict(dynamic=True, backend="eager"))
    for shape in ((1, 3, 128, 128), (1, 3, 192, 128), (1, 3, 131, 250), (1, 3, 72, 80), (1, 3, 256, 256)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1, stats
    for shape in ((2, 3, 128, 128), (3, 3, 192, 131)):
        assert apart(fast(images(*shape)), model(images(*shape))) < 3e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
