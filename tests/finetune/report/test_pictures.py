"""Pictures say what is right and what is wrong: by their colours, their counts and their sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.coco import rle
from finetune.data.coco.instances import Instances
from finetune.predictions import Detected
from finetune.report import canvas
from finetune.report.labels import classification_picture
from finetune.report.maps import depth_picture, overlay_classes, segmentation_picture
from finetune.report.objects import detection_picture, judge

GRAY = np.full((100, 120, 3), 128, np.uint8)
CLASSES = ("cat", "dog")


def instances(boxes: list, labels: list, *, crowd: list | None = None, masks: list | None = None) -> Instances:
    made = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (made[:, 2] - made[:, 0]) * (made[:, 3] - made[:, 1])
    flags = np.array(crowd or [False] * len(made), dtype=bool)
    return Instances(made, np.array(labels, np.int64), flags, areas, np.arange(len(made)), masks)


def detected(boxes: list, labels: list, scores: list, masks: list | None = None) -> Detected:
    return Detected(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(scores), masks)


def test_a_true_object_is_matched_once_by_the_highest_score():
    truth = instances([[10, 10, 30, 30]], [1])
    found = judge(truth, detected([[10, 10, 30, 30], [11, 10, 31, 30]], [1, 1], [0.6, 0.9]))
    assert found.verdicts == ["false", "right"]
    assert found.found.all() and not found.missed.any()


def test_an_object_predicted_as_another_class_is_confused_not_missed():
    truth = instances([[10, 10, 30, 30], [60, 10, 80, 30]], [1, 1])
    found = judge(truth, detected([[10, 10, 30, 30]], [2], [0.9]))
    assert found.verdicts == ["confused"]
    assert found.missed.tolist() == [False, True] and not found.found.any()


def test_a_correct_class_with_a_lower_score_beats_a_wrong_one():
    truth = instances([[10, 10, 30, 30]], [1])
    found = judge(truth, detected([[10, 10, 30, 30], [10, 10, 30, 30]], [2, 1], [0.9, 0.4]))
    assert found.verdicts == ["false", "right"]


def test_predictions_in_a_crowd_are_neither_right_nor_false():
    truth = instances([[0, 0, 100, 100]], [1], crowd=[True])
    found = judge(truth, detected([[10, 10, 30, 30]], [1], [0.9]))
    assert found.verdicts == ["crowd"] and not found.missed.any()


def test_masks_are_compared_if_both_sides_have_them():
    left, right = np.zeros((2, 100, 120), np.uint8)
    left[10:30, 10:20], right[10:30, 20:30] = 1, 1
    truth = instances([[10, 10, 30, 30]], [1], masks=rle.encode(left[None]))
    prediction = detected([[10, 10, 30, 30]], [1], [0.9], rle.encode(right[None]))
    assert judge(truth, prediction).verdicts == ["false"]
    prediction = detected([[10, 10, 30, 30]], [1], [0.9], None)
    assert judge(truth, prediction).verdicts == ["right"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(0, 8))
def test_every_true_object_is_found_confused_or_missed(seed: int, objects: int, predictions: int):
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        corners = rng.integers(0, 6, (count, 2)) * 10.0
        return np.concatenate([corners, corners + rng.integers(1, 4, (count, 2)) * 10], axis=1)

    truth = instances(boxes(objects), rng.integers(1, 3, objects).tolist(), crowd=(rng.random(objects) < 0.2).tolist())
    found = judge(truth, detected(boxes(predictions), rng.integers(1, 3, predictions), rng.random(predictions)))
    counted = int((~truth.crowd).sum())
    assert found.verdicts.count("right") == found.found.sum()
    assert found.verdicts.count("right") + found.verdicts.count("confused") + found.missed.sum() == counted
    assert not (found.found & found.missed).any() and not (truth.crowd & (found.found | found.missed)).any()


def test_truth_and_prediction_are_next_to_the_image():
    truth, prediction = instances([[10, 10, 30, 30]], [1]), detected([[10, 10, 30, 30]], [1], [0.9])
    alone = detection_picture(GRAY, truth, None, CLASSES)
    both = detection_picture(GRAY, truth, prediction, CLASSES)
    assert both.shape[1] > alone.shape[1]
    assert (both == canvas.RIGHT).all(-1).sum() > 50
    assert not (both == canvas.RIGHT).all(-1)[:, : alone.shape[1]][32:295].any()  # the truth is not judged


def test_a_missed_object_is_drawn_dashed_on_the_prediction():
    picture = detection_picture(GRAY, instances([[10, 10, 60, 60]], [1]), detected([], [], []), CLASSES)
    assert (picture == canvas.MISSED).all(-1).sum() > 100


def test_a_prediction_below_the_threshold_is_not_drawn_and_the_object_is_missed():
    truth, weak = instances([[10, 10, 60, 60]], [1]), detected([[10, 10, 60, 60]], [1], [0.3])
    drawn = detection_picture(GRAY, truth, weak, CLASSES, score_threshold=0.2)
    hidden = detection_picture(GRAY, truth, weak, CLASSES, score_threshold=0.5)
    panel = slice(32, 295)
    assert (drawn[panel] == canvas.RIGHT).all(-1).any() and not (hidden[panel] == canvas.RIGHT).all(-1).any()
    assert (hidden[panel] == canvas.MISSED).all(-1).any() and not (drawn[panel] == canvas.MISSED).all(-1).any()


def test_wrong_pixels_are_red_and_void_ones_are_not_evaluated():
    truth, prediction = np.zeros((100, 120), np.uint8), np.zeros((100, 120), np.uint8)
    prediction[:, 60:] = 1
    truth[:50] = 255
    picture = segmentation_picture(GRAY, truth, prediction, ("sky", "road"))
    right = picture[32:, -320:]
    red = (right[..., 0].astype(int) - right[..., 2] > 120)[:260]
    assert 0.2 < red.mean() < 0.3
    agreed = segmentation_picture(GRAY, truth, np.where(truth == 255, 7, truth), ("sky", "road"))
    assert not (agreed[32:290, -320:, 0].astype(int) - agreed[32:290, -320:, 2] > 120).any()


def test_background_keeps_the_image_and_other_classes_tint_it():
    values = np.zeros((100, 120), np.int32)
    values[:, :60] = 1
    drawn = overlay_classes(GRAY, values, ("Background", "cell"))
    assert (drawn[:, 60:] == 128).all() and not (drawn[:, :60] == 128).all()


def test_a_depth_of_another_scale_has_other_colours():
    truth = np.linspace(1, 5, 100 * 120).reshape(100, 120).astype(np.float32)
    same, twice = depth_picture(GRAY, truth, truth), depth_picture(GRAY, truth, truth * 2)
    third = slice(2 * 328, 3 * 328)
    assert np.abs(same[40:280, third].astype(int) - twice[40:280, third]).mean() > 30
    assert (same[40:280, 328:648] == same[40:280, 656:976]).all()


def test_a_wrong_class_is_marked_and_the_truth_shown_wherever_it_ranks():
    names, likely = [f"class {i}" for i in range(20)], np.linspace(0.2, 0.0, 20)
    wrong = classification_picture(GRAY, 19, likely, names)
    right = classification_picture(GRAY, 0, likely, names)
    assert (wrong == canvas.FALSE).all(-1).any() and not (right == canvas.FALSE).all(-1).any()
    assert (wrong == canvas.RIGHT).all(-1).any()
    assert (
        classification_picture(GRAY, -1, likely, names).shape == classification_picture(GRAY, None, likely, names).shape
    )


ODD_NAMES = ("$_{a$", "_background_", "caf\udce9", "two\nlines", "<b>", "\x07", "")


def test_classes_and_files_of_any_name_are_drawn():
    picture = classification_picture(GRAY, 0, np.linspace(0.4, 0.0, len(ODD_NAMES)), ODD_NAMES)
    assert picture.shape[1] > GRAY.shape[1]
    for name in ODD_NAMES:
        truth, found = instances([[10, 10, 60, 60]], [1]), detected([[10, 10, 60, 60]], [1], [0.9])
        assert detection_picture(GRAY, truth, found, (name, "other"), caption=name).dtype == np.uint8
        values = np.zeros(GRAY.shape[:2], np.uint8)
        assert segmentation_picture(GRAY, values, values, (name, "other"), caption=name).dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (40, 30), (2000, 1500)])
def test_images_of_any_size_are_drawn(size: tuple[int, int]):
    image = np.zeros((*size, 3), np.uint8)
    truth = instances([[0, 0, size[1], size[0]]], [2])
    picture = detection_picture(image, truth, detected([[0, 0, 1, 1]], [1], [1.0]), ("a", "名前"))
    assert max(picture.shape[:2]) < 2100
    assert segmentation_picture(image, np.zeros(size, int), np.zeros(size, int), ("a",)).dtype == np.uint8


def test_a_dark_image_is_brightened_and_its_title_says_so():
    dark, said = canvas.brightened(np.full((20, 20, 3), 20, np.uint8))
    assert dark.min() == 200 and "10.0x" in said
    assert canvas.brightened(GRAY) == (GRAY, "") or canvas.brightened(GRAY)[1] == ""
