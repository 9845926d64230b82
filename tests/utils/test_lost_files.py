"""Nothing is lost: files of others stay, damaged files are kept aside, and an I/O error removes nothing."""

import errno
from contextlib import contextmanager

import pytest
import safetensors
import torch
from disk_faults import contents, no_more_files
from safetensors.torch import save_file
from test_eval_features import items, passes, resnet  # noqa: F401

from cleandift_backbones.data.batches import DecodeOptions
from cleandift_backbones.data.sources import ImageSource
from cleandift_backbones.distill.cache import LatentCache
from cleandift_backbones.distill.checkpoint import Checkpoints
from cleandift_backbones.evaluation.features import FeatureStores
from cleandift_backbones.utils.errors import FileError


@pytest.fixture(params=["limit", "device", "older"])
def broken_disk(request, monkeypatch):
    """A context in which no file can be opened, as the system or safetensors tells it; older ones say "missing"."""

    @contextmanager
    def context():
        if request.param == "limit":
            with no_more_files():
                yield
            return

        def failing(path, *_args, **_kwargs):
            if request.param == "device":
                raise OSError("No such device (os error 19)")
            raise FileNotFoundError(f"No such file or directory: {path}")

        with monkeypatch.context() as patch:
            patch.setattr(safetensors, "safe_open", failing)
            for module in ("checkpoints.formats",):  # where it was opened before
                patch.setattr(f"cleandift_backbones.{module}.safe_open", failing, raising=False)
            yield

    return context


# --- evaluation's cache ---


def test_files_of_others_in_the_evaluations_cache(items, passes, tmp_path):  # noqa: F811
    messages = []
    stores = FeatureStores(tmp_path / "cache", 2, progress=False, log=messages.append)
    stores.features(resnet(), items[:3])
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "my_head.safetensors").write_bytes(b"not ours")
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    before = {name: data for name, data in contents(folder).items() if name != "index.jsonl"}
    assert len(stores.features(resnet(), items)["layer2"]) == 5
    assert sum(passes) == 5 and before.items() <= contents(folder).items()
    assert sum("holds other files, which are not read: my_head.safetensors, other" in text for text in messages) == 1


def test_damage_in_the_evaluations_cache_is_kept_aside(items, passes, tmp_path):  # noqa: F811
    messages = []
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=messages.append)
    stores.features(resnet(), items)
    (path,) = (tmp_path / "cache").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    stores.features(resnet(), items)
    assert sum(passes) == 10 and f"kept as {path.name}.damaged, its features are computed again" in messages[0]
    assert len(path.with_name(f"{path.name}.damaged").read_bytes()) == 100


def test_an_io_error_in_the_evaluations_cache(items, passes, tmp_path, broken_disk):  # noqa: F811
    stores = FeatureStores(tmp_path / "cache", 8, progress=False, log=print)
    stores.features(extractor := resnet(), items)
    before = contents(tmp_path / "cache")
    with broken_disk(), pytest.raises(FileError, match="cannot be"):
        stores.features(extractor, items)
    assert contents(tmp_path / "cache") == before
    assert len(stores.features(extractor, items)["layer2"].stack(range(5))) == 5


# --- checkpoints of a run ---


def saved(folder, *steps, keep=2):
    kept = Checkpoints(folder, keep)
    for step in steps:
        assert kept.save(step, {"x": torch.full((2,), float(step))}, {"step": step})
    return kept


def test_checkpoints_of_others_stay(tmp_path, caplog):
    save_file({"lora": torch.zeros(2)}, tmp_path / "step_0000009.safetensors")
    save_file({"lora": torch.zeros(2)}, tmp_path / "step_0000002.safetensors")
    for name in ("step_5.safetensors", ".step_mine.part", "step_0000001.safetensors.bak"):
        (tmp_path / name).write_bytes(b"not ours")
    before = contents(tmp_path)
    kept = Checkpoints(tmp_path, keep=2)
    assert kept.load() is None and "step_0000009.safetensors is no checkpoint of a run" in caplog.text
    saved(tmp_path, 1, 2, 3, 4)
    found = contents(tmp_path)
    assert found.pop("step_0000002.safetensors.other") == before.pop("step_0000002.safetensors")
    assert before.items() <= found.items()
    assert set(found) - set(before) == {"step_0000003.safetensors", "step_0000004.safetensors"}
    assert kept.load()[1] == {"step": 4}


def test_damaged_checkpoints_are_kept_aside(tmp_path, caplog):
    kept = saved(tmp_path, 3, 4)
    kept.path(4).write_bytes(b"cut")
    assert kept.load()[1] == {"step": 3} and "is passed over for an older one, and kept as" in caplog.text
    assert (tmp_path / "step_0000004.safetensors.damaged").read_bytes() == b"cut"
    saved(tmp_path, 4)
    kept.path(4).write_bytes(b"cut again")
    kept.load()
    assert (tmp_path / "step_0000004.safetensors.damaged-2").read_bytes() == b"cut again"


