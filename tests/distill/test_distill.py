"""Heads, the loss, the recipe, and a whole small distillation that really learns."""

import pytest
import torch
from diffusers import DDPMScheduler

from cleandift_backbones.distill.distiller import Distiller, map_loss, stratified_timesteps
from cleandift_backbones.distill.recipe import load_recipe
from cleandift_backbones.models.architectures import ARCHITECTURES
from cleandift_backbones.models.denoisers.unet import FeatureUNet
from cleandift_backbones.models.projection_heads import (
    CONDITIONINGS,
    FiLM,
    ProjectionHeads,
    ResidualBlock,
    RMSNorm,
    modulate,
)

TEST = ARCHITECTURES["test"]
RECIPE = "configs/finetune/cleandift_tiny.yaml"


# --- heads ---


@pytest.mark.parametrize("conditioning", ["film", "adarms"])
@pytest.mark.parametrize("gated", [True, False])
def test_heads_start_as_the_identity_and_train(conditioning, gated):
    heads = ProjectionHeads({"mid": 6, "us6": 4}, depth=2, conditioning=conditioning, gated=gated)
    maps = {"mid": torch.randn(3, 6, 2, 5), "us6": torch.randn(3, 4, 4, 3)}
    out = heads(maps, torch.tensor([1, 500, 999]))
    for name, x in maps.items():
        torch.testing.assert_close(out[name], x)
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    for _ in range(6):  # zero-initialised layers come to life one after the other
        optimizer.zero_grad()
        out = heads(maps, torch.tensor([1, 500, 999]))
        sum((x - 1).square().mean() for x in out.values()).backward()
        optimizer.step()
    assert [n for n, p in heads.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("conditioning", ["film", "adarms"])
def test_head_equals_a_loop_over_positions(conditioning):
    """Every sample is conditioned on its own timestep, whatever the batch (the public code broadcasts wrongly)."""
    torch.manual_seed(0)
    heads = ProjectionHeads({"mid": 4}, depth=1, conditioning=conditioning)
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, t = torch.randn(3, 4, 2, 3), torch.tensor([5.0, 300.0, 999.0])
    out = heads({"mid": x}, t)["mid"]
    layer = heads.adapters["mid"].layers[0]
    for b in range(3):
        angle = 2 * torch.pi * t[b] / 999 * heads.time_emb.weight[:, 0]
        condition = heads.mapping(heads.time_in_proj(torch.cat([angle.cos(), angle.sin()])[None]))[0]
        weights = layer.norm.linear.weight @ condition
        for i in range(2):
            for j in range(3):
                v = x[b, :, i, j]
                if conditioning == "film":
                    n = v * (1 + weights[:4]) + weights[4:]
                else:
                    n = v / (v.square().mean() + 1e-6).sqrt() * (1 + weights)
                up, gate = (layer.up_proj.weight @ n).chunk(2)
                expected = v + layer.down_proj.weight @ (up * gate * torch.sigmoid(gate))
                torch.testing.assert_close(out[b, :, i, j], expected, rtol=1e-3, atol=1e-3)


def test_film_shift_is_not_its_scale():
    film = FiLM(2, 1)
    film.linear.weight.data = torch.tensor([[0.0], [0.0], [3.0], [4.0]])
    torch.testing.assert_close(film(torch.ones(1, 1, 2), torch.ones(1, 1)), torch.tensor([[[4.0, 5.0]]]))


def test_rms_norm_in_half_precision_is_computed_wide():
    x = torch.full((1, 4), 300.0).half()  # its squares overflow float16
    torch.testing.assert_close(modulate(x, torch.ones(4), None, rms=True), torch.ones(1, 4).half())


def plain_block(block, x, *condition):
    """The block as one would write it, left to autograd."""
    if isinstance(block.norm, FiLM):
        scale, shift = block.norm.linear(condition[0])[..., None, :].chunk(2, dim=-1)
        z = x * (1 + scale) + shift
    else:
        scale = (
            block.norm.scale if isinstance(block.norm, RMSNorm) else 1 + block.norm.linear(condition[0])[..., None, :]
        )
        z = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    y = block.up_proj(z)
    if block.gated:
        up, gate = y.chunk(2, dim=-1)
        return x + block.down_proj(up * gate * torch.sigmoid(gate))
    return x + block.down_proj(y * torch.sigmoid(y))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["film", "adarms", "rms"])
