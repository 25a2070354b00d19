"""The program beside a graph gives the predictions of `fovea predict`, without Fovea."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.export.command import export
from finetune.heads.queries.eomt import EoMT
from finetune.predict import main as predict
from finetune.release import open_task, write_release
from tests.finetune.small_tasks import CLASSES, small_task

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"name": "classification"},
    "segmentation": {"name": "segmentation", "head": {"name": "linear"}, "crop": 32, "stride": 20, "resize": 44},
    "depth": {"name": "depth", "head": {"name": "linear"}, "crop": [32, 40], "slide": False},
    "detr": {"name": "detection", "head": {"name": "detr", "num_queries": 9, "width": 16, "depth": 1}, "size": 48},
    "eomt": {"name": "detection", "head": {"name": "eomt", "num_queries": 6, "num_blocks": 1}, "size": 64},
}


@pytest.mark.parametrize("kind", TASKS)
def test_an_example_predicts_photos_as_the_task_does(kind: str, tmp_path: Path):
    own, found, folder = both(kind, tmp_path)
    assert abs(len(own) - len(found)) <= (2 if kind == "eomt" else 0) and found  # a mask may lose its only pixel
    if "file" not in found[0]:
        return assert_rows(own, found)
    for one, other in zip(own, found, strict=True):
        if kind == "classification":
            assert other["classes"] == [one["class"]]
            for name, value in one["probabilities"].items():
                assert other["probabilities"][name] == pytest.approx(value, abs=0.02)
            continue
        stem = Path(other["file"]).stem
        theirs = np.asarray(Image.open(folder / f"{stem}.{'classes' if kind == 'segmentation' else 'depth'}.png"))
        ours = np.asarray(Image.open(folder / f"own/maps/{stem}.png"))
        if kind == "segmentation":
            assert (ours == theirs).mean() > 0.97 and len(np.unique(ours)) > 1
            assert other["fraction"][CLASSES[0]] == pytest.approx(one["fraction"].get(CLASSES[0], 0), abs=0.03)
        else:
            assert np.abs(ours.astype(float) - theirs).max() < 20 and ours.std() > 5  # millimetres
    return None


def both(kind: str, folder: Path) -> tuple[list[Any], list[Any], Path]:
    """The predictions of the task and those of the example for two photos, and the folder of their maps."""
    task = small_task(**TASKS[kind])
    for module in task.modules():
        if isinstance(module, EoMT):  # as at the end of a run
            module.mask_probability.zero_()
    release = write_release(folder / "release", task, {"source": {"title": "a test"}})
    task, record = open_task(release)
    export(task, folder / "out", record=record, onnx=True)
    rng, files = np.random.default_rng(0), []
    for number, size in enumerate(((60, 44), (50, 71))):
        coarse = rng.integers(0, 255, (6, 7, 3), np.uint8)
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    assert predict([str(release), *files, "--out", str(folder / "own"), "--no-pictures", "--device", "cpu"]) == 0
    command = [sys.executable, "-I", folder / "out/example.py", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "own/predictions.json").read_text()), json.loads(done.stdout), folder


def assert_rows(own: list[Any], found: list[Any]) -> None:
    """Rows of COCO's results: those whose scores are the highest of their image."""
    for number in (1, 2):
        mine, theirs = ([row for row in rows if row["image_id"] == number][:5] for rows in (own, found))
        for one, other in zip(mine, theirs, strict=True):
            assert one["category_id"] == other["category_id"] and one["bbox"] == pytest.approx(other["bbox"], abs=2)
            assert one["score"] == pytest.approx(other["score"], abs=0.02)


def test_settings_that_no_example_follows_are_named(tmp_path: Path):
    said: list[str] = []
    task = small_task("segmentation", head={"name": "linear"}, crop=32, scales=[1.0, 1.5])
    export(task, tmp_path, record={}, onnx=True, say=said.append)
    assert not (tmp_path / "example.py").exists()
    assert any("no example.py for task segmentation with these settings" in line for line in said)
