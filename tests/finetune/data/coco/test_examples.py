"""COCO files: what is read is what was annotated, and nothing that is wrong is trained on."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from finetune.config import DataSource
from finetune.data.coco import rle
from finetune.data.coco.examples import open_examples
from finetune.data.examples import BadExample
from finetune.data.subset import subset
from finetune.predictions import Classes
from finetune.tasks.configs import DetectionConfig
from pretrain.core.configlib import ConfigError
from tests.finetune.data.coco.coco_files import (
    BOXES,
    HEIGHT,
    MASKS,
    ROOT,
    SQUARE,
    WHOLE,
    WIDTH,
    annotation,
    kinds,
    opened,
    write,
)


def test_labels_count_from_one_in_the_order_of_the_ids_whatever_the_ids(tmp_path: Path):
    examples = opened(tmp_path, [annotation(1, category=40), annotation(2, category=0)])
    assert examples.classes == ("zero", "late")
    assert examples.classes.category_ids == (0, 40)
    assert examples[0].target.labels.tolist() == [2, 1]
    assert examples[0].id == 7
    assert not kinds(examples)


def test_polygons_and_both_kinds_of_run_lengths_are_one_mask(tmp_path: Path):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[3:9, 2:10] = 1
    runs, last = [0], 0
    for value in mask.T.flatten().tolist():
        if value != last:
            runs, last = [*runs, 0], value
        runs[-1] += 1
    packed = rle.encode(mask[None])[0]
    forms = [SQUARE["segmentation"], {"size": [HEIGHT, WIDTH], "counts": runs}, packed]
    examples = opened(tmp_path, [annotation(i, segmentation=form) for i, form in enumerate(forms, 1)])
    decoded = rle.decode(examples[0].target.masks, (HEIGHT, WIDTH))
    assert len(decoded) == 3
    assert (decoded == mask).all()


def test_run_lengths_are_unpacked_as_pycocotools_packs_them():
    rng = np.random.default_rng(0)
    for side in (3, 40, 200):
        mask = (rng.random((side, 2 * side)) < 0.3).astype(np.uint8)
        mask[: side // 2] = 0
        text = coco_mask.encode(np.asfortranarray(mask))["counts"]
        runs = rle._runs(text)
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(2 * side, side).T, mask)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("box outside the image", {"bbox": [30, 3, 8, 6]}),
        ("empty box", {"bbox": [2, 3, 0, 6]}),
        ("bad box", {"bbox": [2, 3, float("nan"), 6]}),
        ("bad box", {"bbox": [2, 3, 8]}),
        ("bad box", {"bbox": "2 3 8 6"}),
        ("class out of range", {"category_id": 3}),
        ("class out of range", {"category_id": None}),
        ("class out of range", {"category_id": [0]}),
        ("unknown image", {"image_id": 8}),
        ("unknown image", {"image_id": [7]}),
        ("bad mask", {"segmentation": {"size": [HEIGHT + 1, WIDTH], "counts": [0, (HEIGHT + 1) * WIDTH]}}),
        ("bad mask", {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [50, HEIGHT * WIDTH - 50]}}),
        ("bad mask", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 20]}}),
        ("bad mask", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [50, HEIGHT * WIDTH, -50]}}),
        ("bad mask", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": WHOLE["counts"] + "P"}}),
        ("bad mask", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "nonsense~"}}),
        ("bad mask", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}),
        ("bad mask", {"segmentation": [[2, 3, 10, 3]]}),
        ("bad mask", {"segmentation": [[2, 3, 10, 3, None, 4]]}),
        ("bad mask", {"segmentation": [[2, 3], [2, 3, 10, 3, 10, float("nan")]]}),
        ("bad mask", {"segmentation": [[2, 3, 1e9, 3, 1e9, 9]]}),
        ("bad mask", {"segmentation": []}),
        ("mask outside its box", {"bbox": [14, 10, 8, 6]}),
        ("repeated annotation", {"id": 1}),
    ],
)
def test_wrong_entries_are_reported_and_left_out(tmp_path: Path, kind: str, wrong: dict[str, Any]):
    examples = opened(tmp_path, [annotation(1), annotation(2) | wrong])
    assert kinds(examples) == {kind: 1}
    assert (~examples[0].target.crowd).sum() == 1
    assert (
        examples.findings.lost == ({} if kind == "repeated annotation" else {kind: 1}) and examples.findings.labels == 2
    )
    finding = examples.findings.found[0]
    assert finding.file.endswith("train.json")
    assert finding.id in ("1", "2")
    with pytest.raises(ValueError, match=r"data\.strict"):
        examples.findings.check(True)


@pytest.mark.parametrize("ids", [(0, 0, 0), ("a", "b", "c"), (None, 1, 2), (1, 2, 2), (2**63, 1, 2)])
def test_ids_of_annotations_are_not_needed(tmp_path: Path, ids: tuple[Any, ...]):
    rows = [annotation(id, bbox=[2, 3, 8, 5 + i]) for i, id in enumerate(ids)]
    examples = opened(tmp_path, rows)
    assert len(examples[0].target) == 3 and len(set(examples[0].target.ids.tolist())) == 3
    assert kinds(examples) == {"annotations without own ids": 1} and not examples.findings.lost
    assert "of 3 annotations have no id of their own, the first is annotations[" in examples.findings.lines()[0]


def test_numbers_may_be_text(tmp_path: Path):
    size = {"width": str(WIDTH), "height": float(HEIGHT)}
    images = [{"id": "7", "file_name": "a.png", **size}, {"id": "b", "file_name": "b.png", **size}]
    polygon = [[str(value) for value in SQUARE["segmentation"][0]]]
    rows = [
        annotation(1, image=7, category_id="40", iscrowd="0", bbox=["2", "3", "8.0", "6"]),
        annotation(2, image="b", category_id=0.0, iscrowd=0.0, segmentation=polygon),
        annotation(3, image="b", iscrowd="1"),
    ]
    categories = [{"id": "40", "name": "late"}, {"id": 0, "name": "zero"}]
    examples = opened(tmp_path, rows, images=images, categories=categories)
    assert not len(examples.findings) and examples.classes.category_ids == (0, 40)
    assert [examples[i].target.labels.tolist() for i in range(2)] == [[2], [1, 1]]
    assert examples[1].target.crowd.tolist() == [False, True] and [examples[i].id for i in range(2)] == [7, "b"]
    with pytest.raises(ValueError, match="a category needs an integer id and a name"):
        opened(tmp_path, rows, categories=[{"id": 1.5, "name": "half"}])


def test_a_stray_piece_costs_the_piece_and_not_the_object(tmp_path: Path):
    wrong = [[128.0, 128.0], [], [2, 3, 10, 3, 10, float("nan")], [2, 3, 10, 3, 1e9, 9], "x"]
    examples = opened(tmp_path, [annotation(1), annotation(2, segmentation=[*SQUARE["segmentation"], *wrong])])
    first, second = rle.decode(examples[0].target.masks, (HEIGHT, WIDTH))
    assert (first == second).all() and kinds(examples) == {"bad polygon piece": 5} and not examples.findings.lost
    flat = opened(tmp_path, [annotation(1, segmentation=SQUARE["segmentation"][0])])
    assert (rle.decode(flat[0].target.masks, (HEIGHT, WIDTH))[0] == first).all() and not kinds(flat)


@pytest.mark.parametrize(
    ("section", "wrong", "label", "region"),
    [
        (MASKS, {"segmentation": []}, 1, [2, 3, 10, 9]),
        (MASKS, {"bbox": [20, 3, 8.5, 6], "segmentation": []}, 1, [20, 3, 24, 9]),
        (MASKS, {"bbox": None, "segmentation": []}, 1, [0, 0, WIDTH, HEIGHT]),
        (MASKS, {"bbox": "none"}, 1, [2, 3, 10, 9]),
        (MASKS, {"category_id": 3}, 0, [2, 3, 10, 9]),
        (MASKS, {"bbox": [14, 10, 8, 6]}, 1, [2, 3, 22, 16]),
        (BOXES, {"category_id": "x"}, 0, [2, 3, 10, 9]),
        (BOXES, {"bbox": [1, 2]}, 1, [0, 0, WIDTH, HEIGHT]),
        (BOXES, {"bbox": [30, 3, 8, 6]}, 1, None),
        (BOXES, {"bbox": [3, 3, 0, 6]}, 1, None),
    ],
)
def test_where_an_object_is_left_out_there_is_an_ignored_region_and_no_background(
    tmp_path: Path, section: DetectionConfig, wrong: dict[str, Any], label: int, region: list[int] | None
):
    target = opened(tmp_path, [annotation(1), annotation(2) | wrong], section)[0].target
    assert target.crowd.tolist() == [False, *([True] if region else [])]
    if region:
        assert target.boxes[1].tolist() == region and target.labels[1] == label
        if section is MASKS:
            assert rle.boxes(target.masks)[1].tolist() == region


def test_an_image_whose_objects_are_all_left_out_is_no_background(tmp_path: Path):
    rows = [annotation(1), annotation(2, image=9, category=3), annotation(3, image=9, bbox=[30, 3, 8, 6])]
    for choice in ("report", "keep", "drop"):
        examples = opened(tmp_path, rows, MASKS.model_copy(update={"empty_images": choice}))
        assert examples.ids == [7] and examples.findings.counts()["image without a usable object"] == 1
        assert "image without objects" not in examples.findings.counts()
    measured = open_examples(MASKS, write(tmp_path, rows), classes=Classes(["zero", "late"], [0, 40]))
    assert measured.ids == [7], "nor are its detections false"


def test_more_lost_objects_than_the_limit_are_refused_with_the_counts(tmp_path: Path):
    rows = [annotation(i) for i in range(1, 9)]
    rows += [annotation(9, category=3), annotation(10, segmentation=[]), annotation(11, category=3)]
    findings = opened(tmp_path, rows).findings
    findings.check_lost(0.28, source="data.train")
    with pytest.raises(ConfigError) as error:
        findings.check_lost(0.05, source="data.train")
    assert "3 of 11 labels cannot be used: 2 x class out of range, 1 x bad mask; the limit" in str(error.value)
    assert "data.max_lost_fraction=0.273" in str(error.value) and "category_id 3 is not among" in str(error.value)
    source = write(tmp_path, [annotation(1), annotation(2, image=9), annotation(3, image=9)])
    (tmp_path / "images" / "b.png").unlink()
    assert open_examples(MASKS, source).findings.lost == {"missing image": 2}


def test_a_box_beyond_the_border_is_clipped_and_reported_unless_by_rounding(tmp_path: Path):
    over = annotation(1, bbox=[20, 3, 8, 6], segmentation=[[20, 3, 28, 3, 28, 9, 20, 9]])
    rounding = annotation(2, bbox=[20, 3, 4.6, 6], segmentation=[[20, 3, 24, 3, 24, 9, 20, 9]])
    examples = opened(tmp_path, [over, rounding])
    assert kinds(examples) == {"box over the border": 1}
    assert examples[0].target.boxes.tolist() == [[20, 3, 24, 9], [20, 3, 24, 9]]


def test_a_missing_box_or_area_is_computed_from_the_mask(tmp_path: Path):
    without = [annotation(1, bbox=None), *(annotation(i, area=a) for i, a in enumerate((None, 0, "48"), 2))]
    target = opened(tmp_path, [*without, annotation(5, area=7.5)])[0].target
    assert target.boxes.tolist() == [[2, 3, 10, 9]] * 5
    assert target.areas.tolist() == [48, 48, 48, 48, 7.5]


def test_two_images_that_are_one_file_are_refused(tmp_path: Path):
    size = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": 7, "file_name": "a.png", **size}, {"id": 9, "file_name": "old/a.png", **size}]
    with pytest.raises(ValueError, match=r"the images \[7, 9\] are all a\.png"):
        opened(tmp_path, [annotation(1)], images=images)


def test_a_box_detector_needs_no_masks(tmp_path: Path):
    without = annotation(1)
    del without["segmentation"]
    examples = opened(tmp_path, [without], BOXES)
    assert examples[0].target.masks is None
    assert not kinds(examples)
    with pytest.raises(ValueError, match=r"no object that can be used.*1 x bad mask.*task\.head\.name=faster_rcnn"):
        opened(tmp_path, [without], MASKS)


def test_a_part_without_objects_is_refused(tmp_path: Path):
    whole = opened(tmp_path, [annotation(1, image=9), annotation(2, iscrowd=1)])
    with pytest.raises(ValueError, match="the 1 images chosen have no object; take more"):
        subset(whole, DataSource(images="x", limit=1))
    assert len(subset(whole, DataSource(images="x", limit=2))) == 2


def test_images_without_objects_are_background_unless_they_are_dropped(tmp_path: Path):
    for choice, length, found in (("report", 2, 1), ("keep", 2, 0), ("drop", 1, 0)):
        section = MASKS.model_copy(update={"empty_images": choice})
        examples = opened(tmp_path, [annotation(1)], section)
        assert (len(examples), len(examples.findings)) == (length, found)
    classes = Classes(["zero", "late"], [0, 40])
    dropping = MASKS.model_copy(update={"empty_images": "drop"})
    measured = open_examples(dropping, write(tmp_path, [annotation(1)]), classes=classes)
    assert len(measured) == 2, "what is measured on stays whole"
    assert len(measured[1].target) == 0


def test_crowds_are_kept_for_the_metric_but_are_no_objects(tmp_path: Path):
    assert opened(tmp_path, [annotation(1), annotation(2, iscrowd=1)])[0].target.crowd.tolist() == [False, True]
    with pytest.raises(ValueError, match="no object that can be used"):
        opened(tmp_path, [annotation(1, iscrowd=1)])


def test_a_file_without_ground_truth_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"train\.json: no object that can be used"):
        opened(tmp_path, [])


def test_missing_images_are_reported_and_no_image_is_an_error(tmp_path: Path):
    source = write(tmp_path, [annotation(1), annotation(2, image=9)])
    (tmp_path / "images" / "b.png").unlink()
    examples = open_examples(MASKS, source)
    assert kinds(examples) == {"missing image": 1}
    assert [len(examples), examples.findings.found[0].id] == [1, "9"]
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "other.png")
    with pytest.raises(
        ValueError, match=r"none of its 2 images exists: a\.png is not among the images \(other\.png, \.\.\."
    ):
        open_examples(MASKS, source)


def test_an_image_of_another_size_than_annotated_is_a_bad_example(tmp_path: Path):
    source = write(tmp_path, [annotation(1)])
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / "images" / "a.png")
    with pytest.raises(BadExample, match=r"25 x 16 pixels, its annotations 24 x 16$"):
        open_examples(MASKS, source)[0]
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a.png")
    with pytest.raises(BadExample, match=r"16 x 24 pixels, its annotations 24 x 16; width and height are exchanged$"):
        open_examples(MASKS, source)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": []}, "categories is empty"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 is given more than once"),
        ({"categories": [{"name": "a"}]}, "needs an integer id and a name"),
        ({"annotations": None}, "no list named 'annotations'"),
        ({"images": [{"id": 7, "file_name": "a.png", "width": 24, "height": 16}] * 2}, "image id 7 is given more"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, [annotation(1)], **changes)


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["cut", "nested"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, text: str):
    source = write(tmp_path, [annotation(1)])
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train\.json: not JSON"):
        open_examples(MASKS, source)


def test_classes_of_another_training_set_are_refused(tmp_path: Path):
    source = write(tmp_path, [annotation(1)])
    assert open_examples(MASKS, source, classes=Classes(["zero", "x", "late"], [0, 5, 40]))[0].target.labels[0] == 1
    with pytest.raises(ValueError, match="40 is 'late' here, 'other' in the training set"):
        open_examples(MASKS, source, classes=Classes(["zero", "other"], [0, 40]))


def test_images_are_found_in_a_tar_by_the_last_part_of_their_names(tmp_path: Path):
    source = write(tmp_path, [annotation(1)])
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in ("a", "b"):
            data = (tmp_path / "images" / f"{name}.png").read_bytes()
            member = tarfile.TarInfo(f"deep/down/{name}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    examples = open_examples(MASKS, source.model_copy(update={"images": str(tmp_path / "images.tar")}))
    assert [len(examples), examples[0].image.shape] == [2, (HEIGHT, WIDTH, 3)]


def test_shards_are_read_by_key_and_can_be_pickled():
    folder = ROOT / "samples" / "nuclei"
    source = DataSource(images=str(folder / "val"), annotations=str(folder / "val.json"))
    examples = open_examples(MASKS, source)
    copy = pickle.loads(pickle.dumps(examples))
    assert [len(copy), len(copy.table.boxes)] == [50, 1416]
    first, again = examples[3], copy[3]
    assert (first.image == again.image).all()
    assert (first.target.boxes == again.target.boxes).all()
    assert first.target.masks == again.target.masks
    assert np.abs(rle.boxes(first.target.masks) - first.target.boxes).max() <= 1
    assert np.array_equal(rle.areas(first.target.masks), first.target.areas)
    assert len(pickle.dumps(examples)) < 200 * len(copy.table.boxes)


def test_other_files_of_the_folder_do_not_change_the_fingerprint(tmp_path: Path):
    first = opened(tmp_path, [annotation(1)]).fingerprint
    (tmp_path / "images" / "runs").mkdir()
    (tmp_path / "images" / "runs" / "log.txt").write_text("a run in the same folder")
    assert opened(tmp_path, [annotation(1)]).fingerprint == first
    Image.new("RGB", (WIDTH, HEIGHT), (200, 9, 7)).save(tmp_path / "images" / "a.png", pnginfo=None, compress_level=0)
    assert open_examples(MASKS, DataSource(images=str(tmp_path / "images"), annotations=str(tmp_path / "train.json"))
                         ).fingerprint != first  # fmt: skip


def test_the_fingerprint_includes_the_annotations(tmp_path: Path):
    first = opened(tmp_path, [annotation(1)]).fingerprint
    assert opened(tmp_path, [annotation(1)]).fingerprint == first
    assert opened(tmp_path, [annotation(1, bbox=[2, 3, 8, 5])]).fingerprint != first


def test_a_polygon_covers_the_pixels_that_another_library_draws(tmp_path: Path):
    points = [(4.0, 2.0), (20.0, 5.0), (12.0, 14.0)]
    drawn = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(drawn).polygon(points, fill=1)
    flat = [value for point in points for value in point]
    given = annotation(1, segmentation=[flat], bbox=[4, 2, 16, 12])
    mask = rle.decode(opened(tmp_path, [given])[0].target.masks, (HEIGHT, WIDTH))[0]
    both, either = (mask & np.asarray(drawn)).sum(), (mask | np.asarray(drawn)).sum()
    assert both / either > 0.7  # Pillow draws the border too
    assert abs(int(mask.sum()) - 84) < 6, "the area of the triangle"
