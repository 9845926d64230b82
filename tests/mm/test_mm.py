"""The backbone under mmengine's conventions; neither mmsegmentation nor mmdetection is needed here."""

import copy
import json

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS, DefaultScope, init_default_scope
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, load_state_dict, save_checkpoint
from mmengine.utils import import_modules_from_strings

import cleandift_backbones.publish.card as publishing
from cleandift_backbones.checkpoints import CheckpointError
from cleandift_backbones.mm.backbone import PARTS, RECORD, CheckBackboneHook, CleanDIFT
from cleandift_backbones.utils.errors import InputError

X = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
SIX = dict(model_name="cleandift_tiny", out_indices=["us6"])


class Net(BaseModule):
    """A backbone and a head, as a segmentor holds them."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = CleanDIFT(**{**SIX, **backbone})
        self.decode_head = nn.Conv2d(self.backbone.out_channels[0], 3, 1)

    def forward(self, x):
        return self.decode_head(self.backbone(x)[0])


@pytest.fixture
def native(tmp_path):
    """A native folder of other weights, of every map."""
    torch.manual_seed(3)
    return publishing.save_folder(timm.create_model("test_cleandift", final_map="us10"), tmp_path / "native")


def own(source, **arguments):
    return CleanDIFT(**{"model_name": "test_cleandift", "out_indices": [4], "pretrained": source, **arguments})


# --- in configs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["cleandift_backbones.CleanDIFT", "cleandift_backbones.mm.CleanDIFT", "CleanDIFT", CleanDIFT]
)
@pytest.mark.parametrize("scope", [None, "mmengine"])
def test_types(kind, scope):
    import_modules_from_strings(["cleandift_backbones.mm"])  # what custom_imports does
    if scope:
        init_default_scope(scope)
        assert DefaultScope.get_current_instance() is not None
    assert type(MODELS.build(dict(type=kind, **SIX))) is CleanDIFT
    assert HOOKS.get("cleandift_backbones.CheckBackboneHook") is HOOKS.get("CheckBackboneHook") is CheckBackboneHook


def test_python_style_config(tmp_path):
    (tmp_path / "config.py").write_text(
        "from cleandift_backbones.mm import CleanDIFT\n"
        "maps = CleanDIFT.describe('cleandift_tiny', ['us6', 'mid'])\n"
        "backbone = dict(type=CleanDIFT, model_name='cleandift_tiny', out_indices=maps.indices)\n"
        "del maps\n"
    )
    config = Config.fromfile(tmp_path / "config.py", lazy_import=False)
    assert MODELS.build(config.backbone).out_channels == [112, 112]


def test_maps_are_timms():
    expected = timm.create_model("cleandift_tiny", pretrained=True, features_only=True, out_indices=(10, 4, 1)).eval()
    backbone = CleanDIFT("cleandift_tiny", out_indices=["mid", 4, -10]).eval()
    found = backbone(X)
    assert isinstance(found, tuple)
    for a, b in zip(found, expected(X), strict=True):
        torch.testing.assert_close(a, b)
    assert backbone.out_channels == [x.shape[1] for x in found] == expected.feature_info.channels()
    assert backbone.strides == expected.feature_info.reduction() == [32, 8, 4]


def test_noisy_and_pyramid():
    noisy = CleanDIFT("dift_tiny", out_indices=["us6"], timestep=100, ensemble_size=2)
    assert noisy(X)[0].shape == (2, 112, 8, 12)
    pyramid = CleanDIFT("cleandift_tiny_pyramid")
    assert pyramid.strides == [2, 4, 8, 16, 32] and [x.shape[-2] for x in pyramid(X)] == [32, 16, 8, 4, 2]


def test_prompt():
    pytest.importorskip("transformers")
    arguments = dict(frozen=True, save_frozen=False)
    cat = CleanDIFT(**SIX, **arguments, prompt="cat face")
    expected = timm.create_model(
        "cleandift_tiny", pretrained=True, features_only=True, out_indices=(4,), prompt="cat face"
    ).eval()
    torch.testing.assert_close(cat(X)[0], expected(X)[0])
    assert not torch.allclose(cat(X)[0], CleanDIFT(**SIX, frozen=True)(X)[0])
    CleanDIFT(**SIX, **arguments, prompt="cat face").load_state_dict(cat.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="prompt= to the text"):
        CleanDIFT(**SIX, **arguments).load_state_dict(cat.state_dict())


# --- frozen -------------------------------------------------------------------------------------------------------


def graph_of(forward):
    """Bytes that the graph of a forward pass keeps, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        result = forward()
    return sum(kept), result


