"""Average precision is the reference tool's number, for any number of ranks; the quality of an image by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.data.coco import rle
from finetune.data.coco.instances import Instances, no_instances
from finetune.data.examples import Example
from finetune.metrics import average_precision
from finetune.metrics.average_precision import AveragePrecision
from finetune.metrics.image_quality import panoptic_quality
from finetune.predictions import Classes, Detected

CLASSES = Classes(["cell", "dot", "never there"], [4, 9, 12])
SIZE = (60, 80)
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium")
Pair = tuple[Instances, Detected]


def rectangles(boxes: np.ndarray) -> np.ndarray:
    masks = np.zeros((len(boxes), *SIZE), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks


def random_pair(rng: np.random.Generator, objects: int, noise: float) -> Pair:
    """Objects, the last of them a crowd now and then, and detections that are near them or made up."""
    corner = rng.integers(0, 40, (objects, 2))
    boxes = np.concatenate([corner, corner + rng.integers(4, 40, (objects, 2))], axis=1).astype(np.float32)
    boxes = np.clip(boxes, 0, [SIZE[1], SIZE[0]] * 2).astype(np.float32)
    crowd = np.zeros(objects, dtype=bool)
    crowd[-1:] = rng.random() < 0.5
    masks = rectangles(boxes)
    labels = rng.integers(1, 3, objects)
    truth = Instances(boxes, labels, crowd, masks.sum((1, 2)).astype(np.float32), np.arange(objects), rle.encode(masks))
    moved = boxes.repeat(2, axis=0)[: objects + 2] + rng.normal(0, noise, (min(2 * objects, objects + 2), 4))
    moved = np.clip(moved, 0, [SIZE[1], SIZE[0]] * 2)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 2)
    scores = rng.random(len(moved)).round(1).astype(np.float32)  # ties, too
    found = rng.integers(1, 3, len(moved))
    return truth, Detected(moved.astype(np.float32), found, scores, rle.encode(rectangles(moved)))


def pairs(seed: int = 0, images: int = 25) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [random_pair(rng, int(rng.integers(0, 8)), float(rng.uniform(0.5, 5))) for _ in range(images)]


def example(number: int, truth: Instances) -> Example:
    return Example(f"image {number}", str(number), np.zeros((*SIZE, 0), dtype=np.uint8), truth)


def measured(given: list[Pair], **changes: Any) -> AveragePrecision:
    metric = AveragePrecision(CLASSES, **{"masks": True, "data": "random rectangles", **changes})
    for number, (truth, found) in enumerate(given):
        metric.update(number, example(number, truth), found)
    return metric


def reference(given: list[Pair], kind: str, folder: Any) -> list[float]:
    """The twelve numbers of pycocotools, from annotation and result rows by its own loader; the rows are those of
    predictions.json, with a box and a mask."""
    annotations, results = [], []
    for number, (truth, found) in enumerate(given):
        for place, box in enumerate(truth.boxes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CLASSES.category_ids[truth.labels[place] - 1],
                    "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
                    "area": float(truth.areas[place]),
                    "iscrowd": int(truth.crowd[place]),
                    "segmentation": truth.masks[place] if truth.masks else None,
                }
            )
        for place, (x1, y1, x2, y2) in enumerate(found.boxes.astype(float)):
            row: Any = {"image_id": number, "category_id": CLASSES.category_ids[found.labels[place] - 1]}
            row |= {"score": float(found.scores[place]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(row | ({"segmentation": found.masks[place]} if found.masks else {}))
    truth_side = COCO()
    truth_side.dataset = {
        "info": {},
        "images": [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in range(len(given))],
        "categories": [{"id": i, "name": name} for i, name in zip(CLASSES.category_ids, CLASSES, strict=True)],
        "annotations": annotations,
    }
    truth_side.createIndex()
    run = COCOeval(truth_side, truth_side.loadRes(results), kind)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return list(run.stats)


@pytest.mark.parametrize("tool", ["pycocotools", "faster-coco-eval"])
def test_both_tools_give_the_twelve_numbers_of_pycocotools(tool: Any, tmp_path: Any):
    if tool == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    given = pairs()
    metric = measured(given, tool=tool)
    metric.gather()
    scores = metric.compute()
    for kind, title in (("bbox", "box"), ("segm", "mask")):
        for name, expected in zip(NAMES, reference(given, kind, tmp_path), strict=False):
            found = scores.values.get(f"{title}_{name}", -1.0)
            assert found == pytest.approx(expected, abs=1e-12), f"{title}_{name}"
    assert 0.02 < scores.values["box_ap"] < 0.98, "a case in which something is right and something wrong"
    assert "box_ap_large" not in scores.values, "there are no large objects"
    assert metric.protocol.startswith("COCO box and mask AP over IoU 0.50:0.05:0.95, all areas, at most 100")
    assert tool in scores.protocol


def test_the_tools_agree_on_every_point_of_every_curve():
    pytest.importorskip("faster_coco_eval")
    given = pairs(1)
    one, other = (measured(given, tool=tool).compute() for tool in ("pycocotools", "faster-coco-eval"))
    assert one.curves is not None
    assert other.curves is not None
    assert list(one.curves) == ["box, IoU 0.50", "box, IoU 0.75", "mask, IoU 0.50", "mask, IoU 0.75"]
    for title, curves in one.curves.items():
        assert set(curves) == {"cell", "dot"}, "a class without objects has no curve"
        for name, curve in curves.items():
            np.testing.assert_allclose(curve["precision"], other.curves[title][name]["precision"], atol=1e-12)


def test_perfect_detections_score_one_and_none_score_zero():
    truth = [truth for truth, _ in pairs(2)]
    perfect = [
        (t, Detected(t.boxes[~t.crowd], t.labels[~t.crowd], np.ones((~t.crowd).sum(), np.float32),
                     [m for m, c in zip(t.masks or [], t.crowd, strict=True) if not c]))
        for t in truth
    ]  # fmt: skip
    scores = measured(perfect).compute()
    assert scores.primary == ("box_ap", pytest.approx(1.0))
    assert scores.values["mask_ap75"] == pytest.approx(1.0)
    nothing = Detected(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])
    assert measured([(t, nothing) for t in truth]).compute().values["mask_ap"] == 0.0


def test_classes_are_scored_separately_with_their_counts():
    given = pairs(3)
    rows = measured(given).compute().per_class
    assert [row["name"] for row in rows] == list(CLASSES)
    for label, row in enumerate(rows, start=1):
        assert row["objects"] == sum(int(((t.labels == label) & ~t.crowd).sum()) for t, _ in given)
        assert row["detections"] == sum(int((f.labels == label).sum()) for _, f in given)
    assert "box_ap" not in rows[2]
    values = measured(given).compute().values
    assert np.mean([row["box_ap"] for row in rows[:2]]) == pytest.approx(values["box_ap"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_exactly_the_scores_of_one(ranks: int, monkeypatch: pytest.MonkeyPatch):
    given = pairs(4)
    whole = measured(given)
    whole.gather()
    parts = [AveragePrecision(CLASSES, True, "random rectangles") for _ in range(ranks)]
    for number in reversed(range(len(given))):
        truth, found = given[number]
        parts[number % ranks].update(number, example(number, truth), found)
    # a sampler that pads: the first image is measured twice
    parts[-1].update(0, example(0, given[0][0]), given[0][1])
    rows = [copy.deepcopy(part._rows) for part in parts]
    monkeypatch.setattr("finetune.metrics.metric.distributed.all_gather_object", lambda _: rows)
    parts[0].gather()
    assert parts[0].compute() == whole.compute()


def test_a_set_without_objects_has_no_average_precision():
    empty = no_instances(masks=True)
    with pytest.raises(ValueError, match="none of the 1 images has an object"):
        measured([(empty, pairs()[1][1])]).compute()


def test_masks_on_one_side_only_are_refused():
    truth, found = pairs(5)[3]
    without = Detected(found.boxes, found.labels, found.scores)
    with pytest.raises(ValueError, match="mask AP needs masks on both sides"):
        measured([(truth, without)]).compute()
    assert "mask_ap" not in measured([(truth, without)], masks=False).compute().values


def test_the_tool_limits_the_number_of_detections():
    boxes = np.array([[10, 10, 20, 20]], dtype=np.float32)
    truth = Instances(boxes, np.array([1]), np.array([False]), np.array([100.0], np.float32), np.array([1]))
    wrong = np.array([[40, 40, 50, 50]] * 3, dtype=np.float32)
    found = Detected(np.concatenate([wrong, boxes]), np.ones(4, np.int64), np.array([0.9, 0.8, 0.7, 0.6], np.float32))
    assert measured([(truth, found)], masks=False, max_detections=3).compute().values["box_ap"] == 0.0
    assert measured([(truth, found)], masks=False, max_detections=4).compute().values["box_ap"] == pytest.approx(0.25)


def test_the_quality_of_an_image_is_its_panoptic_quality():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [50, 0, 60, 60]], dtype=np.float32)
    numbers = np.array([1, 2, 1])
    truth = Instances(boxes, numbers, np.array([False, False, True]), np.ones(3, np.float32), numbers)
    found = Detected(
        np.array([[0, 0, 10, 8], [20, 20, 40, 40], [52, 4, 58, 20], [70, 40, 78, 50], [0, 0, 10, 10]], np.float32),
        np.array([1, 1, 1, 2, 1]),
        np.array([0.9, 0.8, 0.7, 0.6, 0.4], np.float32),
    )
    # One pair (IoU 0.8); of another class and out of nothing: two false; the crowd holds one; the last is not shown;
    # one object is missed.
    assert panoptic_quality(truth, found, masks=False) == pytest.approx(0.8 / (1 + 0.5 * 2 + 0.5 * 1))
    nothing = no_instances(masks=False)
    assert panoptic_quality(nothing, Detected(boxes[:0], numbers[:0], np.zeros(0, np.float32)), masks=False) == 1.0
    assert panoptic_quality(nothing, found, masks=False) == 0.0


def test_the_protocol_names_the_tool_and_its_version():
    metric = AveragePrecision(CLASSES, False, "3 images", tool="pycocotools")
    assert metric.protocol.endswith(f"3 images; {average_precision.coco_tools.describe('pycocotools')}")
    assert metric.protocol.split()[-2] == "pycocotools"
