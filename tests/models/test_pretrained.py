"""Weights put together from where the parts are published: through huggingface_hub's client and a Hub on 127.0.0.1."""

import copy
import errno
import logging

import pytest
import standins
import timm
import torch
from hub_server import Fault
from safetensors.torch import save

from cleandift_backbones.models.architectures import ARCHITECTURES, MODELS

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PARTS = dict(
    unet="CompVis/cleandift/cleandift_test_unet.safetensors",
    timestep="CompVis/cleandift/cleandift_test_full.safetensors",
    vae="stabilityai/sd-vae/diffusion_pytorch_model.safetensors",
    text_encoder="mirror/sd",
)


@pytest.fixture
def published(hub):
    hub.place(
        "CompVis/cleandift",
        {
            "cleandift_test_unet.safetensors": standins.compvis_unet(),
            "cleandift_test_full.safetensors": standins.compvis_full(),
        },
    )
    hub.place("stabilityai/sd-vae", {"diffusion_pytorch_model.safetensors": standins.sd_vae()})
    hub.place("mirror/sd", standins.diffusers_files())
    return hub


def create(**kwargs):
    options = dict(pretrained=True, features_only=True, out_indices=tuple(range(11)), sources=PARTS)
    return timm.create_model("test_cleandift", **{**options, **kwargs}).eval()


def check(model, seed=0, timestep=standins.TIMESTEP, dtype=torch.float16):
    expected = standins.expected_maps(X, seed, timestep, dtype)
    with torch.no_grad():
        maps = model(X)
    for info, found in zip(model.feature_info.get_dicts(), maps):
        torch.testing.assert_close(found, expected[info["name"]], rtol=1e-4, atol=1e-5)


def test_published_parts_are_put_together(published, caplog):
    model = create()
    check(model)
    assert model.model.timestep == standins.TIMESTEP
    assert not caplog.records
    # Of the full checkpoint only its header and four bytes were read.
    header = int.from_bytes(standins.compvis_full()[:8], "little")
    assert published.count("GET .*_full.safetensors") == 3
    assert published.sent["cleandift_test_full.safetensors"] == 8 + header + 4


def test_second_time_comes_from_the_cache(published, offline):
    create()
    before = published.sent.total()
    offline()
    check(create())
    assert published.sent.total() == before


def test_text_encoder_is_not_read_again(published, monkeypatch):
    create()
    monkeypatch.setattr("cleandift_backbones.models.text.PromptEncoder", None)
    check(create())


def test_learned_timestep_not_to_be_had(published, caplog):
    with caplog.at_level(logging.WARNING):
        model = create(sources=PARTS | dict(timestep="CompVis/cleandift/gone.safetensors"))
    assert model.model.timestep == 261
    assert "learned timestep could not be read from CompVis/cleandift/gone.safetensors" in caplog.text
    assert "has no file gone.safetensors" in caplog.text and "261" in caplog.text
    check(model, timestep=261)


def test_offline_names_all_files(published, offline):
    offline()
    with pytest.raises(RuntimeError) as error:
        create()
    for part, source in PARTS.items():
        assert (f"{part}: {source}" in str(error.value)) == (part != "timestep")
    for remedy in ("hf download", "sources=dict(unet=PATH", "vae=PATH", "cleandift convert"):
        assert remedy in str(error.value)


def test_nothing_large_is_fetched_if_a_part_is_missing(published):
    del published.repos["mirror/sd"]
    with pytest.raises(RuntimeError, match="text_encoder: mirror/sd.*does not exist, or is private"):
        create()
    assert published.count("GET .*_unet.safetensors") <= 2 and not published.count("GET .*sd-vae")