def test_frozen_keeps_no_graph_and_stays_in_eval():
    backbone = CleanDIFT("cleandift_tiny", frozen=True).train()
    kept, maps = graph_of(lambda: backbone(X.clone().requires_grad_()))
    assert kept == 0 and not any(x.requires_grad for x in maps)
    assert not any(module.training for module in backbone.model.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    trained, maps = graph_of(lambda: CleanDIFT("cleandift_tiny").train()(X))
    assert trained > 1e6 and all(x.requires_grad for x in maps)


def test_a_training_step_keeps_the_heads_graph_only():
    net = Net(frozen=True).train()
    (feature,) = net.backbone(X)
    of_head, _ = graph_of(lambda: net.decode_head(feature))
    whole, result = graph_of(lambda: net(X))
    assert whole == of_head
    result.sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {"decode_head.weight", "decode_head.bias"}


def test_the_vae_is_frozen_by_default_and_parts_by_name():
    backbone = CleanDIFT("cleandift_tiny")
    sum(x.mean() for x in backbone.train()(X)).backward()
    assert {n for n, p in backbone.model.named_parameters() if p.grad is None} == {
        n for n, _ in backbone.model.named_parameters() if n.startswith("vae.")
    }
    assert not backbone.model.vae.encoder.conv_in.training and backbone.model.unet.mid_block.training
    half = CleanDIFT("cleandift_tiny", frozen_parts=("vae", "unet_down"))
    kept, maps = graph_of(lambda: half(X))
    assert kept < graph_of(lambda: backbone(X))[0] and maps[0].requires_grad
    trainable = {n.split(".")[1] for n, p in half.model.named_parameters() if p.requires_grad}
    assert trainable == {"mid_block", "up_blocks"}


@pytest.mark.parametrize("name", ["cleandift_tiny", "cleandift_sd21"])
def test_every_parameter_is_of_one_part(name):
    with torch.device("meta"):
        model = timm.create_model(name, final_map="us10", projected_timestep=0)
    for parameter, _ in model.named_parameters():
        assert sum(parameter.startswith(beginnings) for beginnings in PARTS.values()) == 1, parameter


def test_checkpointing_saves_memory_and_changes_nothing():
    plain, saving = (CleanDIFT("cleandift_tiny", with_cp=with_cp) for with_cp in (False, True))
    (kept, a), (less, b) = (graph_of(lambda m=m: m(X)[0]) for m in (plain, saving))
    assert less < kept / 4
    a.square().mean().backward()
    b.square().mean().backward()
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_dtype_of_a_frozen_backbone():
    backbone = CleanDIFT(**SIX, frozen=True, dtype="bfloat16")
    assert backbone.model.unet.conv_in.weight.dtype == torch.bfloat16
    (found,) = backbone(X)
    assert found.dtype == torch.float32
    expected = CleanDIFT(**SIX, frozen=True)(X)[0]
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(backbone(X)[0], found)
    with pytest.raises(ValueError, match="dtype='bfloat16' needs frozen=True"):
        CleanDIFT(**SIX, dtype="bfloat16")


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_frozen_weights_are_left_out_and_put_back(tmp_path):
    net = Net(frozen=True, save_frozen=False)
    save_checkpoint(dict(state_dict=get_state_dict(net)), str(tmp_path / "net.pth"))
    state = torch.load(tmp_path / "net.pth", weights_only=True)["state_dict"]
    assert set(state) == {f"backbone.{RECORD}", "decode_head.weight", "decode_head.bias"}
    assert (tmp_path / "net.pth").stat().st_size < 1e5
    for init_cfg in (dict(), dict(init_cfg=None)):  # the second: as mmseg.apis.init_model builds it, without weights
        again = Net(frozen=True, save_frozen=False, **init_cfg)
        assert again.backbone.has_weights == (not init_cfg)
        load_checkpoint(again, str(tmp_path / "net.pth"), strict=True)
        assert torch.equal(again(X), net(X))
        assert again.load_state_dict(state, strict=True).missing_keys == []


def test_frozen_parts_are_left_out():
    net = Net(frozen_parts=("vae", "unet_down"), save_frozen=False)
    with torch.no_grad():
        net.backbone.model.unet.mid_block.resnets[0].conv1.weight.add_(1)
    state = net.state_dict()
    assert not any(".vae." in name or "down_blocks" in name for name in state)
    assert "backbone.model.unet.mid_block.resnets.0.conv1.weight" in state
    again = Net(frozen_parts=("vae", "unet_down"), save_frozen=False, init_cfg=None)
    again.load_state_dict(state, strict=True)
    assert torch.equal(again(X), net(X))


def test_fine_tuning_goes_on_from_a_frozen_run(native):
    state = own(str(native), frozen=True, save_frozen=False).state_dict()
    for again in (own(str(native)), own(None, init_cfg=None)):
        again.load_state_dict(state, strict=True)
        assert torch.equal(again(X)[0], own(str(native))(X)[0])


def test_a_whole_checkpoint_needs_no_other_weights():
    net = Net(frozen=True)
    assert any("vae" in name for name in net.state_dict())
    again = Net(frozen=True, save_frozen=False, pretrained=False)
    again.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(again(X), net(X))


def test_weights_come_back_from_the_recorded_place(native, tmp_path):
    trained = own(str(native), frozen=True, save_frozen=False)
    state = trained.state_dict()
    other = publishing.save_folder(timm.create_model("test_cleandift", final_map="us10"), tmp_path / "other")
    for again in (own(None, frozen=True, save_frozen=False, init_cfg=None), own(str(other), frozen=True)):
        again.load_state_dict(state, strict=True)
        assert torch.equal(again(X)[0], trained(X)[0])
    (native / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises((RuntimeError, CheckpointError), match="native"):
        own(str(other), frozen=True, save_frozen=False).load_state_dict(state)
    moved = own(str(tmp_path / "moved.safetensors"), frozen=True, save_frozen=False)
    moved.load_state_dict(state, strict=True)
    assert torch.equal(moved(X)[0], trained(X)[0])


def test_changed_frozen_weights_are_noticed(native):
    trained = own(str(native), frozen=True, save_frozen=False)
    state = trained.state_dict()
    publishing.save_folder(timm.create_model("test_cleandift", final_map="us10"), native)  # others in the same place
    with pytest.raises(RuntimeError, match="trained on frozen weights of test_cleandift from .*native.*pretrained="):
        own(str(native), frozen=True, save_frozen=False).load_state_dict(state)


def test_another_precision_is_no_other_backbone(native):
    half = own(str(native), frozen=True, save_frozen=False, dtype="bfloat16")
    own(str(native), frozen=True, save_frozen=False).load_state_dict(half.state_dict(), strict=True)


def test_checkpoints_of_other_backbones(native):
    net = Net()
    resnet = {f"backbone.{n}": t for n, t in timm.create_model("resnet18").state_dict().items()}
    with pytest.raises(RuntimeError, match="does not fit cleandift_tiny.*is missing.*more. Take the config"):
        load_state_dict(net, resnet)
    with pytest.raises(RuntimeError, match=r"conv_in.weight is \(2, 3, 3, 3\), here \(24, 3, 3, 3\)"):
        net.backbone.load_state_dict(own(str(native)).state_dict())
    frozen = own(str(native), frozen=True, save_frozen=False)
    with pytest.raises(RuntimeError, match="does not fit cleandift_tiny.*it is of test_cleandift"):
        net.backbone.load_state_dict(frozen.state_dict())
    load_state_dict(net, {"decode_head.bias": torch.ones(3)})  # a head alone may be loaded
    assert net.decode_head.bias.eq(1).all()


def test_a_copy_is_a_backbone_too():
    """As mmengine's EMAHook makes it."""
    net = Net(frozen=True, save_frozen=False)
    twin = copy.deepcopy(net)
    assert set(twin.state_dict()) == set(net.state_dict()) and torch.equal(twin(X), net(X))


# --- where weights come from --------------------------------------------------------------------------------------


def test_init_cfg(native, hub):
    hub.place("me/features", {path.name: path.read_bytes() for path in native.iterdir()})
    expected = own(str(native))
    for place in (
        str(native),
        str(native / "model.safetensors"),
        "me/features",
        f"local-dir:{native}",
        "hf-hub:me/features",
    ):
        found = CleanDIFT("test_cleandift", out_indices=[4], init_cfg=dict(type="Pretrained", checkpoint=place))
        assert torch.equal(found(X)[0], expected(X)[0]), place


def test_init_weights_leaves_pretrained_weights_alone():
    net = Net()
    before = {n: p.clone() for n, p in net.named_parameters()}
    net.init_weights()
    assert net.backbone.is_init and all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_without_a_network_the_error_says_what_is_missing(hub, offline):
    offline()
    with pytest.raises(
        RuntimeError, match="cleandift_sd21 cannot be loaded.*\n.*unet: CompVis/cleandift.*not in the cache"
    ):
        CleanDIFT("cleandift_sd21", out_indices=["us6"])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(init_cfg=dict(type="Kaiming", layer="Conv2d")),
        dict(init_cfg=dict(type="Pretrained", checkpoint="x", prefix="backbone.")),
        dict(init_cfg=dict(type="Pretrained", checkpoint="x"), pretrained=True),
        dict(init_cfg=[dict(type="Pretrained", checkpoint="x")]),
    ],
)
def test_init_cfg_of_another_kind(arguments):
    with pytest.raises(ValueError, match="init_cfg"):
        CleanDIFT(**SIX, **arguments)


