"""Pictures, features kept, and the three results: what the page shows, and what three lines of Python make."""

import io
import threading
from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from picture_bytes import encoded
from PIL import Image
from safetensors.torch import load

from cleandift_backbones.data.images import ImageError
from cleandift_backbones.features.extractor import ModelError, extract, load_extractor
from cleandift_backbones.features.model_names import map_names
from cleandift_backbones.publish.card import save_folder
from cleandift_backbones.visualize import compare, maps, match
from cleandift_backbones.visualize import features as extracting
from cleandift_backbones.visualize.feature_maps import SHOWS, _otsu, alike, foreground, segments
from cleandift_backbones.visualize.features import Cancelled, FeatureProvider, Spec
from cleandift_backbones.visualize.memory import Entry, FeatureStore
from cleandift_backbones.visualize.pictures import LARGEST, open_picture, sample_names

PAIR = ["nerd-face_noto.png", "nerd-face_twemoji.png"]
EYE, ITS_PAIR = (0.3, 0.41), (0.321, 0.39)  # 1F913's left eyes, evaluation/emoji_eyes.json


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_hundred_megapixels_are_scaled_down_and_said_so():
    picture = open_picture(encoded(Image.new("L", (10_000, 10_000), 90), compress_level=1), "huge.png")
    assert picture.image.size == (LARGEST, LARGEST) and picture.image.mode == "RGB"
    assert picture.note == "scaled down from 10000 x 10000 (100 megapixels) to 1024 x 1024"


def test_animated_and_transparent_pictures_are_said_to_be():
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue", "green")]
    moving = open_picture(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "moving.gif")
    assert moving.note == "animated: its first frame" and moving.image.getpixel((9, 9))[0] > 200
    both = open_picture(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:2]), "phone.jpg")
    assert both.note == "the first of its 2 pictures"
    clear = open_picture(encoded(Image.new("RGBA", (80, 80), (0, 0, 0, 0))), "clear.png")
    assert clear.note == "transparent: drawn on grey" and clear.image.getpixel((9, 9)) == (224, 224, 224)
    assert open_picture(encoded(Image.new("RGBA", (80, 80), (9, 9, 9, 255))), "screenshot.png").note == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_damage_behind_the_first_picture_does_no_harm(kind):
    frames = [Image.effect_noise((64, 64), sigma) for sigma in (20, 60)]
    whole = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    opened = 0
    for place in range(len(whole) // 2, len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes(8) + whole[place + 8 :]):
            with suppress(ImageError):
                opened += open_picture(damaged, "mine").image.size == (64, 64)
    assert opened > len(whole) // 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.4 not a picture", "mine.png: not an image"),
        (b"", "mine.png: the file is empty"),
        (encoded(Image.new("RGB", (30, 90))), "both sides must be at least 64"),
        (encoded(Image.new("L", (64, 20_000))), "mine.png: too long and narrow"),
        (encoded(Image.effect_noise((90, 90), 50))[:200], "mine.png: truncated or damaged"),
        (encoded(Image.new("1", (20_000, 20_000))), "mine.png: too large to be safe"),
        (encoded(Image.new("RGB", (90, 90)), "EPS"), "mine.png: not an image"),  # would be run by Ghostscript
    ],
)
def test_what_is_no_usable_picture_is_named(content, words):
    with pytest.raises(ImageError, match=words):
        open_picture(content, "mine.png")


def test_samples_go_by_name_and_files_first(tmp_path, monkeypatch):
    assert {*PAIR, "cat_photo.jpg"} <= set(sample_names())
    ours = open_picture(PAIR[0])
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 70), "red").save(PAIR[0])
    assert open_picture(PAIR[0]).key != ours.key
    with pytest.raises(ImageError, match="no such file"):
        open_picture("../samples/" + PAIR[1])
    assert open_picture(Image.new("RGB", (70, 70)).tobytes() and encoded(ours.image), "again.png").key == ours.key


# --- features kept ---------------------------------------------------------------------------------------------------


def entry(megabytes=1):
    return Entry({"us6": torch.zeros(megabytes << 18)}, 0.1)