def test_block_gives_the_gradients_of_its_plain_form(norm, gated):
    """Also where one clean map is projected to several timesteps, B x 1 x N x C with B x I x D."""
    torch.manual_seed(0)
    made = RMSNorm(6) if norm == "rms" else CONDITIONINGS[norm](6, 3)
    block = ResidualBlock(6, 5, made, gated).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 1, 4, 6).double().requires_grad_()
    condition = () if norm == "rms" else (torch.randn(2, 3, 3).double().requires_grad_(),)
    inputs = [x, *condition, *block.parameters()]
    with torch.no_grad():
        expected = plain_block(block, x, *condition)
    tolerance = dict(rtol=1e-5, atol=1e-5) if norm != "film" else {}  # the RMS is float32
    torch.testing.assert_close(block(x, *condition).detach(), expected, **tolerance)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((block(x, *condition) * weight).sum(), inputs)
    wanted = torch.autograd.grad((plain_block(block, x, *condition) * weight).sum(), inputs)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("conditioning", ["film", "adarms"])
def test_blocks_under_autocast_train_as_in_float32(conditioning):
    torch.manual_seed(0)
    heads = ProjectionHeads({"mid": 16}, conditioning=conditioning)
    for p in heads.adapters.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(2, 16, 3, 3), torch.tensor([[5, 400, 900], [200, 600, 800]])
    gradients = []
    for enabled in (False, True):
        heads.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = heads({"mid": x}, t)["mid"]
        out.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in heads.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in heads.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_heads_compile_and_export():
    torch.manual_seed(0)
    heads = ProjectionHeads({"mid": 8}, depth=1)
    for p in heads.adapters.parameters():
        torch.nn.init.normal_(p, std=0.3)
    given = ({"mid": torch.randn(2, 8, 3, 3)}, torch.tensor([[5, 400], [200, 600]]))
    gradients = []
    for run in (heads, torch.compile(heads, fullgraph=True, backend="aot_eager")):
        heads.zero_grad()
        run(*given)["mid"].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in heads.parameters()]))
    torch.testing.assert_close(*gradients)
    exported = torch.export.export(heads, given).module()
    torch.testing.assert_close(exported(*given)["mid"], heads(*given)["mid"])


def test_a_block_keeps_its_input_and_its_up_projection_alone():
    """What the memory of the distillation rests on: 3 tensors of the input's size per block, not 6."""
    block = ResidualBlock(64, 64, FiLM(64, 8))
    x, condition = torch.randn(2, 100, 64, requires_grad=True), torch.randn(2, 8)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, condition)
    assert sum(size for size in kept.values() if size >= x.numel()) == 3 * x.numel()


def test_published_head_names():
    names = set(ProjectionHeads({"us3": 8}, conditioning="adarms").state_dict())
    assert {"time_emb.weight", "time_in_proj.weight", "mapping.in_norm.scale"} <= names
    for i in range(3):
        for part in ("norm.linear", "up_proj", "down_proj"):
            assert f"adapters.us3.layers.{i}.{part}.weight" in names


# --- loss ---


def test_timesteps_are_stratified():
    t = stratified_timesteps(4000, 3, torch.Generator().manual_seed(0))
    assert t.shape == (4000, 3) and t.dtype == torch.int64
    for i, (low, high) in enumerate([(1, 333), (334, 666), (667, 999)]):
        column = t[:, i]
        assert column.min() >= low and column.max() <= high
        assert column.min() < low + 5 and column.max() > high - 5
    assert stratified_timesteps(50, 2, None, 1, 400).max() <= 400


def test_map_losses():
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    cosines = [
        torch.dot(a[n, :, i, j], b[n, :, i, j]) / a[n, :, i, j].norm() / b[n, :, i, j].norm()
        for n in range(2)
        for i in range(3)
        for j in range(4)
    ]
    torch.testing.assert_close(map_loss(a, b), -torch.stack(cosines).mean())
    torch.testing.assert_close(map_loss(a, b, "l1"), (a - b).abs().mean())
    torch.testing.assert_close(map_loss(a, b, "l2"), (a - b).square().mean())
    with pytest.raises(ValueError, match="huber"):
        map_loss(a, b, "huber")


