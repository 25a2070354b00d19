"""Small COCO files of two images, and what is opened of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.config import DataSource
from finetune.data.coco import rle
from finetune.data.coco.examples import CocoExamples, open_examples
from finetune.tasks.configs import DetectionConfig

ROOT = Path(__file__).parents[4]
WIDTH, HEIGHT = 24, 16
SQUARE = {"segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]], "bbox": [2, 3, 8, 6], "area": 48, "iscrowd": 0}
WHOLE = rle.encode(np.ones((1, HEIGHT, WIDTH), dtype=np.uint8))[0]
MASKS = DetectionConfig(head={"name": "mask_rcnn"})  # pyright: ignore[reportArgumentType]
BOXES = DetectionConfig(head={"name": "faster_rcnn"})  # pyright: ignore[reportArgumentType]


def annotation(number: int, image: Any = 7, category: int = 0, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, **SQUARE, **changes}


def write(folder: Path, annotations: list[dict[str, Any]], /, **changes: Any) -> DataSource:
    """Two images (ids 7 and 9) of 24 x 16 pixels in a folder, categories 0 and 40."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30)).save(images / name)
    content: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 40, "name": "late"}, {"id": 0, "name": "zero"}],
        "annotations": annotations,
    }
    path = folder / "train.json"
    path.write_text(json.dumps(content | changes))
    return DataSource(images=str(images), annotations=str(path))


def opened(tmp_path: Path, annotations: list[dict[str, Any]], section: DetectionConfig = MASKS, /, **changes: Any):
    return open_examples(section, write(tmp_path, annotations, **changes))


def kinds(examples: CocoExamples) -> dict[str, int]:
    return {kind: count for kind, count in examples.findings.counts().items() if kind != "image without objects"}