def test_a_pickle_or_no_file_is_refused(tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="safetensors"):
        CleanDIFT(**SIX, pretrained=str(tmp_path / "weights.pth"))
    with pytest.raises((FileNotFoundError, RuntimeError), match="nowhere.pth"):
        CleanDIFT(**SIX, pretrained="./nowhere.pth")


def test_random_frozen_weights_are_refused():
    for arguments in (dict(frozen=True), dict()):  # the VAE is frozen anyway
        backbone = CleanDIFT("test_cleandift", pretrained=False, **arguments)
        with pytest.raises(RuntimeError, match="random weights: give pretrained="):
            backbone(X)
    CleanDIFT("test_cleandift", pretrained=False, frozen_parts=())(X)  # from nothing


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, message",
    [
        ((X + 1) * 127.5, r"reach from .* to 25\d.*expects \[-1, 1\]: set data_preprocessor=dict\(mean="),
        ((X + 1) / 2 / 0.225 - 0.45 / 0.225, "reach from -2 to 2.4"),
        (X[:, :1], r"B x 3 x H x W, got a tensor of shape \(2, 1, 64, 96\)"),
        (X[..., :32], "at least 64"),
    ],
)
def test_images_of_another_kind(images, message):
    with pytest.raises(ValueError, match=message):
        CleanDIFT(**SIX).eval()(images)


