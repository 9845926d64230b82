"""Extraction with models that were optimised: by default, and with the same features to rounding."""

import json

import pytest
import torch
from extract_runs import extract, make_pictures, same

from cleandift_backbones.features import Features, extraction
from cleandift_backbones.optimization.optimize import OptimizedCleanDIFT

TINY = ["--model", "cleandift_tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos", 6)


@pytest.fixture
def seen(monkeypatch):
    """The models that run."""
    found, run = [], extraction.run
    monkeypatch.setattr(
        extraction, "run", lambda e, extractor, *args: found.append(extractor) or run(e, extractor, *args)
    )
    return found


def test_models_are_optimised(folder, tmp_path, capsys, seen):
    """The maps are the same to rounding, the weights' hash too, and both kinds are not mixed in a folder."""
    options = ["--map", "us6", "mid", "--store-dtype", "float32", "--limit", "5"]
    extract(folder, tmp_path / "fast", *options, model=TINY)
    extract(folder, tmp_path / "plain", *options, "--no-optimize", model=TINY)
    fast, plain_ = (extractor.core for extractor in seen)
    assert isinstance(fast, OptimizedCleanDIFT) and not isinstance(plain_, OptimizedCleanDIFT)
    assert not any("time_emb_proj" in name or "attn2.to_k" in name for name, _ in fast.named_parameters())
    fast, plain_ = Features(tmp_path / "fast"), Features(tmp_path / "plain")
    for one, other in zip(fast, plain_):
        for name in ("us6", "mid"):
            assert (one[name] - other[name]).norm() < 1e-4 * other[name].norm()
    fast, plain_ = fast.meta["settings"], plain_.meta["settings"]
    assert (fast["optimize"], plain_["optimize"]) == ("exact", None) and fast["weights"] == plain_["weights"]
    for out, more, words in (
        ("fast", ["--no-optimize"], "optimize 'exact', now None"),
        ("plain", [], "optimize None, now 'exact'"),
    ):
        with pytest.raises(SystemExit):
            extract(folder, tmp_path / out, *options, *more, model=TINY)
        assert words in capsys.readouterr().err


def test_optimised_with_prompts(folder, tmp_path, seen, capsys):
    """One prompt for all is folded in; one per picture leaves that open, and each gets its own."""
    paths = sorted(folder.rglob("*.png"))[:3]
    lines = [json.dumps({"path": str(p), "prompt": text}) for p, text in zip(paths, ("a cat", "", "a dog"))]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    options = ["--map", "mid", "--store-dtype", "float32"]
    for number, (source, prompt) in enumerate((("jsonl", []), ("txt", ["--prompt", "a dog"]))):
        made = []
        for out, more in (("fast", []), ("plain", ["--no-optimize"])):
            out = tmp_path / f"{out}{number}"
            extract(tmp_path / f"list.{source}", out, *options, *prompt, *more, model=TINY)
            made.append(Features(out).stack())
        torch.testing.assert_close(*made, atol=2e-4, rtol=1e-3)
        assert seen[-2].core.unet.fixed_text == (source == "txt")
    with pytest.raises(SystemExit):
        extract(tmp_path / "list.jsonl", tmp_path / "none", *options, "--compile", model=TINY)
    assert "--compile is for one prompt for all pictures" in capsys.readouterr().err


def test_other_models_and_noisy_ones_beside_the_option(folder, tmp_path, capsys):
    extract(folder, tmp_path / "out", "--limit", "2", model=["--model", "random:test_resnet"])
    extract(folder, tmp_path / "out", "--limit", "3", "--no-optimize", model=["--model", "random:test_resnet"])
    noisy = dict(model=["--model", "dift_tiny", "--timestep", "100", "--ensemble", "2", "--limit", "2"])
    extract(folder, tmp_path / "fast", "--store-dtype", "float32", **noisy)
    extract(folder, tmp_path / "plain", "--store-dtype", "float32", "--no-optimize", **noisy)
    same(tmp_path / "fast", tmp_path / "plain", 2e-4, 1e-3)
    for more, words in ((["--compile"], "test_resnet is no model of this package"), (["--no-optimize"], "one of them")):
        with pytest.raises(SystemExit):
            extract(folder, tmp_path / "none", "--compile", *more, model=["--model", "random:test_resnet"])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(folder, tmp_path, monkeypatch, traced):
    """Asked for once, for all sizes and without breaks; the slow test has torch trace it, but build no machine code."""
    compile, calls = torch.compile, []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **given: calls.append(given) or (compile(f, backend="eager", **given) if traced else f),
    )
    options = ["--map", "mid", "--keep-size", "--store-dtype", "float32"]
    extract(folder, tmp_path / "compiled", *options, "--compile")
    extract(folder, tmp_path / "plain", *options, "--no-optimize")
    same(tmp_path / "compiled", tmp_path / "plain", 2e-4, 1e-3)
    assert calls and all(given == dict(fullgraph=True, dynamic=True) for given in calls)
    assert Features(tmp_path / "compiled").meta["settings"]["optimize"] == "compile"