def test_whole_full_checkpoint_by_ranges(published):
    """With the full checkpoint as the source, only the tensors that the model holds are read, from one commit."""
    full = "CompVis/cleandift/cleandift_test_full.safetensors"
    model = create(sources=dict(unet=full, text_encoder="mirror/sd"), out_indices=(10,))
    expected = standins.expected_maps(X)["mid"]
    vae_rounded = model(X)[0]
    assert vae_rounded.shape == expected.shape and model.model.timestep == standins.TIMESTEP
    torch.testing.assert_close(vae_rounded, expected, rtol=0.05, atol=0.05)  # its VAE is in 16 bit
    assert published.count("GET .*_full.safetensors") > 100
    header = int.from_bytes(standins.compvis_full()[:8], "little")
    held = sum(2 * t.numel() for n, t in model.model.state_dict().items() if n.startswith(("unet.", "vae.")))
    assert published.sent["cleandift_test_full.safetensors"] == 8 + header + held + 4


def test_revisions(published):
    repo = published.repos["CompVis/cleandift"]
    first = repo.refs["main"]
    repo.tags["v1"] = first
    other = save(standins.half(standins.unet(1).state_dict()))
    published.place("CompVis/cleandift", {"cleandift_test_unet.safetensors": other})
    check(create(), seed=1)
    for revision in ("v1", first):
        unet = f"CompVis/cleandift@{revision}/cleandift_test_unet.safetensors"
        check(create(sources=PARTS | dict(unet=unet)))
    with pytest.raises(RuntimeError, match="CompVis/cleandift has no revision 'v9'"):
        create(sources=PARTS | dict(unet="CompVis/cleandift@v9/cleandift_test_unet.safetensors"))


def test_local_files(published, monkeypatch, tmp_path):
    (tmp_path / "my_unet.safetensors").write_bytes(save(standins.half(standins.unet(1).state_dict())))
    check(create(sources=PARTS | dict(unet=str(tmp_path / "my_unet.safetensors"))), seed=1)
    monkeypatch.setenv("TEST_CLEANDIFT_UNET", str(tmp_path / "my_unet.safetensors"))  # read by early versions
    check(create(), seed=0)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors is neither a file"):
        create(sources=PARTS | dict(unet=str(tmp_path / "nowhere.safetensors")))


def test_a_file_of_the_user_is_completed(published, tmp_path):
    path = tmp_path / "student.safetensors"
    path.write_bytes(standins.compvis_unet())
    rest = {part: source for part, source in PARTS.items() if part != "unet"}
    check(create(sources=rest, pretrained_cfg_overlay=dict(file=str(path))))


def test_diffusers_folder_and_repository(published, tmp_path):
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    model = create(sources={}, pretrained_cfg_overlay=dict(file=str(folder)), timestep=100)
    check(model, seed=1, timestep=100, dtype=torch.float32)
    assert model.model.text_encoder == str(folder)
    check(create(sources=dict(unet="mirror/sd"), timestep=100), seed=1, timestep=100, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["auto", torch.float16, "bfloat16"])
