"""Photos that a camera stored turned: labels lie on the pixels that the annotator saw, and what is assumed is said."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data.coco import rle
from finetune.data.examples import BadExample, DataProblems, Examples
from finetune.data.reading import Reading
from finetune.tasks import open_examples
from finetune.tasks.configs.classification import ClassificationConfig
from finetune.tasks.configs.depth import DepthConfig
from finetune.tasks.configs.detection import DetectionConfig
from finetune.tasks.configs.segmentation import SegmentationConfig
from pretrain.data.views.orientation import upright
from tests.data.photos import stored

HEIGHT, WIDTH = 24, 40
BOX = (4, 2, 11, 7)  # x, y, width, height, away from every symmetry
MASKS = DetectionConfig(head={"name": "mask_rcnn"})  # pyright: ignore[reportArgumentType]
EVERY = range(1, 9)


def shown(side: int = WIDTH) -> np.ndarray:
    """A dark photo with one bright object in BOX."""
    pixels = np.full((HEIGHT, side, 3), 20, np.uint8)
    x, y, width, height = BOX
    pixels[y : y + height, x : x + width] = 230
    return pixels


def object_map(side: int = WIDTH) -> np.ndarray:
    return (shown(side)[..., 0] > 100).astype(np.uint8)


def photos(folder: Path, orientations: Any, *, side: int = WIDTH, image_format: str = "JPEG") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for tag in orientations:
        name = f"{tag}.{image_format.lower()}"
        (folder / "images" / name).write_bytes(stored(shown(side), tag, image_format))
    return folder / "images"


def coco(folder: Path, orientations: Any, *, side: int = WIDTH, image_format: str = "JPEG") -> DataSource:
    """Photos of every orientation, annotated upright."""
    x, y, width, height = BOX
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    found = {
        "images": [
            {"id": tag, "file_name": f"{tag}.{image_format.lower()}", "width": side, "height": HEIGHT}
            for tag in orientations
        ],
        "annotations": [
            {"id": tag, "image_id": tag, "category_id": 1, "bbox": BOX, "segmentation": [polygon], "iscrowd": 0}
            for tag in orientations
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    images = photos(folder, orientations, side=side, image_format=image_format)
    (folder / "ann.json").write_text(json.dumps(found))
    return DataSource(images=str(images), annotations=str(folder / "ann.json"))


def label_maps(folder: Path, orientations: Any, maps: dict[int, np.ndarray] | None = None) -> DataSource:
    images = photos(folder, orientations)
    (folder / "masks").mkdir()
    for tag in orientations:
        Image.fromarray((maps or {}).get(tag, object_map())).save(folder / "masks" / f"{tag}.png")
    (folder / "classes.json").write_text('["background", "cell"]')
    return DataSource(images=str(images), masks=str(folder / "masks"), classes=str(folder / "classes.json"))


def kinds(examples: Examples) -> list[str]:
    assert isinstance(examples.findings, DataProblems)
    return list(examples.findings.counts())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("packed", [False, True])
def test_boxes_and_masks_lie_on_the_bright_pixels_of_every_orientation(tmp_path: Path, image_format: str, packed: bool):
    source = coco(tmp_path, EVERY, image_format=image_format)
    if packed:
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(source.images if isinstance(source.images, str) else "", arcname=".")
        source = source.model_copy(update={"images": str(tmp_path / "images.tar")})
    examples = open_examples(MASKS, source)
    assert len(examples) == 8
    for example in (examples[i] for i in range(8)):
        assert example.image.shape == (HEIGHT, WIDTH, 3)
        left, top, right, bottom = example.target.boxes[0].astype(int)
        assert example.image[top:bottom, left:right].mean() > 220
        assert (example.image[rle.decode_one(example.target.masks[0]) > 0] > 150).all()


def test_maps_of_classes_and_of_depth_lie_on_the_upright_photo(tmp_path: Path):
    examples = open_examples(SegmentationConfig(), label_maps(tmp_path, EVERY))
    for example in (examples[i] for i in range(8)):
        assert ((example.image[..., 0] > 100) == (example.target == 1)).all()
    (tmp_path / "depth").mkdir()
    for tag in EVERY:
        Image.fromarray(1000 + 500 * object_map().astype(np.uint16)).save(tmp_path / "depth" / f"{tag}.png")
    source = DataSource(images=str(tmp_path / "images"), depth=str(tmp_path / "depth"))
    examples = open_examples(DepthConfig(), source)
    for example in (examples[i] for i in range(8)):
        assert ((example.image[..., 0] > 100) == (example.target > example.target.min())).all()


def test_a_map_that_was_saved_with_the_tag_of_its_photo_is_turned_with_it(tmp_path: Path):
    source = label_maps(tmp_path, [6])
    (tmp_path / "masks" / "6.png").write_bytes(stored(object_map(), 6))
    example = open_examples(SegmentationConfig(), source)[0]
    assert ((example.image[..., 0] > 100) == (example.target == 1)).all()


def test_photos_with_a_class_are_upright_or_as_stored(tmp_path: Path):
    photos(tmp_path / "cell", EVERY, image_format="PNG")
    source = DataSource(images=str(tmp_path))
    examples = open_examples(ClassificationConfig(), source)
    assert all((examples[i].image == shown()).all() for i in range(8))
    examples = open_examples(ClassificationConfig(), source, reading=Reading(orientation="stored"))
    assert (upright(examples[5].image, 6) == shown()).all()


def test_only_what_the_sides_do_not_decide_is_reported_and_the_key_settles_it(tmp_path: Path):
    source = coco(tmp_path / "a", EVERY)
    examples = open_examples(MASKS, source)
    assert kinds(examples) == ["EXIF orientation assumed"]
    (line,) = examples.findings.lines()
    assert "3 of 8 images looked at" in line and "data.orientation=stored" in line and "2.jpeg" in line
    assert not kinds(open_examples(MASKS, source, reading=Reading(orientation="exif")))
    assert not kinds(open_examples(MASKS, coco(tmp_path / "b", [1, 5, 6, 7, 8])))
    square = open_examples(MASKS, coco(tmp_path / "c", EVERY, side=HEIGHT))
    assert "7 of 8 images looked at" in square.findings.lines()[0]
    assert kinds(open_examples(SegmentationConfig(), label_maps(tmp_path / "d", EVERY))) == ["EXIF orientation assumed"]


def test_annotations_that_fit_only_the_stored_pixels_are_used_with_them(tmp_path: Path):
    examples = open_examples(SegmentationConfig(), label_maps(tmp_path, [6, 8], {6: np.rot90(object_map())}))
    assert kinds(examples) == ["annotated as stored"] and "1 of 2 images" in examples.findings.lines()[0]
    for example, shape in ((examples[0], (WIDTH, HEIGHT)), (examples[1], (HEIGHT, WIDTH))):
        assert example.image.shape[:2] == shape
        assert ((example.image[..., 0] > 100) == (example.target == 1)).all()


def test_a_chosen_orientation_is_never_changed_by_the_sides(tmp_path: Path):
    source = label_maps(tmp_path, [6], {6: np.rot90(object_map())})
    with pytest.raises(BadExample, match=r"data\.orientation=exif, its EXIF orientation is 6; auto fits"):
        open_examples(SegmentationConfig(), source, reading=Reading(orientation="exif"))[0]
    example = open_examples(SegmentationConfig(), source, reading=Reading(orientation="stored"))[0]
    assert ((example.image[..., 0] > 100) == (example.target == 1)).all()
    with pytest.raises(BadExample, match=r"data\.orientation=stored, its EXIF orientation is 8"):
        open_examples(MASKS, coco(tmp_path / "b", [8]), reading=Reading(orientation="stored"))[0]


def test_stored_leaves_every_photo_as_it_lies_in_the_file(tmp_path: Path):
    examples = open_examples(MASKS, coco(tmp_path, [3], image_format="PNG"), reading=Reading(orientation="stored"))
    assert not kinds(examples)
    assert (examples[0].image == shown()[::-1, ::-1]).all()


def test_no_more_than_a_thousand_images_are_looked_at_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune.data.orientation.LOOKED_AT", 4)
    examples = open_examples(MASKS, coco(tmp_path, EVERY))
    assert "of 4 images looked at" in examples.findings.lines()[0]