def test_store_is_bounded_and_drops_the_longest_unused():
    store = FeatureStore(3 << 20)
    for key in "abc":
        store.put(key, entry(), "me")
    store.get("a", "me")
    store.put("d", entry(), "me")
    assert store.size == 3 << 20 and store.get("b", "me") is None and store.get("a", "me") is not None
    store.put("too large", entry(4), "me")
    assert store.get("too large", "me") is None and store.size <= store.limit


def test_entries_go_with_the_last_of_their_owners():
    store = FeatureStore(1 << 30)
    store.put("shared", entry(), "one")
    store.put("own", entry(), "one")
    store.get("shared", "two")
    store.forget("one")
    assert store.get("own", "two") is None and store.get("shared", "two") is not None
    store.forget("two")
    assert len(store) == 0


def test_features_equal_the_evaluations_and_are_computed_once(monkeypatch):
    features, count = FeatureProvider(), []
    forward = extracting._forward
    monkeypatch.setattr(extracting, "_forward", lambda *args: count.append(1) or forward(*args))
    pictures = [open_picture(name) for name in PAIR]
    computed = features.compute(Spec("cleandift_tiny"), pictures, "one")
    reference = extract(load_extractor("cleandift_tiny", None, size=128), [p.image for p in pictures], 1, False)
    for i, found in enumerate(computed):
        assert list(found.maps) == list(reference) and found.seconds > 0
        for name, x in found.maps.items():
            assert torch.equal(x, reference[name][i])
    again = features.compute(Spec("cleandift_tiny"), pictures[::-1], "two")
    assert len(count) == 2 and again[0] is computed[1]
    assert features.kept(Spec("cleandift_tiny"), pictures, "two") and not features.kept(
        Spec("cleandift_tiny", "cat face"), pictures, "two"
    )


def test_noise_is_that_of_the_timestep_and_of_the_picture(features):
    pictures = [open_picture(name) for name in PAIR]
    computed = features.compute(Spec("dift_tiny", "", 100, 2), pictures)
    for seed, (picture, found) in enumerate(zip(pictures, computed)):
        model = load_extractor("dift_tiny", "us6", size=128, timestep=100, ensemble_size=2, noise_seed=seed)
        torch.testing.assert_close(found.maps["us6"], extract(model, [picture.image], 1, False)["us6"][0])


def test_a_prompt_changes_features_and_is_taken_back(features):
    pictures = [open_picture(PAIR[0])]
    plain = features.compute(Spec("cleandift_tiny"), pictures)[0].maps["us6"]
    told = features.compute(Spec("cleandift_tiny", "nerd face"), pictures)[0].maps["us6"]
    model = timm.create_model("cleandift_tiny", pretrained=True, features_only=True, out_indices=(4,),
                              prompt="nerd face").eval()  # fmt: skip
    x = F.interpolate(torch.from_numpy(np.array(pictures[0].image)).permute(2, 0, 1)[None] / 255, (128, 128),
                      mode="bicubic", antialias=True)  # fmt: skip
    with torch.inference_mode():
        torch.testing.assert_close(told, model(x.clamp(0, 1) * 2 - 1)[0][0], atol=5e-4, rtol=1e-3)
    assert not torch.equal(plain, told)
    features.store.forget(None)
    assert torch.equal(features.compute(Spec("cleandift_tiny"), pictures)[0].maps["us6"], plain)


