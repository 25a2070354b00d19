"""The channels and the range of a backbone reach a task, its training images and its predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from finetune.__main__ import check
from finetune.data.examples import Example
from finetune.predict import main as predict
from finetune.release import open_task, write_release
from finetune.run import build_task
from pretrain.core.configlib import ConfigError
from pretrain.data.__main__ import main as write
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release as write_backbone

BANDS = 13
RANGE = tuple((10.0 * band, 4095.0 - 20 * band) for band in range(BANDS))


def config(folder: Path, value_range: Any = RANGE) -> str:
    """A configuration on uint16 arrays of two classes, from a release with a range."""
    vit = ViT((32, 32), 8, BANDS, 24, 2, 2)
    numbers: dict[str, Any] = {"mean": (0.4,) * BANDS, "std": (0.2,) * BANDS}
    write_backbone(folder / "backbone", vit, objective="mae", extra_state={}, record={"range": value_range}, **numbers)
    for name in ("dark", "light"):
        (folder / "images" / name).mkdir(parents=True)
        for seed in range(8):
            np.save(folder / "images" / name / f"{seed}.npy", scene(seed))
    source = {"images": str(folder / "images")}
    values = {
        "run_dir": str(folder / "run"),
        "task": {"name": "classification", "augment": {"color_jitter": 0.2, "erase": 1.0}},
        "model": {"release": str(folder / "backbone")},
        "data": {"train": source, "val": source},
        "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2, "warmup_steps": 1},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "c.yaml")


def scene(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (32, 32, BANDS)).astype(np.uint16)


def test_13_channels_of_12_bits_reach_training_and_prediction(tmp_path: Path):
    found = check(config(tmp_path), world_size=1)
    assert found.config.data.range == RANGE
    low, high = np.array(RANGE).T
    expected = ((scene(0) - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(found.train[0].image / 255, expected, atol=1e-5)
    _, task = build_task(found.config, found.train, total_steps=2)
    sample = task.train_transform()(found.train[0], np.random.default_rng(0))
    assert tuple(sample["image"].shape) == (BANDS, 32, 32)
    record = {"source": {"title": "x"}, "orientation": "exif", "range": RANGE, "picture_channels": [3, 2, 1]}
    write_release(tmp_path / "task", task, {**record, "metrics": {"values": {}, "protocol": "", "step": 0}})
    assert open_task(tmp_path / "task")[1]["range"] == [list(pair) for pair in RANGE]
    assert predict([str(tmp_path / "task"), str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.augment.rand_augment=2", "8-bit RGB; the images have 13 channels; set it to 0"),
        ("evaluate.picture_channels=[3, 2, 13]", "the channels are 0 to 12"),
        ("data.range=[5, 5]", "expected low < high"),
    ],
)
def test_settings_that_do_not_fit_the_channels_are_refused(tmp_path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path), [override], world_size=1)


def test_images_that_8_bits_would_crush_are_refused_without_a_range(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data\.range: missing; 16 of 16 .* uint16 \.npy.*data\.range=\[0, 4095\]"):
        check(config(tmp_path, value_range=None), world_size=1)


def test_pictures_show_the_chosen_channels_and_gray_in_gray():
    image = np.zeros((2, 2, 5), np.float32) + np.array([10, 20.4, 30, 40, 255], np.float32)
    example = Example(0, "", image, None)
    assert example.as_picture().image[0, 0].tolist() == [10, 20, 30]
    assert example.as_picture([4, 3, 1]).image[0, 0].tolist() == [255, 40, 20]
    assert Example(0, "", image[:, :, 1:2], None).as_picture().image[0, 0].tolist() == [20, 20, 20]


def test_a_larger_image_than_max_pixels_is_unusable_in_folders_and_shards(tmp_path: Path):
    path = config(tmp_path)
    assert check(path, world_size=1).train[0].image.shape == (32, 32, BANDS)
    with pytest.raises(ConfigError, match=r"too large: 32 x 32 pixels.*data.max_pixels"):
        check(path, ["data.max_pixels=1000"], world_size=1)
    assert write(["write", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    of_shards = [f"data.{name}.images={tmp_path / 'shards'}" for name in ("train", "val")]
    assert check(path, of_shards, world_size=1).train[0].image.shape == (32, 32, BANDS)
    with pytest.raises(ConfigError, match=r"too large: 32 x 32 pixels.*data.max_pixels"):
        check(path, [*of_shards, "data.max_pixels=1000"], world_size=1)