def test_only_the_first_images_are_looked_at():
    backbone = CleanDIFT(**SIX).eval()
    backbone(X)
    backbone(X * 2)


def test_colour_jitter_may_leave_the_range_in_training():
    backbone = CleanDIFT(**SIX).train()
    backbone(X * 1.9)
    with pytest.raises(ValueError, match="to 25"):
        backbone((X + 1) * 127.5)
    with pytest.raises(ValueError, match="expects"):
        backbone.eval()(X * 1.9)


def test_the_record_notices_more_than_the_last_numbers(tmp_path):
    backbone = CleanDIFT(**SIX, save_frozen=False)
    state = backbone.state_dict()
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.flatten()[:-1].mul_(1.5)
    assert not backbone._matches(backbone._state(backbone.model), json.loads(bytes(state["frozen_weights"].tolist())))


@pytest.mark.parametrize("arguments", [dict(frozen_parts=("vae", "unet_side")), dict(frozen_parts="vae")])
def test_unknown_parts(arguments):
    with pytest.raises(ValueError, match="frozen_parts.*expected some of .*'unet_down'"):
        CleanDIFT(**SIX, **arguments)


def test_tensors_in_memory():
    torch.manual_seed(5)
    state = timm.create_model("test_cleandift", final_map="us10").state_dict()
    backbone = own(None, pretrained_cfg_overlay=dict(state_dict=state))
    assert torch.equal(backbone.model.unet.conv_in.weight, state["unet.conv_in.weight"])
    with pytest.raises(InputError, match="pretrained must be True, False, a path.*Dict: tensors in memory go to"):
        own(state)
