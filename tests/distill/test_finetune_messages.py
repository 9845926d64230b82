"""What `cleandift finetune` prints: its fields, a header, warnings, a footer, and its refusals."""

import re
import shlex

import pytest
import timm
from finetune_runs import RECIPE, ROOT, arguments, refused
from PIL import Image
from safetensors import safe_open

from cleandift_backbones.cli.finetune import main
from cleandift_backbones.distill import setup
from cleandift_backbones.distill.recipe import field_names, load_recipe
from cleandift_backbones.utils.errors import MissingFileError
from tools.tiny.make_scenes import main as make_scenes

SD21 = str(ROOT / "configs/finetune/cleandift_sd21.yaml")
SAMPLES = ROOT / "cleandift_backbones/assets/samples"
FEW = ["max_steps=1", "heads.depth=0", "maps=us3,mid"]


def said(capsys, pictures, out, *overrides):
    assert main(arguments(pictures, out, *FEW, *overrides)) == 0
    return capsys.readouterr()


def test_a_run_says_what_it_does_and_what_came_out(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    before, after = said(capsys, pictures, out, "text=distilled").out.split("output: ")
    assert "loading dift_tiny" in before and len(before.splitlines()) <= 8
    assert "model: cleandift_tiny, a student of dift_tiny" in before and "maps us3, mid" in before
    assert re.search(r"student \(\d+,\d+,\d+ parameters\)", before)
    assert "data: 11 images, 11 with captions; 1 held out for validation" in before
    assert "input: 64 px, center crop; text=distilled" in before
    assert "run: to step 1, batch size 2; CPU" in before and "float32" in before
    assert after.startswith(f"{out} with log.jsonl, native/ at the end, and checkpoints/ (2 of ")
    assert re.search(r"validation loss: -?0\.\d+ -> -?0\.\d+; learned timestep 26\d\.\d\d; \d min \d+ s", after)
    assert f"wrote {out}/native after 1 step;" in after
    (line,) = (line for line in after.splitlines() if line.startswith("load it: "))
    model = eval(line.removeprefix("load it: import timm, cleandift_backbones; "), {"timm": timm})
    assert model.feature_info


def test_the_size_of_checkpoints_is_said_and_is_that_of_trained_weights(pictures, tmp_path, capsys):
    """With an average: weights, average and two moments, in float32; nothing of the teacher."""
    text = said(capsys, pictures, tmp_path / "run", "ema=0.9").out
    trained = int(re.search(r"student \(([\d,]+) parameters", text)[1].replace(",", "")) + 1
    (file,) = (tmp_path / "run/checkpoints").iterdir()
    assert f"(2 of {16 * trained / 1e6:.0f} MB)" in text
    assert file.stat().st_size == pytest.approx(16 * trained, rel=0.01)
    assert f"({file.stat().st_size / 1e6:.0f} MB in " in text
    with safe_open(file, "pt") as tensors:
        assert {name.split("/")[0] for name in tensors.keys()} == {"model", "ema", "optimizer"}  # noqa: SIM118


def test_warnings(pictures, tmp_path, caplog, capsys):
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (40, 30)).save(one / "a.png")
    said(capsys, one, tmp_path / "run", "text=distilled")
    assert "1 of 1 validation image are also trained on" in caplog.text and "data.heldout=FOLDER" in caplog.text
    assert "1 of 1 image looked at are smaller than 64 px, and are enlarged" in caplog.text
    assert "text=distilled, but no image has a caption" in caplog.text
    caplog.clear()
    said(capsys, pictures, tmp_path / "fine", "text=distilled")
    assert not caplog.text
    said(capsys, pictures, tmp_path / "both", f"data.heldout={pictures}")
    assert "12 of 12 validation images are also trained on" in caplog.text


def test_fields_come_with_what_they_are(capsys):
    assert main([RECIPE, "--fields"]) == 0
    text = capsys.readouterr().out
    lines = [line.split("  # ") for line in text.splitlines()]
    assert [given.partition("=")[0] for given, _ in lines] == field_names() and len(lines) > 50
    assert all(len(about) > 7 for _, about in lines)
    assert re.search(r"^max_steps=559 +# steps of the run \(default: 400\)$", text, re.M)
    assert re.search(r"^clip=1.0 +# largest norm of the gradient; 0: any$", text, re.M)


@pytest.mark.parametrize("maps", ["us6", "us6,us3", "[us6,us3]", "{us6: 1, us3: 2}"])
def test_forms_of_maps(maps, tmp_path):
    base = tmp_path / "base.yaml"  # maps of a recipe are replaced
    base.write_text(f"base: {RECIPE}\nmaps: {{us9: 1}}\n")
    found = load_recipe(base, ["data.path=x", "output_dir=y", f"maps={maps}"]).maps
    assert found == ({"us6": 1, "us3": 2} if "{" in maps else dict.fromkeys(["us6", *["us3"] * ("us3" in maps)], 1.0))