def test_an_io_error_stops_a_resumed_run(tmp_path, broken_disk):
    """Not from an older checkpoint, nor from the beginning."""
    kept = saved(tmp_path, 3, 4)
    before = contents(tmp_path)
    with broken_disk(), pytest.raises(FileError, match="cannot be read"):
        kept.load()
    assert contents(tmp_path) == before and kept.load()[1] == {"step": 4}


def test_an_io_error_while_tensors_are_read(tmp_path, monkeypatch):
    kept = saved(tmp_path, 3)
    before = contents(tmp_path)

    def failing(_tensors):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("cleandift_backbones.checkpoints.save.checksum", failing)
    with pytest.raises(FileError, match="step_0000003.safetensors cannot be read .Input/output error"):
        kept.load()
    assert contents(tmp_path) == before


# --- latents ---


@pytest.fixture
def latents(pictures, tmp_path):
    folder = tmp_path / "latents"
    cache = LatentCache(folder, {"a": 1})
    images = [ImageSource(path.name, str(path)) for path in sorted(pictures.glob("*.png"))[:3]]

    def fill():
        computed = []

        def encode(batch):
            computed.append(len(batch) // 2)
            return [torch.zeros(len(batch), 4, 2, 2)]

        cache.fill(images, DecodeOptions(64), encode, lambda texts: torch.zeros(len(texts), 3, 5), show=False)
        return sum(computed)

    assert fill() == 3
    return cache, images, fill


def test_damaged_latents_are_kept_aside(latents, caplog):
    cache, images, fill = latents
    path = cache.path(images[0])
    path.write_bytes(b"cut")
    other = cache.path(images[1])
    save_file({"x": torch.zeros(2)}, other)
    before = other.read_bytes()
    assert fill() == 2 and caplog.text.count("computed again") == 2
    assert path.with_name(f"{path.name}.damaged").read_bytes() == b"cut"
    assert other.with_name(f"{other.name}.damaged").read_bytes() == before


def test_an_io_error_computes_no_latents_again(latents, broken_disk):
    cache, images, fill = latents
    before = contents(cache.folder)
    with broken_disk(), pytest.raises(FileError, match="cannot be read"):
        cache.missing(images)
    assert contents(cache.folder) == before and fill() == 0


def test_a_readme_in_the_folder_of_latents_stays(pictures, tmp_path):
    (tmp_path / "README.txt").write_text("mine")
    cache = LatentCache(tmp_path, {})
    cache.fill([], DecodeOptions(64), None, None, show=False)
    assert (tmp_path / "README.txt").read_text() == "mine"


# --- folders that runs write to ---


def test_a_recipe_and_a_log_of_others_are_kept(tmp_path, caplog, capsys):
    from finetune_runs import RECIPE

    from cleandift_backbones.distill.recipe import load_recipe, save_recipe
    from cleandift_backbones.distill.tracking import JsonLog

    path, log = tmp_path / "recipe.yaml", tmp_path / "log.jsonl"
    path.write_text("base: mine  # with a comment\n")
    log.write_text("what I did on Monday\n")
    recipe = load_recipe(RECIPE, [f"data.path={tmp_path}", f"output_dir={tmp_path}"])
    for _ in range(2):
        save_recipe(recipe, path)
        tracker = JsonLog(log, 0)
        tracker.start()
        tracker.log({"loss": 2.0}, 1)
    assert (tmp_path / "recipe.yaml.other").read_text().startswith("base: mine")
    assert (tmp_path / "log.jsonl.other").read_text() == "what I did on Monday\n"
    assert "recipe.yaml was not written by a run: kept as recipe.yaml.other" in caplog.text
    assert "log.jsonl was not written by a run: kept as log.jsonl.other" in capsys.readouterr().err
    assert load_recipe(str(path), []) == recipe and len(list(tmp_path.iterdir())) == 4


def test_weights_of_others_are_not_replaced(tmp_path):
    """A folder with the names that this package writes, but from another program."""
    from cleandift_backbones.checkpoints import check_replaceable
    from cleandift_backbones.checkpoints.save import write_file
    from cleandift_backbones.utils.errors import FileTakenError

    for names in (["README.md"], ["config.json", "model.safetensors"], ["notes.txt"]):
        folder = tmp_path / names[-1]
        folder.mkdir()
        for name in names:
            save_file({"x": torch.zeros(2)}, folder / name)
        with pytest.raises(FileTakenError, match=f"holds other files .{names[0]}.*, which were not written by"):
            check_replaceable(folder)
    own = tmp_path / "own"
    own.mkdir()
    check_replaceable(own)
    write_file({"x": torch.zeros(2)}, own / "model.safetensors", None)
    (own / "config.json").write_text("{}")
    check_replaceable(own)
    check_replaceable(tmp_path / "nowhere")


def test_a_native_folder_with_files_of_others_stops_a_training_at_once(pictures, tmp_path, capsys):
    from finetune_runs import refused

    theirs = tmp_path / "run/native/thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    refused(pictures, tmp_path / "run", capsys, "native holds other files (thesis.txt)")
    assert contents(tmp_path) == {"run/native/thesis.txt": b"mine"}


def test_what_lies_in_a_trainers_folders_stays(tmp_path):
    """The parts of a pipeline replace those of an earlier export, not what lies beside them."""
    from tools.tiny.train_teacher import export

    class Part(torch.nn.Linear):
        pass

    class Pipeline:
        def __init__(self, **parts):
            self.__dict__.update(parts)

        def save_pretrained(self, folder):
            for name in ("unet", "tokenizer"):
                (folder / name).mkdir()
            for name in ("model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
                (folder / name).write_text("{}")

    pipeline = Pipeline(**{name: Part(1, 1) for name in ("unet", "vae", "text_encoder")}, tokenizer=1, scheduler=1)
    for name in ("unet/mine", "unet/config.json", "mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.tiny.train_teacher.build_pipeline", Pipeline)
        export(pipeline, torch.float32, tmp_path)
    found = contents(tmp_path)
    assert found["mine"] == found["unet/mine"] == b"mine" and found["unet/config.json"] == b"{}"
    assert set(found) == {
        "mine",
        "unet/mine",
        "unet/config.json",
        "tokenizer/tokenizer_config.json",
        "model_index.json",
    }


def test_scenes_are_not_written_among_others(tmp_path, capsys):
    from tools.tiny.make_scenes import main

    theirs = tmp_path / "coco/images/train/cat.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "coco"), "--train", "1", "--val", "1", "--size", "64"])
    assert "holds other files (images/train/cat.png)" in capsys.readouterr().err
    assert contents(tmp_path) == {"coco/images/train/cat.png": b"mine"}


def test_a_damaged_row_of_the_emoji_suite_is_told_apart(tmp_path, broken_disk):
    from cleandift_backbones.evaluation.report import Row
    from cleandift_backbones.utils.atomic import DamagedFileError

    path = tmp_path / "row.safetensors"
    Row("a", "clean", {}).save(path)
    with broken_disk(), pytest.raises(FileError):
        Row.load(path)
    assert Row.load(path).label == "a"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFileError):
        Row.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DamagedFileError, match="row.safetensors is damaged: not a row"):
        Row.load(path)


