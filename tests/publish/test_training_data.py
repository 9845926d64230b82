"""What weights were trained on, in one line: of published models, of folders, of repositories on the Hub."""

import timm
from hub_server import TOKEN

from cleandift_backbones.models.entrypoints import default_cfgs
from cleandift_backbones.publish import card
from cleandift_backbones.publish.card import CardInfo, save_folder
from cleandift_backbones.publish.convert import to_native
from cleandift_backbones.publish.push import push_to_hub
from cleandift_backbones.publish.training_data import training_data


def small():
    return timm.create_model("test_cleandift", features_only=True)


def test_every_published_model_says_it():
    for name in default_cfgs:
        words = training_data(name)
        assert ("emoji" in words) == ("tiny" in name) and ("photographs and art" in words) == ("sd" in name), name
    assert timm.create_model("cleandift_tiny").pretrained_cfg["description"].startswith("Trained on emoji")
    assert training_data("resnet18") == training_data("pixels") == training_data("no_model") == ""


def test_of_a_folder_its_card_says_it(tmp_path):
    folder = save_folder(small(), tmp_path / "mine", CardInfo(data="30 photographs\nof <b>cats</b>", notes="Data: no."))
    assert training_data(f"local-dir:{folder}") == "30 photographs of <b>cats</b>"
    # Weights of one's own are not what the architecture's published weights are.
    folder = save_folder(timm.create_model("cleandift_tiny", features_only=True), tmp_path / "own")
    assert training_data(f"local-dir:{folder}") == "" and "photographs" not in (folder / "config.json").read_text()
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert training_data(f"local-dir:{folder}") == training_data(f"local-dir:{tmp_path / 'nothing'}") == ""
    (folder / "README.md").write_text("---\nlicense: mit\ndatasets:\n- imagenet-1k\n- own/cats\n---\n# Cats\n")
    assert training_data(f"local-dir:{folder}") == "imagenet-1k, own/cats"


def test_a_conversion_keeps_it(tmp_path):
    to_native("cleandift_tiny", tmp_path / "one")
    to_native(str(tmp_path / "one"), tmp_path / "two")
    assert training_data(f"local-dir:{tmp_path / 'two'}") == training_data("cleandift_tiny")


def test_of_a_repository_its_card_says_it(hub, monkeypatch, offline):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(small(), "me/features", card=CardInfo(data="3,000 web images"))
    assert training_data("hf-hub:me/features") == "3,000 web images"
    assert training_data("hf-hub:me/nothing") == ""
    offline()
    assert training_data("hf-hub:me/features") == "3,000 web images"
    assert "description" not in card.timm_config(timm.create_model("cleandift_tiny"))["pretrained_cfg"]
