"""Predictions of tiles become those of the whole image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.coco import rle
from finetune.data.examples import Example
from finetune.predict import main as predict
from finetune.predictions import ClassMap, DepthMap, Detected
from finetune.predictor import Predictor
from finetune.release import write_release
from finetune.tiling.objects import merge_objects
from finetune.tiling.tiled import tiled_objects
from finetune.tiling.tiles import Tile, Tiling
from tests.finetune.small_tasks import small_task

SIZE = (150, 230)
LARGE = (20, 20, 140, 130)  # no tile holds it
OBJECTS = np.array([LARGE, (150, 60, 170, 75), (2, 2, 12, 14), (200, 130, 229, 149), (88, 88, 104, 104)], np.float32)


def planted() -> np.ndarray:
    """An image whose first channel is the number of the object at each pixel, its second where the objects are."""
    image = np.zeros((*SIZE, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(OBJECTS.astype(int), start=1):
        image[y1:y2, x1:x2, 0] = number
    return image


def see(examples: Sequence[Example]) -> list[Detected]:
    """A detector that finds exactly what a part of the planted image shows; less sure of small pieces."""
    found = []
    for example in examples:
        masks = np.stack([example.image[..., 0] == number for number in range(1, len(OBJECTS) + 1)])
        seen = np.flatnonzero(masks.any((1, 2)))
        runs = rle.encode(masks[seen])
        scores = 0.5 + rle.areas(runs) / 1e5
        found.append(Detected(rle.boxes(runs), np.where(seen == 1, 2, 1), scores.astype(np.float32), runs))
    return found


@pytest.mark.parametrize("tiling", [Tiling(64, 24), Tiling(100, 30), Tiling(90, 45), Tiling(300, 10)], ids=str)
def test_every_object_is_found_once_wherever_tiles_end(tiling: Tiling):
    found = tiled_objects(Example(1, "a", planted(), None), tiling, see, batch_size=3)
    order = np.lexsort(found.boxes.T[::-1])
    expected = OBJECTS[np.lexsort(OBJECTS.T[::-1])]
    np.testing.assert_allclose(found.boxes[order], expected)
    assert found.labels[order].tolist() == [2 if tuple(box) == tuple(OBJECTS[1]) else 1 for box in expected]
    assert (np.diff(found.scores) <= 0).all()
    assert found.masks is not None
    masks = rle.decode([found.masks[place] for place in order], SIZE)
    for box, mask in zip(expected.astype(int), masks, strict=True):
        truth = planted()[..., 0] == planted()[box[1], box[0], 0]
        assert np.array_equal(mask.astype(bool), truth) or tuple(box) == LARGE  # the fifth lies in it


def test_neighbours_of_one_class_stay_two():
    image = np.zeros((*SIZE, 3), np.uint8)
    image[40:60, 50:70, 0], image[40:60, 71:90, 0] = 1, 3
    found = tiled_objects(Example(1, "a", image, None), Tiling(64, 24), see, batch_size=4)
    assert sorted(found.boxes[:, 0].tolist()) == [50, 71]


def test_objects_of_two_classes_at_one_place_stay_two():
    tiles = [Tile(0, 0, 64, 64), Tile(0, 40, 64, 64)]
    boxes = [np.array([[45, 5, 60, 25]], np.float32), np.array([[5, 5, 20, 25]], np.float32)]
    found = [Detected(box, np.array([label]), np.ones(1, np.float32)) for box, label in zip(boxes, (1, 2), strict=True)]
    assert merge_objects((64, 104), tiles, found).labels.tolist() == [1, 2]
    found[1].labels[:] = 1
    assert merge_objects((64, 104), tiles, found).labels.tolist() == [1]


def test_an_image_without_objects_has_none():
    found = tiled_objects(Example(1, "a", np.zeros((*SIZE, 3), np.uint8), None), Tiling(64, 24), see, batch_size=4)
    assert found.boxes.shape == (0, 4) and found.masks == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mask_of_a_tile_is_placed_where_it_was(data: st.DataObject):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    sides = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    part = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, sides).astype(np.uint8)
    whole = np.zeros((height, width), np.uint8)
    whole[top : top + sides[0], left : left + sides[1]] = part
    placed = rle.placed(rle.encode(part[None])[0], (top, left), (height, width))
    assert np.array_equal(rle.decode_one(placed), whole)


class PerPixel(torch.nn.Module):
    """A head whose outputs at a pixel depend on that pixel alone: tiles cannot change them."""

    gives_logits, noises, fixed_size_reason = True, {}, None  # type: ignore[var-annotated]

    def scores(self, dense: Any, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize("tiling", [Tiling(32, 8), Tiling(40, 0), Tiling(500, 100)], ids=str)
def test_maps_that_do_not_depend_on_neighbours_are_those_of_the_whole_image(tiling: Tiling):
    task = small_task("segmentation", head={"name": "linear"}, crop=32, resize=None, slide=False)
    task.head = PerPixel()
    image = np.random.default_rng(0).integers(0, 256, (75, 110, 3)).astype(np.uint8)
    predictor = Predictor(task, {})
    (whole,), (tiled,) = predictor.predict([image]), predictor.predict([image], tiling=tiling, batch_size=3)
    assert isinstance(whole, ClassMap) and isinstance(tiled, ClassMap)
    assert tiled.classes.dtype == np.uint8 and np.array_equal(tiled.classes, whole.classes)
    assert len(np.unique(whole.classes)) == 3


def test_outputs_are_averaged_where_tiles_overlap():
    task = small_task("segmentation", head={"name": "linear"}, crop=32, resize=None, slide=False)

    class Numbered(PerPixel):
        calls = 0

        def scores(self, dense: Any, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full_like(images, 0.0).index_add(
                1, torch.tensor([1 if self.calls == 1 else 2]), torch.full_like(images[:, :1], float(self.calls))
            )

    task.head = Numbered()
    (found,) = Predictor(task, {}).predict([np.zeros((32, 48, 3), np.uint8)], tiling=Tiling(32, 16), batch_size=1)
    assert isinstance(found, ClassMap)
    assert (found.classes[:, :16] == 1).all() and (found.classes[:, 16:] == 2).all()  # 1 / 2 against 2 / 2


def test_depth_is_tiled_and_a_classifier_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = np.random.default_rng(0).integers(0, 256, (48, 70, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    (depth,) = Predictor(small_task("depth", head={"name": "linear"}, crop=32), {}).predict(
        [image], tiling=Tiling(32, 8)
    )
    assert isinstance(depth, DepthMap) and depth.depth.shape == (48, 70)
    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    command = [str(release), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--tile", "32"]
    assert predict(command) == 2
    assert "--tile: a classifier has one answer for an image" in capsys.readouterr().err
    assert predict([*command, "--overlap", "32"]) == 2
    assert "tiles of 32 pixels with an overlap of 32" in capsys.readouterr().err


def test_the_command_writes_one_row_for_each_object_of_a_tiled_image(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (48, 70, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    head = {"name": "detr", "num_queries": 6, "width": 32, "depth": 1, "num_heads": 2}
    release = write_release(
        tmp_path / "release", small_task("detection", head=head, size=32), {"source": {"title": "x"}}
    )
    command = [str(release), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([*command, "--tile", "32", "--overlap", "8"]) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert rows and {row["image_id"] for row in rows} == {1}
    assert all(row["bbox"][0] >= 0 and row["bbox"][0] + row["bbox"][2] <= 70.01 for row in rows)
    (size,) = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert (size["width"], size["height"]) == (70, 48)
