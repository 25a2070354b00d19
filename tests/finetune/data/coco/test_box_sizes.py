"""Boxes as the detector sees them, and anchors that fit them or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.__main__ import main
from finetune.config import DataSource
from finetune.data.coco.box_sizes import BoxSizes, anchor_warnings, best_overlaps, box_sizes
from finetune.data.coco.examples import open_examples
from finetune.data.subset import Subset, subset
from finetune.tasks.configs import DetectionConfig
from tests.finetune.runs import make_release
from tests.runs import ROOT

NUCLEI = ROOT / "samples" / "nuclei"


def test_boxes_are_measured_in_pixels_of_the_fitted_image():
    found = BoxSizes(np.array([[10.0, 20.0], [8, 8]]), np.array([0, 1]), np.array([[100, 200], [50, 50]]), np.ones(2))
    assert found.fitted((50, 50)).tolist() == [[2.5, 5], [8, 8]]


def test_the_overlap_is_that_of_the_best_anchor_around_the_same_centre():
    boxes = np.array([[10.0, 10], [20, 5], [40, 40]])
    assert best_overlaps(boxes, [10, 20], [1.0]) == pytest.approx([1, 1 / 3, 1 / 4])
    assert best_overlaps(boxes, [10], [0.25])[1] == pytest.approx(1)  # 20 wide, 5 high


def test_a_part_of_a_set_has_the_objects_of_its_images():
    values = {"images": str(NUCLEI / "val"), "annotations": str(NUCLEI / "val.json"), "fraction": 0.4}
    source = DataSource.model_validate(values)
    whole = open_examples(DetectionConfig.model_validate({}), source)
    part = subset(whole, source)
    assert isinstance(part, Subset)
    found, table = box_sizes(part), whole.table
    assert len(box_sizes(whole).boxes) == 1416 and len(found.sizes) == 20
    counts = [int((~part[i].target.crowd).sum()) for i in range(20)]
    assert np.bincount(found.images, minlength=20).tolist() == counts
    assert (found.sizes == table.sizes[part.indices]).all()


def test_anchors_that_miss_the_boxes_are_told_with_percentiles_side_by_side():
    boxes = np.repeat(np.linspace(8, 16, 50)[:, None], 2, axis=1)
    found = BoxSizes(boxes, np.zeros(50, int), np.array([[64, 64]]), np.ones(50))
    assert anchor_warnings(found, (64, 64), [10, 14], [1.0]) == []
    said = anchor_warnings(found, (128, 128), [10, 14], [1.0])
    assert said[0].startswith("warning: task.head.anchors: 76% of the boxes")
    assert "10 % 17.6" in said[1] and "90 % 30.4" in said[1] and said[2] == "  sides of anchors: 10, 14"
    assert "task.head.anchors=[20, 27]" in said[4]


def test_a_check_warns_of_anchors_that_miss_the_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    make_release(tmp_path / "backbone")
    words = ["configs/finetune/nuclei_small.yaml", f"model.release={tmp_path / 'backbone'}", f"run_dir={tmp_path}/run"]
    assert main([*words, "--check"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main([*words, "--check", "task.head.anchors=[64, 128, 256]"]) == 0
    said = capsys.readouterr().out
    assert "of the boxes of data.train overlap no anchor by half" in said and "sides of anchors: 64, 128, 256" in said
