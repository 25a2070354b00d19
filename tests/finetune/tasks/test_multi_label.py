"""Several labels of an image: the loss, and a run from its list to predictions, an export and an explanation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from finetune.__main__ import main as finetune
from finetune.explain.command import main as explain
from finetune.export.command import main as export
from finetune.predict import main as predict
from finetune.predictions import Classes, Labelled
from finetune.release import open_task
from finetune.report.labels import multi_label_picture
from tests.finetune.runs import make_release, results
from tests.finetune.small_tasks import CLASSES, small_task

GROCERY = Path(__file__).parents[3] / "samples" / "grocery"
RANDOM = {"rng_step": torch.linspace(0, 1, 64)}


def batch(labels: list[list[int]]) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return {"image": images.to(torch.uint8), "label": torch.tensor(labels, dtype=torch.float32), **RANDOM}


def test_the_loss_is_the_mean_binary_cross_entropy_of_images_and_labels():
    task, given = small_task("multi_label"), batch([[1, 0, 1], [0, 0, 0]])
    losses = {name: value.detach() for name, value in task(given, 0).items()}
    logits = task.outputs(task.normalize(given["image"]))[0].detach()
    assert losses["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, given["label"])), abs=1e-6)
    found, true = logits > 0, given["label"] > 0
    assert losses["f1_train"] == 2 * (found & true).sum() / (found.sum() + true.sum())
    smooth = small_task("multi_label", augment={"smoothing": 0.2})
    target = given["label"] * 0.8 + 0.1
    assert smooth(given, 0)["loss"].detach() == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, target)), abs=1e-6
    )


def test_mixup_mixes_the_labels_as_the_images():
    task, given = small_task("multi_label", augment={"mixup": 1.0}), batch([[1, 0, 1], [0, 1, 0]])
    images, targets = task.mixer.mix(task.normalize(given["image"]), given["label"], given["rng_step"][None])
    logits = task.outputs(images)[0].detach()
    assert 0 < float(targets[0, 0]) < 1 and targets[0].sum() == pytest.approx(1 + float(targets[0, 0]))
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    assert task(given, 0)["loss"].detach() == pytest.approx(float(expected), abs=1e-6)


def test_predictions_are_probabilities_of_each_label_and_those_above_the_threshold():
    task, given = small_task("multi_label", threshold=0.4), batch([[0, 0, 0]] * 4)
    with torch.no_grad():
        (logits,) = task.outputs(task.normalize(given["image"]))
        found = task.predict(given)
    assert np.stack([p.probabilities for p in found]) == pytest.approx(logits.sigmoid().numpy(), abs=1e-6)  # type: ignore[attr-defined]
    row = Labelled(np.array([0.3, 0.9, 0.4], np.float32), 0.4).as_json("x", Classes(CLASSES, [5, 7, 9]))
    assert row["labels"] == [7, 9] and row["classes"] == ["dog", "cow"]
    assert list(row["probabilities"]) == ["dog", "cow", "cat"]


def test_pictures_are_drawn_with_and_without_truth():
    image, shares = np.full((40, 30, 3), 90, np.uint8), np.linspace(0, 1, 30).astype(np.float32)
    names = [f"label {i}" for i in range(30)]
    plain = multi_label_picture(image, None, shares, names, threshold=0.5)
    truth = (np.arange(30) < 2).astype(np.float32)
    judged = multi_label_picture(image, truth, shares, names, threshold=0.5)
    alone = multi_label_picture(image, truth, None, names, threshold=0.5)
    assert plain.dtype == judged.dtype == np.uint8 and judged.shape[1] > alone.shape[1]
    assert not np.array_equal(plain, judged)


@pytest.mark.slow
def test_a_run_learns_is_released_predicts_and_is_exported_and_explained(tmp_path: Path, capsys: Any):
    make_release(tmp_path / "backbone")
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "task": {"name": "multi_label"},
        "model": {"release": str(tmp_path / "backbone")},
        "data": {"num_workers": 0},
        "optim": {"lr": 1e-3, "total_steps": 12, "global_batch_size": 8, "warmup_steps": 2},
        "log": {"tensorboard": False},
        "evaluate": {"batch_size": 16, "pictures": 2},
    }
    for part, limit in (("train", 64), ("val", 40)):
        words = str(GROCERY / f"{part}_words.csv")
        config["data"][part] = {"images": str(GROCERY / part), "annotations": words, "limit": limit}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    assert finetune([str(path), "--check"]) == 0
    assert finetune([str(path)]) == 0, capsys.readouterr().err
    found = results(tmp_path / "run")
    assert found["primary"]["name"] == "map" and 0 < found["values"]["map"] < 1 and len(found["per_class"]) == 22
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "macro_f1" in page and "What predictions depend on" in page
    task, record = open_task(tmp_path / "run" / "release")
    assert task.config.name == "multi_label" and record["metrics"]["values"] == found["values"]
    photos = [tmp_path / f"{name}.jpg" for name in "ab"]
    for level, photo in zip((40, 200), photos, strict=True):
        Image.fromarray(np.full((50, 40, 3), level, np.uint8)).save(photo)
    assert predict([str(tmp_path / "run"), *map(str, photos), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [len(row["probabilities"]) for row in rows] == [22, 22]
    assert export([str(tmp_path / "run"), str(tmp_path / "graph")]) == 0, capsys.readouterr().err
    assert "logits" in (tmp_path / "graph" / "export.json").read_text()
    arguments = [str(tmp_path / "run"), str(tmp_path), "--out", str(tmp_path / "explained"), "--limit", "2"]
    assert explain(arguments) == 0, capsys.readouterr().err
