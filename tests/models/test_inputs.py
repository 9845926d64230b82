"""What users give: maps by name, images in a wrong range or dtype, arguments of other backbones."""

import copy
import subprocess
import sys
import warnings

import pytest
import timm
import torch

from cleandift_backbones import mm_checks
from cleandift_backbones.features.extractor import list_maps, load_extractor, map_indices
from cleandift_backbones.models import inputs
from cleandift_backbones.models.architectures import model_names
from cleandift_backbones.utils.errors import CleanDIFTError, InputError, InputTypeError

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PHOTO = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).clamp(0.0, 1.0)  # 0..1


def make(name="test_cleandift", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


# --- maps by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, names",
    [
        (("us6", "mid"), ["us6", "mid"]),
        (["mid", 4, -10], ["mid", "us6", "us9"]),
        ("us6", ["us6"]),
        (("us10",), ["us10"]),
    ],
)
def test_out_indices_by_name(given, names):
    model = make(features_only=True, out_indices=given)
    assert [info["name"] for info in model.feature_info.get_dicts()] == names
    assert len(model(X)) == len(names)
    whole = make(final_map="us10")
    whole.load_state_dict(make(final_map="us10").state_dict())
    maps = whole.forward_intermediates(X, indices=given, intermediates_only=True)
    by_index = whole.forward_intermediates(X, indices=model.out_indices, intermediates_only=True)
    torch.testing.assert_close(maps, by_index)
    assert whole.prune_intermediate_layers(given) == model.out_indices
    assert mm_checks.describe("test_cleandift", given).indices == model.out_indices
    assert map_indices(list_maps("test_cleandift", out_indices=range(11)), given) == model.out_indices


def test_pyramids_and_extractor_by_name():
    model = make("cleandift_tiny_pyramid", features_only=True, out_indices=("vae2", "us9"))
    assert model.feature_info.reduction() == [2, 4]
    assert load_extractor("cleandift_tiny", ("us6", 10)).maps == ("us6", "mid")


def test_torch_hub_by_name():
    model = torch.hub.load(".", "cleandift_tiny", source="local", features_only=True, out_indices=("us6", "mid"))
    assert model.feature_info.channels() == [112, 112]


@pytest.mark.parametrize("given", [("us6", "us12"), "us12", ("US6",), (None,), (True,)])
def test_unknown_names_list_those_that_exist(given):
    with pytest.raises(InputError, match=r"out_indices .*no map .*This model has 0 = us10, 1 = us9.*10 = mid"):
        make(features_only=True, out_indices=given)
    with pytest.raises(InputError, match="no map"):
        make(final_map="us10").forward_intermediates(X, indices=given)


# --- the range of images ------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch):
    """Calls something in a process that has not warned yet; returns the warnings about images."""
    monkeypatch.setattr(inputs, "_warned", False)

    def call(action):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            action()
        return [str(w.message) for w in found if "the images reach" in str(w.message)]

    return call


@pytest.mark.parametrize("name", ["test_cleandift", "dift_tiny"])
@pytest.mark.parametrize("images, kind", [(PHOTO * 255, "0..255"), (PHOTO, "0..1"), ((PHOTO * 255).round(), "0..255")])
def test_images_that_are_not_normalised_are_warned_about_once(heard, name, images, kind):
    model = make(name, features_only=True)
    (message,) = heard(lambda: model(images))
    assert f"like images in {kind}, but this model expects them in [-1, 1]" in message and "mean 0.5" in message
    assert not heard(lambda: make(name, features_only=True)(images)), "once per process"


@pytest.mark.parametrize(
    "images",
    [
        X, X * 2, PHOTO * 2 - 1, torch.zeros_like(X), torch.ones_like(X), -torch.ones_like(X), PHOTO * 0.5 + 0.5,
        torch.full_like(X, 0.3), (PHOTO - 0.45) / 0.225, X.bfloat16().float(), torch.full_like(X, float("nan")),
    ],
)  # fmt: skip
def test_no_false_alarms(heard, images):
    assert not heard(lambda: make()(images))


def test_only_the_first_calls_are_looked_at(heard, monkeypatch):
    looks = []
    monkeypatch.setattr(inputs, "reach", lambda images: looks.append(1) or (-1.0, 1.0))
    model = make()
    for _ in range(5):
        model(X)
    assert len(looks) == inputs.CHECKED_CALLS
    copy.deepcopy(model)(X)
    assert len(looks) == inputs.CHECKED_CALLS