def test_dtype(published, dtype):
    model = create(dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    assert {p.dtype for p in model.parameters()} == {wanted} and model.model.prompt_embeds.dtype == wanted
    assert model.model.timestep.dtype == torch.float32
    assert all(x.dtype == wanted and x.isfinite().all() for x in model(X.to(wanted)))
    with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16, float64 or 'auto'.*got 'int8'"):
        create(dtype="int8")


def test_faults_of_the_hub(published, monkeypatch):
    def refused(message, **parts):
        with pytest.raises(RuntimeError, match=message):
            create(sources=PARTS | parts)

    refused(
        "nobody/nothing does not exist, or is private and you are not logged in", vae="nobody/nothing/x.safetensors"
    )
    published.repos["stabilityai/sd-vae"].gated = True
    refused("stabilityai/sd-vae is gated: accept its terms on its page, then log in")
    published.repos["stabilityai/sd-vae"].gated = False
    published.repos["stabilityai/sd-vae"].private = True
    refused("stabilityai/sd-vae does not exist, or is private")
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_tests")
    check(create())


def test_interrupted_download_goes_on(published):
    published.faults.append(Fault("GET .*/sd-vae/.*", drop_after=20_000))
    check(create())
    assert published.count("GET .*/sd-vae/.*") == 2


def test_damaged_download_is_removed(published):
    published.faults.append(Fault("GET .*sd-vae.*", corrupt=True))
    with pytest.raises(OSError, match=r"download is damaged \(its SHA-256 is not [0-9a-f]{64}\) and was removed"):
        create()
    check(create())  # the next try


def test_full_disk_while_downloading(published, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(
        OSError, match=r"cleandift_test_unet.safetensors: the disk is full.*set HF_HOME to another disk"
    ):
        create()


def test_unknown_part():
    with pytest.raises(ValueError, match=r"unknown parts \['vea'\]: the parts are unet, vae, timestep, text_encoder"):
        create(sources=dict(vea="x"))


def test_published_models_name_existing_kinds_of_sources():
    published = [(f"{name}.{one.tag}", one.parts) for name, spec in MODELS.items() for one in spec.published]
    assert len(published) >= 9
    for name, parts in published:
        assert {"unet", "text_encoder"} <= set(parts) and timm.is_model_pretrained(name)
        if "sd" in name:
            assert "stabilityai/stable-diffusion-2-1" not in " ".join(parts.values())  # gone from the Hub
            cfg = timm.get_pretrained_cfg(name)
            assert parts["unet"] == f"{cfg.hf_hub_id}/{cfg.hf_hub_filename}"


def test_a_damaged_update_is_not_loaded(published):
    create()
    published.place("stabilityai/sd-vae", {"diffusion_pytorch_model.safetensors": standins.sd_vae() + b" " * 8})
    published.faults.append(Fault("GET .*sd-vae.*", corrupt=True))
    with pytest.raises(OSError, match="download is damaged"):
        create()


def test_what_the_user_names_replaces_what_is_found(published, tmp_path):
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in standins.vae().state_dict().items()}
    (tmp_path / "zeros.safetensors").write_bytes(save(zeros))
    overlay = dict(pretrained_cfg_overlay=dict(file=str(folder)), timestep=1)
    model = create(sources=dict(vae=str(tmp_path / "zeros.safetensors")), **overlay)
    assert not any(p.any() for p in model.model.vae.parameters())
    with pytest.raises(RuntimeError, match="text_encoder: nobody/nothing"):
        create(sources=dict(text_encoder="nobody/nothing"), **overlay)
    (tmp_path / "no_vae.safetensors").write_bytes(standins.compvis_unet())
    with pytest.raises(ValueError, match="no_vae.safetensors .* holds no VAE, but UNet"):
        create(sources=dict(vae=str(tmp_path / "no_vae.safetensors")), **overlay)


def test_prompt_is_encoded_by_the_text_encoder_of_the_weights(published, tmp_path):
    folder = standins.write(tmp_path / "sd", standins.diffusers_files())
    model = create(sources={}, pretrained_cfg_overlay=dict(file=str(folder)), timestep=1, prompt="cat", dtype="auto")
    tokenizer, encoder = standins.text_encoder()
    ids = tokenizer(["cat"], padding="max_length", max_length=3, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.model.prompt_embeds, encoder(ids)[0])
    assert model.model.text_encoder == str(folder)


def test_timestep_of_a_repository_that_is_not_cached_otherwise(published, offline, caplog):
    published.place("me/ts", {"full.safetensors": standins.compvis_full()})
    sources = PARTS | dict(timestep="me/ts/full.safetensors")
    assert create(sources=sources).model.timestep == standins.TIMESTEP
    offline()
    assert create(sources=sources).model.timestep == standins.TIMESTEP and not caplog.records


def test_a_cache_that_cannot_be_written_is_no_obstacle(published, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cleandift_backbones.checkpoints.memo.save_file", refuse)
    check(create())
    assert "is not kept" in caplog.text


def test_sources_that_are_repositories(published):
    files = {n: c for n, c in standins.diffusers_files().items() if not n.startswith(("text", "tok"))}
    published.place("me/unetvae", files)
    model = create(sources=dict(unet="me/unetvae", text_encoder="mirror/sd"), timestep=9)
    check(model, seed=1, timestep=9, dtype=torch.float32)
    check(create(sources=PARTS | dict(vae="mirror/sd")))


def test_another_family_is_refused_by_its_header(published):
    wide = {
        f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 2048) for i in range(9)
    }
    published.place("me/xl", {"unet.safetensors": save({"conv_in.weight": torch.zeros(4, 4, 3, 3), **wide})})
    with pytest.raises(ValueError, match="another family .text of width 2048."):
        create(sources=PARTS | dict(unet="me/xl/unet.safetensors"))
    assert published.sent["unet.safetensors"] < 5000


def test_dift_takes_the_teacher_or_nothing(published, monkeypatch, tmp_path):
    standins.use_parts(monkeypatch, "sd21", ARCHITECTURES["test"])
    (tmp_path / "full.safetensors").write_bytes(standins.compvis_full())
    options = dict(pretrained=True, sources=dict(PARTS, unet=str(tmp_path / "full.safetensors")))
    model = timm.create_model("dift_sd21", **options)
    assert torch.equal(model.unet.conv_in.bias, standins.unet(1).conv_in.bias.half().float())
    from safetensors.torch import load

    student = {n: t for n, t in load(standins.compvis_full()).items() if "base" not in n}
    (tmp_path / "full.safetensors").write_bytes(save(student))
    with pytest.raises(ValueError, match="holds no teacher"):
        timm.create_model("dift_sd21", **options)


def test_kept_by_many_threads_at_once(published):
    from concurrent.futures import ThreadPoolExecutor

    from cleandift_backbones.checkpoints import memo

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: memo.remember("x", lambda: torch.tensor(1.0)), range(40)))
    assert all(tensor == 1 for tensor in found)