def test_work_can_be_watched_and_stopped_inside_a_forward_pass():
    features, shares = FeatureProvider(), []

    def watch(share, doing):
        shares.append(share)
        if share > 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        features.compute(Spec("cleandift_tiny"), [open_picture(PAIR[0])], "me", watch)
    assert len(shares) > 1 and shares == sorted(shares) and len(features.store) == 0
    everything = []
    pair = [open_picture(name) for name in PAIR]
    features.compute(Spec("cleandift_tiny"), pair, "me", lambda share, doing: everything.append(share))
    assert everything == sorted(everything) and everything[-1] == 1.0
    model = features._models["cleandift_tiny"].extractor.model
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_loads_can_be_left_and_holds_nobody_else_up(monkeypatch):
    """Loading cannot be interrupted: it is left alone, at once, and its model is there for the next who wants it."""
    features, picture, go, loads = FeatureProvider(), [open_picture(PAIR[0])], threading.Event(), []
    features.compute(Spec("cleandift_tiny"), picture)
    load = extracting.load_extractor

    def slow(*args, **kwargs):
        loads.append(args[0])
        assert go.wait(60)
        return load(*args, **kwargs)

    monkeypatch.setattr(extracting, "load_extractor", slow)

    def watch(share, doing):
        if doing == "loading" and loads:
            raise Cancelled

    for _ in range(2):  # the second waits for the first's turn
        with pytest.raises(Cancelled):
            features.compute(Spec("dift_tiny", "", 100, 1), picture, "me", watch)
    assert features.compute(Spec("cleandift_tiny"), [open_picture(PAIR[1])])[0].seconds > 0
    go.set()
    assert features.compute(Spec("dift_tiny", "", 100, 1), picture)[0].seconds > 0 and loads == ["dift_tiny"]


def test_weights_that_are_missing_cost_no_model_that_is_there(features, hub, offline):
    offline()
    picture = [open_picture(PAIR[0])]
    for spec in (Spec("cleandift_tiny"), Spec("dift_tiny", "", 100, 1)):
        features.compute(spec, picture)
    with pytest.raises(ModelError):
        features.compute(Spec("cleandift_sd21"), picture)
    assert set(features._models) == {"cleandift_tiny", "dift_tiny"}


