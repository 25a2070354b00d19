"""What the probe of a release says, and beside what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from pretrain.probes.__main__ import _with_error
from pretrain.probes.features import BOTH, pixel_features
from pretrain.probes.protocol import ProbeRequest, probe, standard_error
from tests.runs import SHARDS

CPU = torch.device("cpu")
MODEL = {"img_size": (16, 16), "patch_size": 8, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODEL |= {"mlp_ratio": 2.0, "num_registers": 1}
SIDES = ["--train", str(SHARDS / "train"), "--val", str(SHARDS / "val"), "--max-images", "80", "--resize", "16"]


def test_pixels_are_centred_by_the_mean_of_the_bank():
    """Without it a bright offset common to all images would hide what differs."""
    labels = torch.arange(32) % 2
    images = 100 + torch.randn(32, 1, 4, 4) * 0.1
    images[labels == 1, :, :2] += 1
    batches = [(images, labels)]
    scores, queries = probe(batches, batches, pixel_features, device=CPU, asked=ProbeRequest(ks=(5,), linear=False))
    assert scores["pixels"].knn == {5: 1.0} and scores["pixels"].linear is None and queries == 32


def test_a_part_of_the_bank_has_so_many_images_of_each_class():
    labels = torch.arange(40) % 4
    images = torch.nn.functional.one_hot(labels, 4).float().view(40, 1, 2, 2)
    batches = [(images, labels)]
    asked = ProbeRequest(ks=(1, 4), linear=False, per_class=1)
    scores, queries = probe(batches, batches, pixel_features, device=CPU, asked=asked)
    assert scores["pixels"].knn == {1: 1.0, 4: 1.0} and queries == 40
    assert "1 images of each class (seed 0)" in " ".join(asked.in_words())
    with pytest.raises(ValueError, match="per_class 11: class 0 has only 10 images"):
        probe(batches, batches, pixel_features, device=CPU, asked=ProbeRequest(linear=False, per_class=11))


def test_the_standard_error_is_the_binomial_one():
    assert standard_error(0.4, 994) == pytest.approx(0.01554, abs=1e-5)


def test_the_interval_holds_where_nothing_is_right():
    """Newcombe 1998, table I: 0 of 20, 81 of 263."""
    for right, count, low, high in ((0, 20, 0.0, 0.1611), (81, 263, 0.2553, 0.3662)):
        assert _with_error(right / count, count)["interval_95"] == pytest.approx([low, high], abs=1e-4)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("probe") / "release"
    return write_release(folder, ViT(**MODEL), objective="mae", extra_state={}, record={})


@pytest.mark.slow
def test_a_release_is_measured_beside_its_untrained_network_and_raw_pixels(
    release: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["probe", str(release), *SIDES, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trained"].keys() == report["untrained"].keys() == {"cls", "patch_mean", BOTH}
    assert report["queries"] == 80 and report["seed_of_untrained"] == 0
    for row in [*report["trained"].values(), *report["untrained"].values(), report["pixels"]]:
        assert 0 <= row["knn"]["accuracy"] <= 1 and row["linear"]["standard_error"] < 0.06
    assert "chosen on a fifth of train" in " ".join(report["protocol"])
    assert report["trained"] != report["untrained"]


def test_the_untrained_network_is_the_one_of_the_seed(release: Path, capsys: pytest.CaptureFixture[str]):
    """The release of this test holds the initial weights of seed 11: untrained with that seed, it is itself."""
    assert main(["probe", str(release), *SIDES, "--seed", "11", "--no-linear"]) == 0
    said = capsys.readouterr().out.splitlines()
    cells = [line.split()[-4:] for line in said if line.startswith(("[CLS]  ", "untrained (seed 11), [CLS]  "))]
    assert len(cells) == 2 and cells[0] == cells[1]


def test_an_official_checkpoint_of_a_known_size_is_opened_by_its_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "vit.pth"
    torch.save({"model": ViT((16, 16), 8, 3, 192, 12, 3).state_dict()}, path)
    few = ["--max-images", "8", "--no-linear", "--json"]
    assert main(["probe", "--official", str(path), *SIDES, *few]) == 0
    assert "central 16 x 16 px" in json.loads(capsys.readouterr().out)["protocol"][0]
    torch.save({"model": ViT((16, 16), 8, 3, 48, 2, 3).state_dict()}, path)
    assert main(["probe", "--official", str(path), *SIDES, *few]) == 2
    assert "width 48, 2 blocks: not an RGB ViT of a known size" in capsys.readouterr().err


def test_what_is_no_release_and_shards_without_labels_are_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["probe", str(tmp_path), *SIDES]) == 2
    assert "not a release" in capsys.readouterr().err
    unlabelled = SHARDS.parent / "nuclei" / "val"
    assert main(["probe", str(release), "--train", str(unlabelled), "--val", str(unlabelled)]) == 2
    assert "no labels" in capsys.readouterr().err
