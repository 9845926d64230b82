"""The depth probe: layouts, the formulas written out, a published kind of file."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_eval_features import picture
from torch import nn

from cleandift_backbones.evaluation import probes, tasks
from cleandift_backbones.evaluation.items import DataError
from cleandift_backbones.evaluation.tasks import depth


def save_depth(path, metres):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(metres * 1000).astype(np.uint16)).save(path)


@pytest.fixture
def nyu(tmp_path):
    """Lists as of BTS: with a leading slash in training, without in testing, focal lengths at the end."""
    metres = np.full((48, 64), 2.5)
    metres[:4] = 0
    for scene in ("kitchen_0028b", "bathroom"):
        (tmp_path / scene).mkdir()
    picture(tmp_path / "kitchen_0028b/rgb_00000.jpg", 1, (64, 48))
    picture(tmp_path / "bathroom/rgb_00045.jpg", 2, (64, 48))
    save_depth(tmp_path / "kitchen_0028b/sync_depth_00000.png", metres)
    save_depth(tmp_path / "bathroom/sync_depth_00045.png", metres * 2)
    train, test = "kitchen_0028b/rgb_00000.jpg /kitchen_0028b/sync_depth_00000.png", "bathroom/rgb_00045.jpg"
    (tmp_path / "nyu_train.txt").write_text(f"/{train} 518.8579\n")
    (tmp_path / "nyu_test.txt").write_text(f"{test} bathroom/sync_depth_00045.png 518.8579\n")
    return tmp_path


def test_lists_are_read(nyu):
    train, test = depth.read_nyu(nyu, "train"), depth.read_nyu(nyu)
    assert train.items[0].key == "kitchen_0028b/rgb_00000.jpg" and train.items[0].caption == "A photo of a room"
    assert train.depths[0]().max() == pytest.approx(2.5) and train.depths[0]()[0, 0] == 0
    assert test.depths[0]().max() == pytest.approx(5) and test.depths[0]().dtype == np.float32
    with pytest.raises(DataError, match=r"no split 'val' of NYUv2 \(found bathroom, kitchen_0028b, nyu_test\.txt"):
        depth.read_nyu(nyu, "val")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(nyu / "bathroom/sync_depth_00045.png")
    with pytest.raises(DataError, match="colour mode L; expected a 16-bit grey PNG in millimetres"):
        test.depths[0]()
    (nyu / "bathroom/sync_depth_00045.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1 depth maps are missing, first .*sync_depth_00045\.png"):
        depth.read_nyu(nyu)
    (nyu / "nyu_test.txt").write_text("bathroom/rgb_00045.jpg\n")
    with pytest.raises(DataError, match=r"line 1: 'bathroom/rgb_00045\.jpg'; expected"):
        depth.read_nyu(nyu)


def test_depth_maps_are_checked_before_the_work(nyu):
    train, test = depth.read_nyu(nyu, "train"), depth.read_nyu(nyu)
    path = nyu / "bathroom/sync_depth_00045.png"
    tasks.Depth(train, test, probes.ProbeSettings())
    save_depth(path, np.ones((48, 32)))
    with pytest.raises(DataError, match=r"1 of 2 depth maps .*00045\.png: 32x48 pixels, but its picture has 64x48"):
        tasks.Depth(train, test, probes.ProbeSettings())
    path.write_bytes((nyu / "kitchen_0028b/sync_depth_00000.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"1 of 2 depth maps cannot be used, first .*00045\.png: truncated"):
        tasks.Depth(train, test, probes.ProbeSettings())


def test_the_labelled_mat_is_read(tmp_path):
    h5py, savemat = pytest.importorskip("h5py"), pytest.importorskip("scipy.io").savemat
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 64, 48), dtype=np.uint8)  # N x 3 x W x H
    metres = rng.uniform(0.5, 9, (3, 64, 48)).astype(np.float32)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, metres
    with pytest.raises(DataError, match=r"splits\.mat is missing"):
        depth.read_nyu(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    train, test = depth.read_nyu(tmp_path, "train"), depth.read_nyu(tmp_path)
    assert [item.key for item in train.items] == ["nyu_depth_v2_labeled.mat/0", "nyu_depth_v2_labeled.mat/2"]
    shown = np.asarray(test.items[0].read())
    assert shown.shape == (48, 64, 3) and (shown[5, 7] == images[1, :, 7, 5]).all()
    assert test.depths[0]()[5, 7] == metres[1, 7, 5]
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[4]]), "testNdxs": np.array([[2]])})
    with pytest.raises(DataError, match="trainNdxs must number the 3 pictures"):
        depth.read_nyu(tmp_path, "train")
    with pytest.raises(DataError, match="not NYUv2's labelled files"):
        depth.read_nyu(tmp_path, "val")


def test_expected_depth_by_hand():
    scores = torch.tensor([3.0, -2.0, 0.9]).view(1, 3, 1, 1)
    # weights 3.1, 0.1, 1.0 of depths 1, 2, 4
    assert depth.expected_depth(scores, torch.tensor([1.0, 2.0, 4.0])).item() == pytest.approx((3.1 + 0.2 + 4) / 4.2)
    probe = depth.BinsProbe(nn.Conv2d(2, 256, 1))
    assert probe.depths[0] == pytest.approx(0.1) and probe.depths[-1] == pytest.approx(10)
    assert probe.depths[1] - probe.depths[0] == pytest.approx(9.9 / 255, abs=1e-6)


def test_sig_loss_by_hand():
    predicted, truth = [1.0, 2.0, 4.0], [2.0, 2.0, 1.0]
    g = [math.log(p / t) for p, t in zip(predicted, truth, strict=True)]
    mean = sum(g) / 3
    variance = sum((x - mean) ** 2 for x in g) / 2
    found = depth.sig_loss(torch.tensor(predicted), torch.tensor(truth)).item()
    assert found == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-6)


def test_measures_by_hand():
    found = depth.measures(np.array([2.0, 5.0, 1.5, 1.0]), np.array([2.0, 4.0, 1.0, 2.0]))
    assert found["rmse"] == pytest.approx(math.sqrt((0 + 1 + 0.25 + 1) / 4))
    assert found["abs_rel"] == pytest.approx((0 + 0.25 + 0.5 + 0.5) / 4)
    # ratios 1, 1.25, 1.5, 2; limits 1.25, 1.5625, 1.953
    assert [found[f"delta{n}"] for n in (1, 2, 3)] == [0.25, 0.75, 0.75]


def test_cells_hold_mean_depths():
    metres = np.array([[1, 3, 0, 0], [5, 0, 0, 20]], np.float32)
    assert depth.cell_depths(metres, (1, 2)).tolist() == [[3, 0]]


def test_evaluation_equals_the_protocol_written_out():
    """480x640 depths: Eigen's crop, bilinear upsampling, 1 mm to 10 m, means over pictures."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    probe = depth.BinsProbe(nn.Conv2d(3, 256, 1)).requires_grad_(False)
    maps = [torch.randn(3, 6, 8, generator=generator) * 5 for _ in range(3)]
    truths = [rng.uniform(0, 12, (480, 640)).astype(np.float32) for _ in range(3)]
    truths[2][:] = 0  # nothing known: left out
    data = depth.DepthSet([None] * 3, [lambda t=t: t for t in truths])
    tallies = depth.evaluate_depth(probe, maps, data)
    errors, close = [], []
    for x, truth in list(zip(maps, truths, strict=True))[:2]:
        guess = F.interpolate(probe(x[None])[None], (480, 640), mode="bilinear")[0, 0].numpy()
        known = np.zeros((480, 640), bool)
        known[45:471, 41:601] = True
        known &= (truth >= 0.001) & (truth <= 10)
        p, t = guess[known], truth[known]
        errors.append(np.sqrt(((p - t) ** 2).mean()))
        close.append((np.maximum(p / t, t / p) < 1.25).mean())
    assert tallies["rmse"].rate == pytest.approx(np.mean(errors), rel=1e-5)
    assert tallies["delta1"].rate == pytest.approx(np.mean(close), rel=1e-5)
    whole = depth.evaluate_depth(probe, maps, data, eigen_crop=False)
    assert whole["rmse"].rate != tallies["rmse"].rate
    empty = depth.DepthSet([None], [lambda: np.zeros((8, 8), np.float32)])
    with pytest.raises(DataError, match="all 1 depth maps are empty"):
        depth.evaluate_depth(probe, maps[:1], empty)
    with pytest.raises(DataError, match="all 1 depth maps are empty"):
        depth.train_depth(maps[:1], empty, progress=False)