def test_a_folder_of_weights_is_known_by_what_it_holds(tmp_path, features, monkeypatch):
    """Its size, noise and noisy twin are those of its architecture; the three lines of Python name the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("cleandift_tiny", "dift_tiny"):
        save_folder(timm.create_model(name, pretrained=True, features_only=True), name)
    clean, noisy = "local-dir:cleandift_tiny", "local-dir:dift_tiny"
    mine = compare([PAIR[0]], [(0, *EYE)], clean, timestep=50, ensemble_size=2, features=features)
    known = compare([PAIR[0]], [(0, *EYE)], "cleandift_tiny", timestep=50, ensemble_size=2, features=features)
    assert mine.noisy.match.spec.model == "dift_tiny" and f"model='{clean}'" in mine.recipe()
    torch.testing.assert_close(mine.clean.match.similarity, known.clean.match.similarity, atol=1e-4, rtol=0)
    folder, name = (match([PAIR[0]], [(0, *EYE)], m, timestep=50, ensemble_size=2, features=features)
                    for m in (noisy, "dift_tiny"))  # fmt: skip
    assert folder.spec.timestep == 50
    torch.testing.assert_close(folder.similarity, name.similarity, atol=1e-4, rtol=0)
    assert "us9" in map_names(clean) and "us10" not in map_names(clean)  # saved only as deep as us9
    with pytest.raises(ModelError, match="local-dir:nothing cannot be built: Config file not found: nothing"):
        match([PAIR[0]], [(0, *EYE)], "local-dir:nothing")


def test_missing_weights_are_told_with_the_remedy(hub, offline):
    offline()
    with pytest.raises(ModelError) as caught:
        FeatureProvider().compute(Spec("cleandift_sd21"), [open_picture(PAIR[0])])
    told = extracting.how_to_get(caught.value)
    assert "not in the cache" in told and "`cleandift convert cleandift_sd21 --out FOLDER`" in told


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_click_on_an_eye_finds_the_eye(features):
    result = match(PAIR, [(0, *EYE)], features=features)
    assert (result.found[0, 1] - torch.tensor(ITS_PAIR)).norm() < 0.1
    assert (result.found[0, 0] - torch.tensor(EYE)).norm() < 0.05 and result.mutual[0].all()


def test_match_equals_a_plain_search(features):
    names, points = [*PAIR, "cat_photo.jpg"], [(0, *EYE), (2, 0.38, 0.37), (0, 0.5, 0.99)]
    result = match(names, points, map="us8", features=features)
    own = [e.maps["us8"] for e in features.compute(Spec("cleandift_tiny"), result.pictures)]
    sizes = [(256, 256), (256, 256), (170, 256)]
    upsampled = [F.interpolate(m[None], s, mode="bilinear")[0] for m, s in zip(own, sizes)]

    def cosine(source, target, x, y):
        return F.cosine_similarity(upsampled[source][:, y, x, None, None], upsampled[target], dim=0)

    def pixel(fractions, size):
        return [round(max(0, f * side - 0.5)) for f, side in zip(fractions, size[::-1])]

    for p, (source, *xy) in enumerate(points):
        x, y = pixel(xy, sizes[source])
        for n in range(3):
            expected = cosine(source, n, x, y)
            torch.testing.assert_close(result.similarity[n][p], expected, atol=1e-4, rtol=0)
            there_x, there_y = pixel(result.found[p, n].tolist(), sizes[n])
            assert expected[there_y, there_x] > expected.max() - 1e-5  # at the edge several places are equal
            back_y, back_x = divmod(int(cosine(n, source, there_x, there_y).argmax()), sizes[source][1])
            cell = (sizes[source][1] / own[source].shape[2], sizes[source][0] / own[source].shape[1])
            assert result.mutual[p, n] == (abs(back_x - x) <= cell[0] and abs(back_y - y) <= cell[1])


def test_heats_of_a_point_can_be_compared(features):
    result = match([PAIR[0], PAIR[1], "cat_photo.jpg"], [(0, *EYE)], features=features)
    low, high = (
        float(getattr(torch.cat([s[0].flatten() for s in result.similarity[1:]]), end)()) for end in ("min", "max")
    )
    for n in (1, 2):
        torch.testing.assert_close(result.heat(0, n), (result.similarity[n][0] - low) / (high - low))
    assert result.heat(0, 1).max() == 1 and result.heat(0, 2).max() < 0.9  # a photograph has no such eye


def test_only_mutual_matches_are_drawn_if_wished(features):
    names, points = [*PAIR, "cat-face_noto.png"], [(0, 0.5, 0.66), (0, *EYE)]
    everything, mutual = (match(names, points, mutual_only=wish, features=features) for wish in (False, True))
    assert torch.equal(everything.found, mutual.found) and not mutual.mutual.all() and mutual.mutual.any()
    for n in range(3):
        kept = [mark for mark in everything.marks(n) if everything.mutual[mark.number - 1, n]]
        assert [mark.number for mark in mutual.marks(n)] == [mark.number for mark in kept]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(points=[(2, 0.5, 0.5)]), "there is no picture 2"),
        (dict(points=[(0, 1.5, 0.5)]), "lies outside nerd-face_noto.png"),
        (dict(points=[], map="us12"), "no map 'us12'; choose one of us10"),
        (dict(points=[], model="cleandift_big"), "model 'cleandift_big' is unknown"),
        (dict(points=[], model="dift_tiny", ensemble_size=0), "ensemble_size 0 is no number of noises"),
        (dict(points=[], model="dift_tiny", timestep=1000), "timestep 1000 is none of the model's"),
        (dict(points=[], model="cleandift_tiny", timestep=100), "cleandift_tiny adds no noise; leave them out"),
    ],
)
def test_match_refuses(features, arguments, words):
    with pytest.raises(ValueError, match=words):
        match(PAIR, features=features, **arguments)


def test_thresholds_and_signs_of_the_foreground():
    values = torch.tensor([0.1, 0.2, 0.15, 5.0, 5.5, 0.3])
    best = min(
        (values[values <= v].var(unbiased=False) * (values <= v).sum()
         + values[values > v].var(unbiased=False) * (values > v).sum(), v)
        for v in values.sort().values[:-1]
    )[1]  # fmt: skip
    assert best < _otsu(values) < values[values > best].min()
    assert _otsu(torch.ones(4)) == pytest.approx(1)
    for sign in (1, -1):  # a square on a ground, either way round
        square = torch.zeros(5, 9, 9)
        square[0], square[1, 3:6, 3:6], square[0, 3:6, 3:6] = sign, 1, 0
        (component,) = foreground([square])
        assert ((component > 0) == (square[1] > 0)).all()


def test_segments_are_clusters_and_keep_their_names():
    parts = torch.zeros(3, 6, 6)
    parts[0, :3], parts[1, 3:, :3], parts[2, 3:, 3:] = 1, 1, 1
    (labels,) = segments([parts], 3)
    assert (labels[:3] == 0).all() and len(labels.unique()) == 3  # the largest comes first
    assert torch.equal(segments([parts], 3)[0], labels)
    assert len(segments([parts], 9)[0].unique()) == 3  # no more than there are different vectors
    finer = (2 - labels).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(alike([finer], [labels], True)[0], labels.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_maps_of_one_basis_or_one_each(features):
    shared, own = (maps(PAIR, ["us6"], shared=wish, features=features).values["us6"] for wish in (True, False))
    alone = maps(PAIR[1:], ["us6"], features=features).values["us6"][0]
    assert torch.equal(own[1], alone) and not torch.equal(shared[1], alone)
    for function in (maps, compare, lambda pictures: match(pictures, [])):
        with pytest.raises(ImageError, match="no pictures to look at"):
            function([])
    with pytest.raises(ValueError, match="show 'tsne' is unknown; choose one of pca"):
        maps(PAIR, show="tsne", features=features)
    with pytest.raises(ValueError, match=r"clusters must lie in 2\.\.12, got 1"):
        maps(PAIR, show="segments", clusters=1, features=features)


def test_compare_is_two_matches_and_needs_a_twin(features):
    result = compare(PAIR, [(0, *EYE)], timestep=50, ensemble_size=2, features=features)
    for side, model in ((result.clean, dict()), (result.noisy, dict(model="dift_tiny", timestep=50, ensemble_size=2))):
        again = match(PAIR, [(0, *EYE)], features=features, **model)
        assert torch.equal(side.match.found, again.found) and side.seconds > 0
    with pytest.raises(ValueError, match="ensemble_size 0 is no number"):
        compare(PAIR, ensemble_size=0)
    with pytest.raises(ModelError, match="pixels has no noisy twin to be compared with; choose a cleandift_"):
        compare(PAIR, model="pixels")


RESULTS = {
    "match": lambda p, f: match(p, [(0, *EYE), (1, 0.5, 0.5)], mutual_only=True, prompt="cat", features=f),
    **{
        show: lambda p, f, show=show: maps(p, ["mid", "us6"], show=show, shared=False, clusters=3, features=f)
        for show in SHOWS
    },
    "compare": lambda p, f: compare(p, [(0, *EYE)], timestep=99, ensemble_size=2, features=f),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_three_lines_of_python_make_the_same_result(kind, features, tmp_path, monkeypatch):
    """With one picture of the visitor's own, which lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    Image.open(io.BytesIO(encoded(open_picture("cat_photo.jpg").image))).save("it's mine.png")
    result = RESULTS[kind]([PAIR[0], "it's mine.png"], features)
    lines = result.recipe()
    assert len(lines.strip().splitlines()) == 3 and "emoji" in result.trained_on
    exec(compile(lines, "recipe", "exec"), {})
    for suffix in (".png", ".safetensors"):
        assert (tmp_path / f"{result.function}{suffix}").read_bytes() == result.encoded(suffix)
    assert load(result.encoded(".safetensors")).keys() == result.tensors().keys()
    assert min(Image.open(tmp_path / f"{result.function}.png").size) > 200
    with pytest.raises(ValueError, match=r"saved as \.png or \.safetensors, not as '\.pt'"):
        result.save("result.pt")


def test_three_lines_name_the_device_and_write_over_no_picture(tmp_path):
    elsewhere = match(PAIR[:1], [(0, *EYE)])
    elsewhere.device = "cuda"
    assert "map='us6', device='cuda')" in elsewhere.recipe()
    with pytest.raises(ModelError, match="device 'cuba' cannot be used"):
        match(PAIR[:1], [(0, *EYE)], device="cuba")
    Image.open(io.BytesIO(encoded(open_picture(PAIR[0]).image))).save(tmp_path / "Match.PNG")
    lines = match([tmp_path / "Match.PNG"], [(0, *EYE)]).recipe()
    assert "device" not in lines and 'save("match_again.png"), result.save("match_again.safetensors")' in lines