@pytest.mark.parametrize("name", ["retrieval.md", "retrieval.png", "retrieval.json"])
def test_results_do_not_replace_files_of_others(tmp_path, capsys, name):
    """The default --out is a folder called results, which may well exist."""
    from PIL import Image

    from cleandift_backbones.cli.evaluate import main

    for number in range(4):
        path = tmp_path / "data" / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * number, 9, 9)).save(path)
    words = ["retrieval", "--model", "pixels", "--data", str(tmp_path / "data"), "--k", "1"]
    words += ["--out", str(tmp_path / "results")]
    theirs = tmp_path / "results" / name
    theirs.parent.mkdir()
    theirs.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and f"{name} was not written by an evaluation" in capsys.readouterr().err
    assert contents(tmp_path / "results") == {name: b'{"mine": 1}'}
    theirs.unlink()
    for _ in range(2):
        main(words)


def test_metadata_of_others_is_not_replaced(tmp_path):
    """A data set of JPEGs with captions, in the layout of tools/tiny/make_pictures.py."""
    from tools.tiny.make_pictures import PictureError, check_folder

    path = tmp_path / "train/metadata.jsonl"
    path.parent.mkdir()
    path.write_text('{"file_name": "a.jpg", "text": "mine"}\n')
    with pytest.raises(PictureError, match="metadata.jsonl was not written by this command"):
        check_folder(tmp_path, set(), 64, overwrite=True)
    path.write_text('{"file_name": "a.png", "text": "a", "style": "b", "concept": "c", "family": "c"}\n')
    assert check_folder(tmp_path, set(), 64, overwrite=True) == set()


def test_adapters_of_others_are_kept(tmp_path, caplog):
    from cleandift_backbones.checkpoints.save import keep_other, save_native

    path = tmp_path / "lora.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    before = path.read_bytes()
    for _ in range(2):
        keep_other(path)
        save_native({"x": torch.zeros(2)}, path)
    assert "kept as lora.safetensors.other" in caplog.text
    assert (tmp_path / "lora.safetensors.other").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