def test_a_probe_learns_depth():
    generator = torch.Generator().manual_seed(3)
    maps, truths = [], []
    for _ in range(24):
        near = torch.rand(4, 4, generator=generator) > 0.5
        truths.append(np.where(near.numpy(), 1.0, 6.0).astype(np.float32).repeat(4, 0).repeat(4, 1))
        maps.append(torch.stack([near.float(), torch.randn(4, 4, generator=generator)]))
    data = depth.DepthSet([None] * 24, [lambda t=t: t for t in truths])
    probe = depth.train_depth(maps, data, probes.ProbeSettings(epochs=80, learning_rate=0.05), progress=False)
    predicted = probe(torch.stack(maps)).flatten()
    truth = torch.stack([depth.cell_depths(t, (4, 4)) for t in truths]).flatten()
    # the loss hardly minds a common factor; the best constant has a loss of about half log 6, 0.9
    assert depth.sig_loss(predicted, truth) < 0.2


def test_probe_files(tmp_path):
    conv = nn.Conv2d(5, 256, 1)
    x = torch.randn(2, 5, 3, 3)
    expected = depth.BinsProbe(conv)(x)
    depth.BinsProbe(conv).save(tmp_path / "probe.safetensors")
    assert torch.allclose(depth.BinsProbe.load(tmp_path / "probe.safetensors", 5)(x), expected, atol=1e-6)
    state = {"probe.conv.weight": conv.weight.half(), "probe.conv.bias": conv.bias.half()}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in state.items()}, tmp_path / "published.safetensors"
    )
    assert torch.allclose(depth.BinsProbe.load(tmp_path / "published.safetensors", 5)(x), expected, atol=1e-2)
    with pytest.raises(DataError, match=r"expected a 1x1 convolution 7 -> 256, found probe\.conv"):
        depth.BinsProbe.load(tmp_path / "published.safetensors", 7)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a safetensors file"):
        depth.BinsProbe.load(tmp_path / "bad.safetensors", 5)
