"""`fovea finetune init` reads the data, and what it writes passes --check as it is."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from finetune.__main__ import main as finetune
from finetune.config import DataSource
from finetune.data.coco.box_sizes import box_sizes, sides
from finetune.data.coco.examples import open_examples
from finetune.tasks.configs import DetectionConfig
from launch.cli import main
from tests.finetune.runs import make_release
from tests.runs import ROOT, SHARDS

NUCLEI = ROOT / "samples" / "nuclei"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_release(tmp_path_factory.mktemp("backbone") / "release"))


def written(out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """The configuration that the command writes, and its text; it passes --check without a warning."""
    assert main(["finetune", "init", *words, "--out", str(out)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert finetune([str(out), "--check", f"run_dir={out.parent}/run"]) == 0
    assert "warning" not in capsys.readouterr().out
    return yaml.safe_load(out.read_text()), " ".join(out.read_text().replace("#", "").split())


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["finetune", "init", *words, "--out", str(tmp_path / "task.yaml")]) == 2
    assert not (tmp_path / "task.yaml").exists()
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_has_the_levels_and_anchors_of_its_boxes(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    data = [str(NUCLEI / "train.json"), "--val", str(NUCLEI / "val.json")]
    values, text = written(tmp_path / "task.yaml", capsys, "detection", *data, "--weights", weights)
    task = values["task"]
    assert task["head"]["name"] == "mask_rcnn" and "Every object has a mask." in text
    assert values["data"]["train"] == {"images": str(NUCLEI / "train"), "annotations": str(NUCLEI / "train.json")}
    found = box_sizes(
        open_examples(DetectionConfig.model_validate({}), DataSource.model_validate(values["data"]["train"]))
    )
    low, high = np.percentile(sides(found.fitted(tuple(task["test_size"]))), (10, 90))
    anchors = task["head"]["anchors"]
    assert len(anchors) == len(task["head"]["scales"]) + 1
    assert anchors[0] / 2**0.5 <= low and high <= anchors[-1] * 2**0.5
    assert all(b / a <= 2.05 for a, b in pairwise(anchors))
    assert "Sides of the boxes in pixels of the network: 10 % " in text


def test_without_another_set_a_part_of_the_images_is_held_out(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    words = ["classification", str(SHARDS / "train"), "--weights", weights, "--held-out", "0.1"]
    values, text = written(tmp_path / "task.yaml", capsys, *words, "optim.total_steps=30", "data.num_workers=0")
    assert values["data"]["train"] == {"images": str(SHARDS / "train"), "without_fraction": 0.1}
    assert values["data"]["val"]["fraction"] == 0.1 and values["optim"]["total_steps"] == 30
    assert values["task"]["pool"] == "mean" and "mae trains patches, not a class token" in text
    assert "images of 81 classes" in text and "Given on the command line." in text
    assert values["task"]["train"] == "full" and "Pictures of one scene or video can be in both parts" in text


def test_few_images_of_a_class_train_a_classifier_on_frozen_features(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (40, 30), (9 * number, 20, 30)).save(tmp_path / "photos" / name / f"{number}.png")
    words = ["classification", str(tmp_path / "photos"), "--weights", weights]
    values, text = written(tmp_path / "task.yaml", capsys, *words)
    assert values["task"]["train"] == "linear" and "layer_decay" not in values["optim"]
    assert values["optim"]["global_batch_size"] == 8 and "4 to 4 each" in text


@pytest.mark.slow
def test_a_segmenter_of_objects_has_a_background_and_crops_that_fit(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    data = [str(NUCLEI / "train.json"), "--val", str(NUCLEI / "val.json")]
    values, text = written(tmp_path / "task.yaml", capsys, "segmentation", *data, "--weights", weights)
    task = values["task"]
    assert task["background"] == "background" and task["cat_max_ratio"] == 0.95
    assert task["crop"] % 8 == 0 and task["stride"] < task["crop"] <= 512
    assert "Shares of the pixels of 64 maps: background" in text


def test_a_segmenter_and_a_depth_estimator_of_folders_of_maps(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "depth"):
        (tmp_path / name).mkdir()
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(rng.integers(0, 3, (48, 64), np.uint8)).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray(rng.integers(1000, 5000, (48, 64)).astype(np.uint16)).save(tmp_path / "depth" / f"{number}.png")
    (tmp_path / "classes.json").write_text(json.dumps(["sky", "tree", "road"]))
    options = ["--images", str(tmp_path / "images"), "--weights", weights]
    values, text = written(tmp_path / "seg.yaml", capsys, "segmentation", str(tmp_path / "masks"), *options)
    assert values["data"]["val"]["masks"] == str(tmp_path / "masks") and "sky 3" in text
    values, text = written(tmp_path / "depth.yaml", capsys, "depth", str(tmp_path / "depth"), *options)
    assert 0.3 < values["task"]["min_depth"] < 1 and 5 < values["task"]["max_depth"] < 6
    assert "Depths with 1000 units per metre" in text


def test_what_cannot_be_read_is_refused_with_a_sentence(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "a.png")
    photos, some = str(tmp_path / "photos"), ["--weights", weights]
    assert "no image with a label" in refused(tmp_path, capsys, "classification", photos, *some)
    assert "detection needs a COCO json" in refused(tmp_path, capsys, "detection", photos, *some)
    assert "give the images of these maps: --images" in refused(tmp_path, capsys, "depth", photos, *some)
    assert "no such file or folder" in refused(tmp_path, capsys, "detection", str(tmp_path / "a.json"), *some)
    (tmp_path / "alone.json").write_text("{}")
    assert "give --images" in refused(tmp_path, capsys, "detection", str(tmp_path / "alone.json"), *some)
    grocery = ["classification", str(SHARDS / "train")]
    assert "nothing is downloaded" in refused(tmp_path, capsys, *grocery, "--weights", str(tmp_path / "none"))
    assert "--gpu h300: not known" in refused(tmp_path, capsys, *grocery, *some, "--gpu", "h300")
    assert "task.trian: unknown key" in refused(tmp_path, capsys, *grocery, *some, "task.trian=full")
    (tmp_path / "task.yaml").write_text("mine")
    assert main(["finetune", "init", *grocery, *some, "--out", str(tmp_path / "task.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "task.yaml").read_text() == "mine"