def test_graphs_have_no_look_in_them(heard):
    model = make(features_only=True, out_indices=("us6",))

    def trace():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            compiled(PHOTO)
        program = torch.export.export(model, (PHOTO,))
        assert not [n for n in program.graph.nodes if any(s in str(n.target) for s in ("aminmax", "scalar_dense"))]
        torch.jit.trace(model, PHOTO, check_trace=False)
        with torch.device("meta"):
            timm.create_model("test_cleandift", features_only=True)(torch.empty(1, 3, 64, 64))
        torch.func.vmap(lambda x: model(x[None])[0])(PHOTO)

    assert not heard(trace)
    assert heard(lambda: model(PHOTO))


def test_looks_do_not_recompile(heard):
    torch._dynamo.reset()
    model = make(features_only=True, out_indices=("mid",))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(X)
        model(X)  # counts as one of the first calls
        compiled(X)


# --- dtypes of images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_cleandift", "dift_tiny"])
def test_half_weights_and_float_images_say_what_to_do(name):
    model = make(name, features_only=True, dtype="bfloat16")
    with pytest.raises(InputTypeError, match=r"images are torch.float32, the weights torch.bfloat16: cast the images"):
        model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X)[0].isfinite().all()
    assert model(X.bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(InputTypeError, match=r"images\.to\(torch.float32\).*torch.autocast\('cpu'\)"):
        make(name)(X.double())


# --- arguments of other backbones ---------------------------------------------------------------------------------


def test_output_stride():
    for stride in (8, 16):
        with pytest.raises(InputTypeError, match=f"output_stride={stride} is not possible.*no dilation.*32.*Unet, "):
            make("cleandift_tiny_pyramid", features_only=True, output_stride=stride)
    model = make("cleandift_tiny_pyramid", features_only=True, output_stride=32)
    assert model.feature_info.reduction()[-1] == 32


@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_decoders_that_want_dilation(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    for name in ("cleandift_tiny_pyramid", "cleandift_tiny"):
        with pytest.raises(InputTypeError, match=f"no dilation.*Decoders of .*{', '.join(inputs.SMP)}"):
            getattr(smp, decoder)(f"tu-{name}", encoder_weights=None)


@pytest.mark.parametrize("decoder, options", [*((d, {}) for d in inputs.SMP), ("PAN", dict(encoder_output_stride=32))])
def test_decoders_that_fit_run(decoder, options):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-cleandift_tiny_pyramid", encoder_weights=None, classes=2, **options)
    assert model(torch.randn(2, 3, 256, 256)).shape == (2, 2, 256, 256)


@pytest.mark.parametrize("weights", ["included", "given"])
def test_projected_features_of_weights_without_heads(tmp_path, weights):
    with pytest.raises(CleanDIFTError, match="needs projection heads for mid; .* has none.*heads=SOURCE"):
        timm.create_model("cleandift_tiny", pretrained=True, projected_timestep=261)
    state = make(projected_timestep=261, final_map="us6").state_dict()  # heads of us6 alone
    overlay = dict(pretrained_cfg_overlay=dict(state_dict=state))
    assert timm.create_model("test_cleandift", pretrained=True, projected_timestep=3, final_map="us6", **overlay)
    with pytest.raises(CleanDIFTError, match="needs projection heads for mid; .* has them for us6"):
        timm.create_model("test_cleandift", pretrained=True, projected_timestep=3, **overlay)


# --- lists of models ----------------------------------------------------------------------------------------------


def test_lists_for_users_have_no_test_models():
    assert "cleandift_sd21" in model_names() and not [name for name in model_names() if "test" in name]
    assert set(timm.list_models("*dift*")) == set(model_names())
    shown = subprocess.run([sys.executable, "tools/convert.py", "--help"], capture_output=True, text=True, check=True)
    assert "test_cleandift" not in shown.stdout and "cleandift_sd21_pyramid" not in shown.stdout
    with pytest.raises(InputError) as error:
        mm_checks.describe("nothing")
    assert "cleandift_tiny" in str(error.value) and "test_" not in str(error.value)
    assert mm_checks.describe("test_cleandift").names and make()(X).shape == (2, 8)
