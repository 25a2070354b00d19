"""Stored features: those of the network, whatever the number of processes, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from launch.cli import main
from pretrain.core.tensorfile import open_tensors
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import read_release, write_release
from pretrain.probes.stored import read_features
from tests.runs import SHARDS

TRAIN, VAL = SHARDS / "train", SHARDS / "val"
MODEL = {"img_size": (16, 16), "patch_size": 8, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL = ["--batch-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("embed") / "release"
    return write_release(folder, ViT(**MODEL), objective="mae", extra_state={}, record={})


@pytest.fixture(scope="module")
def stored(release: Path) -> Path:
    out = release.parent / "features"
    assert main(["embed", str(release), str(TRAIN), "--out", str(out), "--blocks", "2", "1", *SMALL]) == 0
    return out


def expected(release: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    opened = read_release(release)
    network = opened.build().eval()
    images = EvalImages(
        Dataset.open(str(TRAIN)),
        (16, 16),
        in_chans=3,
        mean=opened.record["mean"],
        std=opened.record["std"],
        batch_size=10**6,
    )
    ((batch, labels),) = images
    with torch.no_grad():
        tokens, (first, second) = network(batch), network.layers(batch, [0, 1])
    values = {"cls": tokens[:, 0], "patch_mean": tokens[:, 1:].mean(1)}
    return values | {"patches.1": first[:, 1:], "patches.2": second[:, 1:]}, labels


def test_every_image_has_the_features_of_the_network_in_the_order_of_the_shards(release: Path, stored: Path):
    features, labels = expected(release)
    found = read_features(stored)
    assert found.features.keys() == features.keys()
    for name, values in features.items():
        torch.testing.assert_close(found.features[name], values, atol=1e-5, rtol=1e-5)
    assert found.labels is not None and torch.equal(found.labels, labels)
    dataset = Dataset.open(str(TRAIN))
    reader = Reader(dataset)
    places = (dataset.locate(number) for number in range(dataset.num_samples))
    assert found.keys == [f"{dataset.names[shard][:-4]}/{reader.key(shard, sample)}" for shard, sample in places]


def test_two_processes_write_the_bytes_of_one_and_the_last_to_end_completes_them(
    release: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(list(stored.glob("*.safetensors"))) > 1
    command = ["embed", str(release), str(TRAIN), "--out", str(tmp_path), "--blocks", "1", "2", *SMALL]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert not (tmp_path / "MANIFEST.json").exists()
        assert main(command) == 0
    files = {path.name: path.read_bytes() for path in stored.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_what_is_finished_stays_and_other_features_are_not_mixed_in(
    release: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    shutil.copytree(stored, out)
    first, second = sorted(out.glob("*.safetensors"))[:2]
    before, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    command = ["embed", str(release), str(TRAIN), "--out", str(out), *SMALL]
    assert main([*command, "--blocks", "1", "2"]) == 0
    assert first.read_bytes() == before and second.stat().st_mtime_ns == kept
    capsys.readouterr()
    assert main(command) == 2
    assert "features of other weights, settings or shards, or damaged; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(("numbers", "tolerance"), [("fp16", 2e-3), ("int8", 2e-2)])
def test_smaller_numbers_are_read_as_fp32(release: Path, stored: Path, tmp_path: Path, numbers: str, tolerance: float):
    assert main(["embed", str(release), str(VAL), "--out", str(tmp_path / "a"), *SMALL]) == 0
    assert main(["embed", str(release), str(VAL), "--out", str(tmp_path / "b"), "--numbers", numbers, *SMALL]) == 0
    exact, found = read_features(tmp_path / "a"), read_features(tmp_path / "b")
    for name, values in exact.features.items():
        assert found.features[name].dtype == torch.float32
        assert not torch.equal(found.features[name], values)
        torch.testing.assert_close(found.features[name], values, atol=tolerance * float(values.abs().max()), rtol=0)
    small, large = (next((tmp_path / name).glob("*.safetensors")).stat().st_size for name in "ba")
    assert small < large


def test_an_image_that_cannot_be_used_is_left_out_with_its_reason(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 10, 10)).save(photos / f"{number}.png")
    assert main(["data", "write", str(photos), str(tmp_path / "shards")]) == 0
    (tar,) = (tmp_path / "shards").glob("*.tar")
    data = bytearray(tar.read_bytes())
    at = data.index(b"IDAT", data.index(b"IDAT") + 4)  # of the second sample
    data[at + 6] ^= 0xFF
    tar.write_bytes(data)
    assert main(["embed", str(release), str(tmp_path / "shards"), "--out", str(tmp_path / "out"), *SMALL]) == 0
    assert "2 images, 1 could not be used and are left out" in capsys.readouterr().out
    found, reader = read_features(tmp_path / "out"), Reader(Dataset.open(str(tmp_path / "shards")))
    assert found.keys == [f"{tar.stem}/{reader.key(0, sample)}" for sample in (0, 2)] and found.labels is None
    with open_tensors(tmp_path / "out" / f"{tar.stem}.safetensors") as file:
        ((key, reason),) = json.loads(file.metadata()["skipped"])
    assert key == reader.key(0, 1) and "crc" in reason


def test_incomplete_and_damaged_features_are_refused_by_name(stored: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(stored, out)
    file = min(out.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.stem}.* has changed since it was written.*run fovea embed again"):
        read_features(out)
    (out / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"no complete features of fovea embed: no MANIFEST.json"):
        read_features(out)
    with pytest.raises(ValueError, match=r"no features 'pooled'; it has cls, patch_mean, patches.1, patches.2"):
        read_features(stored, ["pooled"])


def test_blocks_that_the_backbone_has_not_are_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["embed", str(release), str(VAL), "--out", str(tmp_path / "out"), "--blocks", "3", *SMALL]) == 2
    assert "--blocks: this backbone has the blocks 1 to 2, got [3]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_probes_of_stored_features_are_those_of_the_network(
    release: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["embed", str(release), str(VAL), "--out", str(tmp_path / "val"), *SMALL]) == 0
    sides = ["--train", str(TRAIN), "--val", str(VAL), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main(["probe", str(release), *sides]) == 0
    network = json.loads(capsys.readouterr().out)
    assert main(["probe", "--features", str(stored), str(tmp_path / "val"), "--device", "cpu", "--json"]) == 2
    assert "different weights or settings" in capsys.readouterr().err
    assert main(["embed", str(release), str(TRAIN), "--out", str(tmp_path / "train"), *SMALL]) == 0
    command = ["probe", "--features", str(tmp_path / "train"), str(tmp_path / "val"), "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["queries"] == network["queries"] and found["trained"].keys() == network["trained"].keys()
    for kind, row in network["trained"].items():
        assert found["trained"][kind]["knn"]["accuracy"] == pytest.approx(row["knn"]["accuracy"], abs=0.01)
        assert found["trained"][kind]["linear"]["accuracy"] == pytest.approx(row["linear"]["accuracy"], abs=0.02)
    assert main(command) == 0
    assert "stored as fp32" in capsys.readouterr().out


def test_an_image_of_the_set_is_found_first(
    release: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dataset = Dataset.open(str(TRAIN))
    sample = Reader(dataset).read(0, 7)
    extension = next(name for name in sample if name in ("jpg", "png", "webp"))
    query, sheet = tmp_path / f"query.{extension}", tmp_path / "sheet.png"
    query.write_bytes(sample[extension])
    capsys.readouterr()
    command = ["search", str(stored), str(query), "--out", str(sheet), "--count", "3", "--device", "cpu"]
    assert main(command) == 0
    name, first, second, *_ = capsys.readouterr().out.splitlines()
    assert name == str(query) and first.split() == ["1.0000", f"{dataset.names[0][:-4]}/{sample['__key__']}"]
    assert float(second.split()[0]) < 1
    with Image.open(sheet) as image:
        assert image.size == (4 * 160, 190)
    assert main([*command, "--kind", "patches.2"]) == 0
    torch.manual_seed(12)
    other = write_release(tmp_path / "other", ViT(**MODEL), objective="mae", extra_state={}, record={})
    assert main([*command, "--model", str(other)]) == 2
    assert "not the weights that" in capsys.readouterr().err