def test_the_teacher_follows_the_model(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: cleandift_sd21\nteacher: dift_sd21\n")
    for recipe in (SD21, mine):
        assert load_recipe(recipe, ["data.path=x", "output_dir=y"]).teacher == "dift_sd21"
        found = load_recipe(recipe, ["data.path=x", "output_dir=y", "model=cleandift_tiny"])
        assert found.teacher == "dift_tiny"


@pytest.mark.parametrize(
    "given, message",
    [
        (["--max_steps", "5"], "fields of the recipe are given without dashes, max_steps=5"),
        (["--max-steps=5"], "fields of the recipe are given without dashes, max_steps=5"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["max_stepss=5"], "there is no field max_stepss; did you mean max_steps?"),
        (["data.pth=5"], "there is no field data.pth; did you mean data.path?"),
        (["max_steps=many"], "max_steps: Value 'many'"),
        (["maps={us6: 1"], "override 'maps={us6: 1' is not YAML"),
        (["maps=us99"], "us99"),
        (
            ["cache_dir=x"],
            "data.background is random in this recipe: add data.background=white, or leave out cache_dir",
        ),
    ],
)
def test_refusals_say_what_to_write(given, message, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([RECIPE, f"data.path={pictures}", f"output_dir={tmp_path / 'run'}", "device=cpu", *given])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and not (tmp_path / "run").exists(), text


def test_recipes_that_are_none(tmp_path, capsys):
    loop = tmp_path / "loop.yaml"
    loop.write_text("base: loop.yaml\n")
    for text, message in (
        ("base: loop.yaml", "its base leads back to it"),
        ("- 1\n- 2", "expected fields and values"),
        ("model: {", "mine.yaml"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "mine.yaml"), "data.path=x", "output_dir=y"])
        text = capsys.readouterr().err
        assert stop.value.code == 2 and message in text, text


def test_missing_weights_name_the_field(pictures, tmp_path, capsys, hub, offline):
    offline()
    with pytest.raises(SystemExit) as stop:
        main([SD21, f"data.path={pictures}", f"output_dir={tmp_path / 'run'}", "device=cpu"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "Give teacher_weights=FOLDER" in text and "create_model" not in text, text
    assert len(text.strip().splitlines()) == 1


def test_memory_that_runs_out(pictures, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(setup.Distiller, "forward", full)
    refused(pictures, tmp_path / "run", capsys, "out of memory; set gradient_checkpointing=true")


def test_an_output_folder_that_takes_nothing(pictures, tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(pictures, tmp_path / "file", capsys, "give another folder")


# --- the documentation ---


def documented():
    """Every command line of `cleandift finetune` in the documentation."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in re.findall(r"^(?:cleandift |.*cleandift_backbones\.cli\.)finetune (.*)$", page.read_text(), re.M):
            if "--fields" not in line:
                yield pytest.param(shlex.split(line), id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("words", list(documented()))
def test_documented_commands_are_recipes_that_stand(words, monkeypatch):
    found = []
    monkeypatch.setattr("cleandift_backbones.distill.train.distill", lambda recipe: found.append(recipe) or 0)
    assert main(words) == 0 and found[0].output_dir.startswith("runs/")


def test_the_first_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """They run as they stand, in a fresh clone; here for two steps."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "docs/finetune.md").read_text(), re.S)[1]
    install, scenes, train = (shlex.split(line) for line in block.strip().splitlines())
    assert install[0] == "pip" and scenes[1] == "tools/tiny/make_scenes.py" and train[:2] == ["cleandift", "finetune"]
    monkeypatch.chdir(tmp_path)
    assert make_scenes([*scenes[2:], "--train", "4", "--val", "2"]) == 0
    assert main([*train[2:], "max_steps=2", "batch_size=2", "num_workers=0"]) == 0
    text = capsys.readouterr().out
    assert "data: 4 images, 0 with captions; 2 held out" in text
    assert 'timm.create_model("local-dir:runs/first/native"' in text


# --- packaged recipes, and the options that other commands have too ---


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["data.path=x", "output_dir=y"]
    assert load_recipe("cleandift_tiny", given) == load_recipe(ROOT / "configs/finetune/cleandift_tiny.yaml", given)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.yaml").write_text("base: cleandift_sd21_lora\nlora: {rank: 3}")
    mine = load_recipe("folder/mine.yaml", given)
    assert mine.model == "cleandift_sd21" and mine.lora.rank == 3
    (tmp_path / "cleandift_tiny.yaml").write_text("model: cleandift_sd15")
    assert load_recipe("cleandift_tiny.yaml", given).model == "cleandift_sd15"  # a file comes first
    with pytest.raises(MissingFileError, match="recipe tiny does not exist.*packaged one: base, cleandift_sd15"):
        load_recipe("tiny", given)


def test_options_are_fields(monkeypatch):
    found = []
    monkeypatch.setattr("cleandift_backbones.distill.train.distill", lambda recipe: found.append(recipe) or 0)
    words = ["--data", "a: b", "--out", "#x", "--map", "us6,us3", "--dtype", "bfloat16", "--timesteps", "100"]
    assert main(["cleandift_sd21", *words, "--weights", "w", "--device", "cpu", "max_steps=7"]) == 0
    (recipe,) = found
    assert (recipe.data.path, recipe.output_dir, recipe.student_weights) == ("a: b", "#x", "w")
    assert recipe.maps == {"us6": 1, "us3": 1} and recipe.mixed_precision == "bf16" and recipe.timestep == 100
    assert recipe.device == "cpu" and recipe.max_steps == 7