def distiller(maps, heads=True):
    torch.manual_seed(0)
    teacher, student = FeatureUNet.build(TEST.denoiser.config), FeatureUNet.build(TEST.denoiser.config)
    channels = {i.name: i.channels for i in student.infos if i.name in maps}
    head = ProjectionHeads(channels, depth=1) if heads else None
    if heads:
        for p in head.adapters.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return Distiller(teacher, student, DDPMScheduler(**TEST.schedule.config), maps, head)


def test_one_student_pass_serves_all_levels():
    """Equal loss and gradients to a student pass for every noise level, with as many passes as images."""
    module = distiller({"mid": 1.0, "us6": 3.0})
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 4, 16, 16)
    timesteps, prompt = torch.tensor([[1, 400, 999], [50, 500, 700]]), torch.randn(2, 3, 6)
    empty = torch.randn(1, 3, 6)
    passes = []
    module.student.conv_in.register_forward_hook(lambda m, a, o: passes.append(len(o)))
    total, each = module(latents, timesteps, noise, prompt, empty)
    total.backward()
    assert passes == [2] and set(each) == {"mid", "us6"}
    torch.testing.assert_close(total.detach(), (each["mid"] + 3 * each["us6"]) / 4)
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    losses = []
    for b in range(2):
        for i in range(3):
            t = timesteps[b : b + 1, i]
            noisy = module.scheduler.add_noise(latents[b : b + 1], noise[b : b + 1, i], t)
            with torch.no_grad():
                target = module.teacher(noisy, t, prompt[b : b + 1], ["mid", "us6"])
            guess = module.heads(module.student(latents[b : b + 1], module.timestep, empty, ["mid", "us6"]), t)
            losses.append((map_loss(guess["mid"], target["mid"]) + 3 * map_loss(guess["us6"], target["us6"])) / 4)
    plain = torch.stack(losses).mean()
    torch.testing.assert_close(plain, total, rtol=1e-4, atol=1e-5)
    plain.backward()
    assert gradients["timestep"].abs() > 0 and not any(n.startswith("teacher") for n in gradients)
    for n, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-5)


def test_teacher_stays_frozen():
    module = distiller({"mid": 1.0}).train()
    assert module.student.training and not module.teacher.training
    assert not any(p.requires_grad for p in module.teacher.parameters())


# --- recipe ---


def test_recipe_inherits_and_overrides():
    recipe = load_recipe(RECIPE, ["data.path=x", "output_dir=y", "max_steps=7", "heads.conditioning=adarms"])
    assert (recipe.data.path, recipe.output_dir, recipe.max_steps) == ("x", "y", 7)
    assert recipe.model == "cleandift_tiny" and recipe.timestep_levels == 3 and recipe.heads.conditioning == "adarms"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["colour=red"], "colour"),
        (["data.pfad=x"], "pfad"),
        (["max_steps=many"], "many"),
        (["max_steps=0"], "max_steps must be above 0, got 0"),
        (["loss=huber"], "loss must be one of cosine, l1, l2, got 'huber'"),
        (["text=image"], "text must be one of"),
        (["timestep_range=[500,100]"], "timestep_range"),
        (["timestep_range=[1]"], "timestep_range"),
        (["timestep_range=[1,2]"], "timestep_range"),
        (["maps={us6: -1}"], "weight above 0"),
        (["data.size=32"], "data.size must be at least 64"),
        (["model=resnet18"], "cleandift_tiny with dift_tiny.*got resnet18 with no teacher"),
        (["teacher=cleandift_tiny"], "got cleandift_tiny with cleandift_tiny"),
        (["model=cleandift_sd21", "teacher=dift_tiny"], "got cleandift_sd21 with dift_tiny"),
        (["max_steps"], "not field=value"),
        ([], "no value for data.path, output_dir"),
    ],
)
def test_bad_recipes(overrides, message):
    given = overrides if not overrides else ["data.path=x", "output_dir=y", *overrides]
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE, given)
