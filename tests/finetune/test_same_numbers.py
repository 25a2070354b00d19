"""The numbers that an evaluation prints are those of the files that `fovea predict` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.config import DataSource
from finetune.evaluate import evaluate
from finetune.predict import main
from finetune.release import write_release
from finetune.tasks import open_examples
from finetune.tasks.base import Task
from pretrain.core.distributed import World
from tests.finetune.small_tasks import small_task

EOMT = {"name": "eomt", "num_queries": 20, "num_blocks": 1}
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium")
ALONE = World(0, 1, 0, torch.device("cpu"))


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
        coarse.resize((96 + 16 * number, 110)).save(folder / f"{number}.png")
    return folder


def predicted(task: Task, images: Path, out: Path, *options: str, **record: Any) -> list[dict[str, Any]]:
    release = write_release(out / "release", task, {"source": {"title": "a test"}, **record})
    given = [str(release), str(images), "--out", str(out), "--device", "cpu", "--no-pictures", *options]
    assert main(given) == 0
    return json.loads((out / "predictions.json").read_text())


def annotations_near(rows: list[dict[str, Any]], images: Path, classes: Any) -> dict[str, Any]:
    """The first objects that another precision finds in each image: most of them are found, and not all."""
    kept: list[dict[str, Any]] = []
    for id in sorted({row["image_id"] for row in rows}):
        best = sorted((row for row in rows if row["image_id"] == id), key=lambda row: -row["score"])[:6]
        best = [row for row in best if min(row["bbox"][2:]) > 2]
        kept += [{**row, "id": len(kept) + at, "iscrowd": 0} for at, row in enumerate(best, start=1)]
    for row in kept:
        del row["score"]
        row["area"] = 0.6 * row["bbox"][2] * row["bbox"][3]
    sizes = [(number, Image.open(images / f"{number}.png").size) for number in range(len(list(images.iterdir())))]
    named = [{"id": n + 1, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in sizes]
    categories = [{"id": id, "name": name} for id, name in zip(classes.category_ids, classes, strict=True)]
    return {"images": named, "annotations": kept, "categories": categories}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_average_precision_is_that_of_pycocotools_for_the_files(tmp_path: Path, precision: Any):
    task = small_task("detection", size=64, head=EOMT)
    images = photos(tmp_path / "photos", 5)
    rough = predicted(task, images, tmp_path / "rough", precision="bf16" if precision == "fp32" else "fp32")
    path = tmp_path / "val.json"
    path.write_text(json.dumps(annotations_near(rough, images, task.classes)))
    examples = open_examples(task.config, DataSource(images=str(images), annotations=str(path)), classes=task.classes)
    scores = evaluate(task, examples, world=ALONE, batch_size=4, precision=precision).scores
    assert scores.protocol.endswith(f"; in {precision}")

    rows = predicted(task, images, tmp_path / "out", "--ids", str(path), precision=precision)
    truth = COCO(str(path))
    for kind, title in (("bbox", "box"), ("segm", "mask")):
        run = COCOeval(truth, truth.loadRes(rows), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
        found = [scores.values.get(f"{title}_{name}", -1.0) for name in NAMES]
        assert found == pytest.approx(list(run.stats)[: len(NAMES)], abs=1e-9), title
    assert 0.02 < scores.values["box_ap"] < 0.98 and 0.02 < scores.values["mask_ap"] < 0.98
