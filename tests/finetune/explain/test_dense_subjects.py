"""Detectors and segmenters: what is explained stays, and its true region is found on the canvas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.coco.instances import Instances
from finetune.data.examples import Example
from finetune.data.reading import PHOTOS
from finetune.explain.command import main
from finetune.explain.data import ImageSet, open_images
from finetune.explain.dense_subjects import subject_of_task
from finetune.explain.maps import METHODS, NotExplainableError, read_rows
from finetune.explain.subjects import Aim, Subject
from finetune.release import write_release
from tests.finetune.small_tasks import small_task

RCNN = {
    "name": "mask_rcnn", "channels": 16, "scales": [1], "anchors": [8, 16], "ratios": [1.0], "rpn_convs": 1,
    "box_convs": 0, "box_dim": 16, "mask_convs": 1, "score_threshold": 0.01,
}  # fmt: skip
BOXES = {"size": 32, "test_size": 32, "final_norm": True}
TASKS = {
    "mask_rcnn": ("detection", {"head": RCNN, **BOXES}),
    "cascade": ("detection", {"head": {**RCNN, "cascade": True}, **BOXES}),
    "detr": (
        "detection",
        {"head": {"name": "detr", "num_queries": 6, "width": 32, "depth": 1, "num_heads": 2}, **BOXES},
    ),
    "eomt": ("detection", {"head": {"name": "eomt", "num_queries": 6, "num_blocks": 1}, **BOXES}),
    "linear": ("segmentation", {"head": {"name": "linear"}, "crop": 32, "resize": 32}),
    "upernet": (
        "segmentation",
        {"vit": {"depth": 4}, "head": {"name": "upernet", "width": 16}, "crop": 32, "resize": 32},
    ),
    "eomt pixels": (
        "segmentation",
        {"head": {"name": "eomt", "num_queries": 6, "num_blocks": 1}, "crop": 32, "resize": 32},
    ),
}


def subject(kind: str) -> Subject:
    name, section = TASKS[kind]
    return subject_of_task(small_task(name, **section), kind)


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(i, f"{i}.png", rng.integers(0, 255, (40, 30, 3), np.uint8), None) for i in range(count)]


@pytest.mark.parametrize("kind", TASKS)
def test_every_head_has_a_score_with_a_gradient_and_a_map(kind: str):
    found = subject(kind)
    images = torch.stack([found.prepare(example) for example in examples(2)])
    assert images.shape == (2, 3, 32, 32)
    aims = [aim for aim in found.aims(images) if aim is not None]
    images = images[: len(aims)]
    assert aims, "untrained, but it answers"
    scores = found.scores(images, aims)
    for aim, score in zip(aims, scores.tolist(), strict=True):
        assert 0 <= score <= 1 and aim.label is not None and found.classes[aim.label] in aim.text
        assert (aim.box is None) == (found.kind == "segmentation")
    assert torch.equal(scores, found.scores(images, aims))
    assert METHODS["occlusion"].compute(found, images, aims, None).abs().sum() > 0
    try:
        relevance = METHODS["relevance"].compute(found, images, aims, None)
    except NotExplainableError as error:  # its queries join the tokens of the last blocks
        assert kind.startswith("eomt") and "not the 16 patches of an image" in str(error)
    else:
        assert relevance.shape == (len(aims), 4, 4) and (relevance >= 0).all() and relevance.sum() > 0


def test_the_score_of_a_detection_is_that_of_its_box_wherever_the_other_boxes_are():
    found = subject("mask_rcnn")
    image = torch.stack([found.prepare(examples(1)[0])])
    (aim,) = found.aims(image)
    assert aim is not None
    moved = image.clone()
    assert torch.equal(found.scores(moved, [aim]), found.scores(image, [aim]))
    assert not torch.equal(found.scores(found.substrate(image), [aim]), found.scores(image, [aim]))


def test_maps_are_read_where_the_detection_is():
    found = subject("mask_rcnn")
    attention = torch.zeros(1, 1, 17, 17)
    attention[0, 0, 1 + 5, 1 + 9] = 1  # the patch at row 1, column 1 attends to patch 9
    inside, outside = (Aim("cat", 0, box=torch.tensor(box)) for box in ([8.0, 8, 16, 16], [0.0, 0, 8, 8]))
    assert read_rows(found, attention, [inside])[0, 0].tolist() == [0.0] * 9 + [1.0] + [0.0] * 6
    assert not read_rows(found, attention, [outside]).any()


def test_the_region_of_a_detection_is_the_true_object_that_it_found():
    found = subject("mask_rcnn")
    boxes = np.array([[3, 4, 15, 20], [18, 20, 28, 36]], np.float32)
    truth = Instances(boxes, np.array([2, 2]), np.zeros(2, bool), np.ones(2, np.float32), np.arange(2))
    example = Example(7, "a.png", examples(1)[0].image, truth)
    images = ImageSet([example], labelled=True)
    scale = 32 / 40  # fitted into 32 x 32 at the upper left
    aim = Aim("dog", 1, box=torch.tensor(boxes[1] * scale + 0.5))
    region = images.region(found, example, aim)
    assert region is not None and region.shape == (32, 32)
    rows, columns = np.nonzero(region)
    assert (rows.min(), columns.min()) == pytest.approx((16, 14), abs=1) and rows.max() < 30 and columns.max() < 24
    assert images.region(found, example, Aim("cat", 0, box=aim.box)) is None  # of another class
    assert images.region(found, example, Aim("dog", 1, box=torch.tensor([0.0, 28, 4, 32]))) is None  # found nothing


def test_the_padding_of_a_canvas_is_no_region():
    found = subject("mask_rcnn")
    region = found.on_canvas(np.ones((40, 30), bool))
    assert region[:, :24].all() and not region[:, 25:].any()


def test_a_segmenter_explains_its_largest_class_and_the_region_is_that_class():
    found = subject("linear")
    images = torch.stack([found.prepare(examples(1)[0])])
    (aim,) = found.aims(images)
    assert aim is not None and aim.label is not None and aim.reads.any()
    target = np.full((40, 30), 255, np.uint8)
    target[:20] = aim.label
    example = Example(0, "a.png", examples(1)[0].image, target)
    region = ImageSet([example], labelled=True).region(found, example, aim)
    assert region is not None and 0.3 < region.mean() < 0.7 and region[0].all() and not region[-1].any()


def write_set(folder: Path) -> Path:
    """Photos with a bright square each, and its box in a COCO file."""
    (folder / "images").mkdir(parents=True)
    rows, boxes = [], []
    for number in range(5):
        image = np.full((32, 32, 3), 60 + 10 * number, np.uint8)
        x, y = 2 + 4 * number, 8
        image[y : y + 8, x : x + 8] = 230
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        rows.append({"id": number, "file_name": f"{number}.png", "height": 32, "width": 32})
        boxes.append(
            {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, 8, 8], "area": 64, "iscrowd": 0,
             "segmentation": [[x, y, x + 8, y, x + 8, y + 8, x, y + 8]]}
        )  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    content = {"images": rows, "annotations": boxes, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["classifier", "mask_rcnn"])
def test_boxes_of_a_coco_file_are_the_regions(kind: str, tmp_path: Path):
    folder = write_set(tmp_path / "set")
    section = {"resize": 32} if kind == "classifier" else TASKS["mask_rcnn"][1]
    from finetune.predictions import Classes

    classes = Classes(("cat", "dog", "cow"), (1, 2, 3))
    task = small_task("classification" if kind == "classifier" else "detection", classes=classes, **section)
    release = write_release(tmp_path / "release", task, {"source": {}})
    given = [
        str(release),
        str(folder / "images"),
        "--annotations",
        str(folder / "all.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*given, "--method", "relevance", "--limit", "3", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "out" / "explain.json").read_text())
    if kind == "classifier":
        assert found["area"]["value"] == pytest.approx(64 / 1024, abs=0.01)
        assert all(row["mass"]["count"] == 3 and row["pointing"]["count"] == 3 for row in found["maps"])
    else:
        assert {row["of"] for row in found["slices"]} <= {"image", "object"} and found["measure"]


def test_annotations_of_several_places_are_refused(tmp_path: Path):
    folder = write_set(tmp_path / "set")
    files = [str(path) for path in (folder / "images").iterdir()]
    with pytest.raises(ValueError, match="they belong to one folder of images, 5 were given"):
        open_images(None, files, str(folder / "all.json"), reading=PHOTOS)
