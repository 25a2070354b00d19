"""The images to explain, with their labels and the regions of their objects, where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.config import DataSource
from finetune.data import classification, multi_label
from finetune.data.coco import examples as coco
from finetune.data.coco import rle
from finetune.data.coco.instances import Instances
from finetune.data.examples import BadExample, Example
from finetune.data.reading import Reading
from finetune.explain.subjects import Aim, Subject
from finetune.predict import find_images
from finetune.predictions import Classes
from finetune.tasks import open_examples
from finetune.tasks.base import Task
from pretrain.core.configlib import validate
from pretrain.core.files import read_bytes
from pretrain.data.formats.stored import DecodeError
from pretrain.data.image_list import SUFFIXES as LISTS
from pretrain.data.shards.listing import is_shard

FOUND = 0.5  # overlap (IoU) of a detection with the true object that it found


class ImageFiles:
    """Image files without labels."""

    classes = Classes()

    def __init__(self, files: Sequence[Path], reading: Reading):
        self.files: list[Path] = list(files)
        self.reading = reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.files[index]
        try:
            image = self.reading.photo(read_bytes(path))
        except (OSError, DecodeError) as error:
            raise BadExample(str(path), str(error)) from error
        return Example(str(path), str(path), image, None)


class ImageSet:
    """Images of any kind.

    Attributes:
        examples: the images. labelled: whether they have the labels of the task.
        objects: annotated objects by the name of the image, for networks whose labels hold no places; None: none.
    """

    def __init__(self, examples: Any, *, labelled: bool, objects: dict[str, Instances] | None = None):
        self.examples, self.labelled, self.objects = examples, labelled, objects

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """Raises BadExample if it cannot be decoded."""
        return self.examples[index]

    @property
    def has_regions(self) -> bool:
        """Whether there are boxes or masks to compare maps with."""
        target = _first_target(self.examples)
        places = isinstance(target, Instances) or (isinstance(target, np.ndarray) and target.ndim == 2)
        return self.objects is not None or (self.labelled and places)

    def region(self, subject: Subject, example: Example, aim: Aim) -> np.ndarray | None:
        """Where the thing is that was explained, bool [h, w] of the canvas: the object that a detection found, the
        pixels of a segmenter's class, all annotated objects for others; None where it is nowhere."""
        target = example.target if self.objects is None else self.objects.get(str(example.id))
        if isinstance(target, Instances):
            chosen = target.select(~target.crowd) if aim.box is None else _found(subject, example, target, aim)
            mask = None if chosen is None or not len(chosen) else painted(chosen, example.image.shape[:2])
        elif isinstance(target, np.ndarray) and target.ndim == 2:
            mask = target == aim.label
        else:
            return None
        return None if mask is None or not mask.any() else subject.on_canvas(mask)


def open_images(task: Task | None, given: Sequence[str], annotations: str | None, *, reading: Reading) -> ImageSet:
    """The images named on the command line.

    Args:
        task: the fine-tuned task, whose labels are read where the images have them; None: a backbone.
        given: files, folders and patterns; or one source as the task's `data.val.images` is: class folders, a csv,
            shards, a tar.
        annotations: COCO json, or a folder or tar of label maps for a segmenter.
        reading: of the images: channels, orientation and range.

    Raises:
        ValueError: nothing can be read there.
    """
    name = None if task is None else task.config.name
    if name in (None, "classification", "multi_label") and len(given) == 1 and _has_labels(given[0], task):
        source = validate(DataSource, {"images": given[0]}, source="IMAGES")
        reader = multi_label if name == "multi_label" else classification
        examples = reader.open_examples(None, source, classes=None if task is None else task.classes, reading=reading)
        return ImageSet(examples, labelled=True, objects=_objects(given[0], annotations, reading))
    if annotations is None:
        return ImageSet(ImageFiles(find_images(given), reading), labelled=False)
    if len(given) != 1:
        raise ValueError(f"--annotations {annotations}: they belong to one folder of images, {len(given)} were given")
    if task is not None and name in ("detection", "segmentation"):
        key = "annotations" if annotations.endswith(".json") else "masks"
        source = validate(DataSource, {"images": given[0], key: annotations}, source="IMAGES and --annotations")
        examples = open_examples(task.config, source, classes=task.classes, reading=reading)
        return ImageSet(examples, labelled=True)
    found = _open_objects(given[0], annotations, reading)
    objects = {str(id): found.table[place] for place, id in enumerate(found.ids)}
    return ImageSet(found, labelled=False, objects=objects)


def painted(objects: Instances, size: Sequence[int]) -> np.ndarray:
    """bool [H, W] of an image: the union of the masks, or else of the boxes."""
    mask = np.zeros((size[0], size[1]), dtype=bool)
    for place, box in enumerate(objects.boxes):
        if objects.masks is not None:
            mask |= rle.decode_one(objects.masks[place]).astype(bool)
        else:
            (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return mask


def _has_labels(where: str, task: Task | None) -> bool:
    """Whether these images have classes: shards, a list, or folders named as the classes of the task."""
    path = Path(where)
    if "{" in where or path.suffix.lower() in LISTS or (path.is_file() and is_shard(path)):
        return True
    inside = list(path.iterdir()) if path.is_dir() else []
    return any(is_shard(one) or (one.is_dir() and task is not None and one.name in task.classes) for one in inside)


def _objects(where: str, annotations: str | None, reading: Reading) -> dict[str, Instances] | None:
    """By the name of the image, as class folders name it."""
    if annotations is None:
        return None
    found = _open_objects(where, annotations, reading)
    return {PurePosixPath(name).as_posix(): found.table[place] for place, name in enumerate(found.names)}


def _open_objects(where: str, annotations: str, reading: Reading) -> coco.CocoExamples:
    source = validate(DataSource, {"images": where, "annotations": annotations}, source="IMAGES and --annotations")
    boxes_only: Any = SimpleNamespace(with_masks=False, empty_images="keep")
    return coco.open_examples(boxes_only, source, reading=reading)


def _first_target(examples: Any) -> Any:
    for index in range(len(examples)):
        try:
            return examples[index].target
        except BadExample:
            continue
    return None


def _found(subject: Subject, example: Example, truth: Instances, aim: Aim) -> Instances | None:
    """The true object that the explained detection found; None if it is none."""
    assert aim.box is not None and aim.label is not None
    fits = ~truth.crowd & (truth.labels == aim.label + 1)
    best, chosen = FOUND, None
    place = subject.place_of(aim)
    assert place is not None
    detected = place.numpy()
    for number in np.flatnonzero(fits):
        one = truth.select(np.array([number]))
        box = Instances(one.boxes, one.labels, one.crowd, one.areas, one.ids)
        true = subject.on_canvas(painted(box, example.image.shape[:2]))
        overlap = (true & detected).sum() / max((true | detected).sum(), 1)
        if overlap >= best:
            best, chosen = overlap, one
    return chosen