def test_projected_features(published):
    """The published heads give the teacher's features at a timestep, right for any batch; others are not held."""
    sources = PARTS | dict(heads=PARTS["timestep"])
    model = create(projected_timestep=300, sources=sources, out_indices=(4, 10))
    heads = copy.deepcopy(standins.heads())
    for tensor in heads.state_dict().values():
        tensor.copy_(tensor.half().float())
    maps = {name: x for name, x in standins.expected_maps(X).items() if name in ("us6", "mid")}
    with torch.no_grad():
        expected = {name: heads.adapters[name](x, condition(heads, 300.0)) for name, x in maps.items()}
        for name, found in zip(("us6", "mid"), model(X)):
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(found, maps[name], rtol=0.01)
            torch.testing.assert_close(model(X[1:])[("us6", "mid").index(name)], found[1:], rtol=1e-4, atol=1e-5)
    assert set(model.model.heads.adapters) == {"us6", "mid"}
    plain = timm.create_model("test_cleandift", pretrained=True, projected_timestep=300, sources=sources)
    plain(X).sum().backward()
    assert set(plain.heads.adapters) == {"mid"} and all(p.grad is not None for p in plain.parameters())
    assert create().model.heads is None


def condition(heads, timestep):
    features = heads.time_emb(torch.full((len(X),), timestep) / 999)
    return heads.mapping(heads.time_in_proj(features))


def test_projected_features_need_heads(published, tmp_path):
    (tmp_path / "unet.safetensors").write_bytes(standins.compvis_unet())
    with pytest.raises(ValueError, match="needs projection heads for mid.*us9; .*unet.safetensors .* has none"):
        create(projected_timestep=300, sources=PARTS)
    with pytest.raises(ValueError, match="projected_timestep must lie in 0..999, got 1000"):
        create(projected_timestep=1000)
    with pytest.raises(ValueError, match="projected_timestep is CleanDIFT's"):
        timm.create_model("dift_tiny", projected_timestep=3)
