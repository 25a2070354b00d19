"""`fovea export` of detectors with proposals: trained for a moment on real photos, exported, run by the example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import DataSource
from finetune.data.examples import Examples
from finetune.export.command import main
from finetune.export.graph import Graph
from finetune.export.quantize import with_graph
from finetune.heads.boxes import rcnn_graph
from finetune.release import open_task, write_release
from finetune.tasks import open_examples
from finetune.tasks.base import Task
from pretrain.models.export.graph import session
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
NUCLEI = Path(__file__).parents[3] / "samples/nuclei"
VAL = [f"images={NUCLEI / 'val'}", f"annotations={NUCLEI / 'val.json'}"]
HEAD: dict[str, Any] = {
    "channels": 16,
    "scales": [2],
    "anchors": [12, 24],
    "ratios": [1.0],
    "rpn_convs": 1,
    "before_nms": [100, 60],
    "proposals": [60, 50],
    "roi_batch": 32,
    "box_convs": 0,
    "box_dim": 32,
    "mask_convs": 1,
    "norm": "none",
}


def nuclei(task: Task, part: str, limit: int) -> Examples:
    source = DataSource(images=str(NUCLEI / part), annotations=str(NUCLEI / f"{part}.json"), limit=limit)
    return open_examples(task.config, source)


def trained(head: dict[str, Any], *, steps: int = 60) -> Task:
    """A detector of nuclei, trained for seconds: bad, but its boxes are of the photos."""
    task = small_task("detection", head={**HEAD, **head}, size=64, scale=[1.0, 2.0], max_detections=30)
    examples = nuclei(task, "train", 24)
    task = small_task(
        "detection", head={**HEAD, **head}, size=64, scale=[1.0, 2.0], max_detections=30, classes=examples.classes
    ).train()
    optimizer, rng = torch.optim.AdamW(task.parameters(), lr=2e-3), np.random.default_rng(0)
    transform = task.train_transform()
    for step in range(steps):
        chosen = [examples[int(i)] for i in rng.integers(len(examples), size=4)]
        loss = task(task.collate([transform(one, rng) for one in chosen]), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task.eval()


def photos(task: Task, folder: Path, count: int) -> list[Path]:
    examples = nuclei(task, "val", count)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(examples.file(i))  # pyright: ignore[reportAttributeAccessIssue]
    return paths


@pytest.fixture(scope="module", params=["faster_rcnn", "cascade"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The release of a detector, and the folder of its ONNX graph, made by the command."""
    folder = tmp_path_factory.mktemp(request.param)
    cascade = {"name": "mask_rcnn", "cascade": True}
    task = trained(cascade if request.param == "cascade" else {"name": request.param})
    release = write_release(folder / "release", task, {"source": {"title": "a test"}})
    assert main([str(release), str(folder / "out"), "--int8", "--images", "4", "--val", *VAL, "limit=8"]) == 0
    return release, folder / "out"


def test_a_graph_of_a_detector_finds_the_boxes_of_the_task_at_three_sizes(exported: tuple[Path, Path]):
    release, out = exported
    task, _ = open_task(release)
    examples, patch = nuclei(task, "val", 3), Graph(task).patch
    for size in ((48, 48), (64, 64), (128, 96)):
        own = task.at_size(size)
        theirs = with_graph(own, session(out / "model.onnx"), patch=patch, fixed=None)
        batch = own.collate([own.eval_transform()(examples[i]) for i in range(3)])
        with torch.no_grad():
            pairs = list(zip(own.predict(batch), theirs.predict(batch), strict=True))
        assert sum(len(one.boxes) for one, _ in pairs) > 10  # pyright: ignore[reportAttributeAccessIssue]
        for one, other in pairs:
            assert_equal(one, other)


def assert_equal(one: Any, other: Any) -> None:
    assert np.array_equal(one.labels, other.labels)
    assert np.allclose(one.boxes, other.boxes, atol=1e-2) and np.allclose(one.scores, other.scores, atol=1e-4)
    assert (one.masks is None) == (other.masks is None)


def test_the_example_gives_the_rows_of_predict(exported: tuple[Path, Path], tmp_path: Path):
    from finetune.predict import main as predict

    release, out = exported
    task, _ = open_task(release)
    files = [str(path) for path in photos(task, tmp_path, 3)]
    assert predict([str(release), *files, "--out", str(tmp_path / "own"), "--no-pictures", "--device", "cpu"]) == 0
    own = json.loads((tmp_path / "own/predictions.json").read_text())
    done = subprocess.run([sys.executable, "-I", out / "example.py", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(own) > 10
    order = lambda row: (row["image_id"], -row["score"])  # noqa: E731
    for one, other in zip(sorted(own, key=order), sorted(found, key=order), strict=True):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"], abs=0.02)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1.5)
        if "segmentation" in one:
            assert overlap(one, other) > 0.9
    code = (out / "example.py").read_text()
    assert "finetune" not in code and "torch" not in code


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    from pycocotools import mask

    size = other["segmentation"]["size"]
    theirs = mask.frPyObjects(other["segmentation"], *size)
    if mask.area(one["segmentation"]) == mask.area(theirs) == 0:  # the box is between the centres of pixels
        return 1.0
    return float(mask.iou([one["segmentation"]], [theirs], [0])[0, 0])


def test_export_json_holds_the_numbers_of_both_at_three_sizes(exported: tuple[Path, Path]):
    facts = json.loads((exported[1] / "export.json").read_text())
    for name in ("model.pt2", "model.onnx"):
        rows = facts["on_photos"][name]
        assert len({tuple(row["size"]) for row in rows}) == 3 and all(row["images"] == 4 for row in rows)
        for row in rows:
            primary = next(iter(row["task"]))
            assert row["graph"][primary] == pytest.approx(row["task"][primary], abs=0.005)
    int8 = facts["int8"]
    assert int8["drop"] == pytest.approx(int8["model.onnx"]["box_ap"] - int8["model.int8.onnx"]["box_ap"])
    speed = facts["latency"]
    assert speed["model.int8.onnx"]["megabytes"] < speed["model.onnx"]["megabytes"]
    assert 0 < speed["model.onnx"]["quartiles"][0] <= speed["model.onnx"]["median"]
    assert facts["input"]["preparation"]["fit"] == [64, 64] and facts["outputs"][:3] == ["boxes", "scores", "labels"]


def test_dense_detections_are_those_of_the_lists_where_there_are_few_and_none():
    torch.manual_seed(0)
    images, content = torch.rand(2, 3, 64, 80), torch.tensor([[64, 80], [40, 33]])
    for head in ({"name": "faster_rcnn", "score_threshold": 0.36}, {"name": "mask_rcnn", "score_threshold": 1.0}):
        task: Any = small_task("detection", size=64, head={**HEAD, **head}, max_detections=30)
        with torch.no_grad():
            normalized = (images - task.mean) / task.std
            own = task.head.rcnn.predict(task.dense, normalized, sizes=[(64, 80), (40, 33)])
            found = rcnn_graph.as_lists(*task.detections(normalized, content))
        for one, other in zip(own, found, strict=True):
            assert len(one["boxes"]) == len(other["boxes"])
            assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in ("boxes", "scores", "labels"))


def test_a_detector_without_photos_is_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = small_task("detection", size=64, head={**HEAD, "name": "faster_rcnn"})
    release = write_release(tmp_path / "release", task, {"source": {"title": "a test"}})
    assert main([str(release), str(tmp_path / "out")]) == 2
    assert "compared on photos of the validation set" in capsys.readouterr().err
