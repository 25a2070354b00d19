"""Views of images with objects: boxes and masks stay on the pixels they were on."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.coco import rle
from finetune.data.coco.instances import Instances
from finetune.data.examples import Example
from finetune.data.transforms.detection import CropView, DetectionEval, DetectionTrain, Mirror, fitted

FILL = (1, 2, 3)
RED = (250, 0, 0)


def example(
    size: tuple[int, int], *rectangles: tuple[int, int, int, int], crowd: int = 0, masks: bool = True
) -> Example:
    """Red rectangles (x1, y1, x2, y2) on black, the last `crowd` of them crowds."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    drawn = np.zeros((len(rectangles), *size), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(drawn, rectangles, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[y1:y2, x1:x2] = RED
    boxes = np.array(rectangles, dtype=np.float32).reshape(-1, 4)
    crowds = np.arange(len(rectangles)) >= len(rectangles) - crowd
    labels = np.arange(1, len(rectangles) + 1)
    areas = drawn.sum((1, 2)).astype(np.float32)
    target = Instances(boxes, labels, crowds, areas, labels, masks=rle.encode(drawn) if masks else None)
    return Example(1, "x", image, target)


def train(**changes: Any) -> DetectionTrain:
    arguments: dict[str, Any] = {"size": (32, 48), "scale": (0.5, 2.0), "hflip": 0.5, "vflip": 0.5}
    arguments |= {"photometric": False, "masks": True, "crowds": False, "fill": FILL}
    return DetectionTrain(**{**arguments, **changes})


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(20, 70), st.integers(20, 70)),
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(5, 8), st.integers(5, 8)),
)
def test_masks_cover_the_pixels_of_their_object_in_every_view(seed: int, size: tuple[int, int], place: Any):
    x, y, wide, high = place
    sample = train()(example(size, (x, y, x + wide, y + high)), np.random.default_rng(seed))
    red = sample["image"][0].int()
    if not len(sample["boxes"]):
        assert (red > 125).sum() <= 2 * 32, "at most a sliver at the border"
        return
    mask = sample["masks"][0].bool()
    # A reduced image is smoothed at the corners of the object, its mask is not.
    assert (red[mask] > 80).all(), "masked pixels are red"
    assert (red[~mask] < 155).all(), "other pixels are not"
    rows, columns = torch.where(mask)
    around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sample["boxes"][0].tolist() == [float(side) for side in around]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.booleans())
def test_boxes_of_a_detector_of_boxes_are_those_around_the_masks(seed: int, fill: bool):
    one = example((40, 60), (3, 4, 30, 33), (35, 10, 59, 39))
    with_masks = train()(one, np.random.default_rng(seed))
    alone = train(masks=False)(one, np.random.default_rng(seed))
    assert "masks" not in alone
    for box, label in zip(with_masks["boxes"], with_masks["labels"], strict=True):
        other = alone["boxes"][alone["labels"] == label]
        assert len(other) == 1
        assert (other[0] - box).abs().max() <= 1


def test_objects_outside_the_crop_are_left_out_and_no_box_is_empty():
    one = example((64, 64), (0, 0, 6, 6), (58, 58, 64, 64), (20, 20, 44, 44))
    seen = set()
    for seed in range(40):
        sample = train(size=(24, 24), scale=(2.0, 2.0))(one, np.random.default_rng(seed))
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        assert (sides >= 1).all()
        assert sample["boxes"].min() >= 0 if len(sides) else True
        assert sample["masks"].flatten(1).any(1).all()
        seen.add(len(sides))
    assert seen >= {1, 2}


def test_an_image_without_objects_gives_empty_targets_of_the_right_shapes():
    sample = train()(example((40, 60)), np.random.default_rng(0))
    assert sample["boxes"].shape == (0, 4)
    assert sample["labels"].shape == (0,)
    assert sample["masks"].shape == (0, 32, 48)


def test_crowds_are_no_targets_and_can_be_masked_out():
    one = example((32, 48), (2, 2, 10, 10), (20, 10, 40, 30), crowd=1)
    plain = train(scale=(1.0, 1.0), hflip=0, vflip=0, crowds=True)
    for masks in (True, False):
        sample = DetectionTrain(**{**plain.__dict__, "masks": masks})(one, np.random.default_rng(0))
        assert sample["labels"].tolist() == [1]
        expected = torch.ones(32, 48, dtype=torch.bool)
        expected[10:30, 20:40] = False
        assert torch.equal(sample["valid"], expected)
        assert sample["ignored"].tolist() == [[20, 10, 40, 30]]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_a_mirrored_image_is_the_image_of_mirrored_pixels(axes: tuple[int, ...]):
    one = example((20, 30), (3, 4, 9, 16))
    mirror = Mirror(axes, (20, 30))
    mask = mirror.masks(rle.decode(one.target.masks, (20, 30)))
    assert np.array_equal(mirror.boxes(one.target.boxes), rle.boxes(rle.encode(mask)))
    assert (np.flip(one.image, axes)[mask[0] > 0] == RED).all()


def test_the_same_generator_gives_the_same_view_in_a_worker():
    one, transform = example((40, 60), (3, 4, 30, 33)), train(photometric=True)
    first = transform(one, np.random.default_rng(3))
    again = pickle.loads(pickle.dumps(transform))(one, np.random.default_rng(3))
    assert all(torch.equal(first[name], again[name]) for name in first)


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.tuples(st.integers(8, 1024), st.integers(8, 1024)))
def test_a_fitted_image_fills_its_canvas_in_one_direction_and_keeps_its_shape(size: Any, canvas: Any):
    height, width = fitted(size, canvas)
    assert height <= canvas[0]
    assert width <= canvas[1]
    assert height == canvas[0] or width == canvas[1]
    if min(height, width) > 1:
        assert abs(height / size[0] - width / size[1]) <= 0.5 / min(size)


def test_a_view_of_the_complete_image_changes_no_mask():
    rng = np.random.default_rng(0)
    mask = (rng.random((17, 23)) < 0.4).astype(np.uint8)
    view = CropView((17, 23), (17, 23), 0, 0, (17, 23))
    assert np.array_equal(view.mask(mask, np.array([0, 0, 23, 17], dtype=np.float32)), mask)


def test_evaluation_fits_the_complete_image_at_the_top_left():
    sample = DetectionEval((32, 48), FILL)(example((40, 30), (0, 0, 30, 40)))
    assert sample["content"].tolist() == [32, 24]
    assert sample["original_size"].tolist() == [40, 30]
    assert (sample["image"][0, :, :24] == RED[0]).all()
    assert (sample["image"][:, :, 24:] == torch.tensor(FILL)[:, None, None]).all()
