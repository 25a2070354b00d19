"""Class maps from COCO: the masks of instances painted on one map, or the segments of panoptic PNGs.

Lin et al. 2014; Kirillov et al. 2019 ("Panoptic Segmentation"); https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.data import coco, rle
from finetune.data.examples import BadExample, Example, Findings
from finetune.data.files import Files
from finetune.data.instances import Instances
from finetune.data.label_maps import VOID, decode_segment_ids
from finetune.data.mask_pairs import NO_MAP, Pair, read_image, split_container
from finetune.predictions import Classes


def open_instances(section: Any, source: Any, classes: Classes | None = None) -> PaintedInstances:
    """The images of a COCO instance file with their masks as class maps.

    Args:
        section: `background` names the class of what no mask covers; None: that is void.
    """
    background = section.background
    objects = classes
    if classes is not None and background is not None:
        objects = Classes(classes[1:], classes.category_ids[1:])
    as_detection: Any = SimpleNamespace(with_masks=True, empty_images="keep")
    found = coco.open_examples(as_detection, source, classes=objects)
    return PaintedInstances(found, background)


class PaintedInstances:
    """Instances as class maps: crowds are void, of objects that overlap the smaller lies on top."""

    def __init__(self, objects: coco.CocoExamples, background: str | None):
        self.objects, self.background = objects, background
        self.classes, self.findings = objects.classes, objects.findings
        if background is not None:
            self.classes = _with_background(objects.classes, background)
        self.fingerprint = hashlib.sha256(f"{objects.fingerprint} {background}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Example:
        example = self.objects[index]
        first, rest = (0, VOID) if self.background is None else (1, 0)
        target = paint(example.target, example.image.shape[:2], first=first, rest=rest)
        return Example(example.id, example.name, example.image, target)


def paint(objects: Instances, size: tuple[int, int], *, first: int, rest: int) -> np.ndarray:
    """uint8 [H, W]: `rest` where there is nothing, void in crowds, else the label of the smallest object there.

    Args:
        first: what label 1 becomes.
    """
    target = np.full(size, rest, dtype=np.uint8)
    masks = objects.masks or []
    # Crowds first, then the larger objects: what is painted later lies on top.
    for place in np.lexsort((-objects.areas, ~objects.crowd)).tolist():
        covered = rle.decode([masks[place]], size)[0].astype(bool)
        target[covered] = VOID if objects.crowd[place] else objects.labels[place] - 1 + first
    return target


def open_panoptic(section: Any, source: Any, classes: Classes | None = None) -> PanopticMaps:
    """The images of a COCO panoptic file; `source.masks` holds its PNGs, else the folder named as the file does.

    Raises:
        ValueError: it is no panoptic file, or none of its images is there.
    """
    path = Path(source.annotations)
    where = source.masks or str(path.with_suffix(""))
    (place, prefix), (images_place, images_prefix) = split_container(where), split_container(source.images)
    return PanopticMaps(path, Files.open(images_place), images_prefix, Files.open(place), prefix)


@dataclass(frozen=True)
class _Row:
    pair: Pair
    segments: Mapping[int, int]  # ids in the PNG to labels


class PanopticMaps:
    """Images with the segments of their PNG as class maps; unlabelled pixels and crowds are void."""

    def __init__(self, path: Path, images: Files, images_prefix: str, targets: Files, prefix: str) -> None:
        data = _load(path)
        self.images, self.targets, self.findings = images, targets, Findings()
        try:
            pairs = sorted((int(row["id"]), str(row["name"])) for row in data["categories"])
            names = {row["id"]: str(row["file_name"]) for row in data["images"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: categories need id and name, images id and file_name: {error!r}") from error
        self.classes = Classes([name for _, name in pairs], [number for number, _ in pairs])
        labels = {number: label for label, number in enumerate(self.classes.category_ids)}
        self.rows: list[_Row] = []
        here, there = set(images.names), set(targets.names)
        for row in data["annotations"]:
            found = self._row(path, row, names, labels, (images_prefix, here), (prefix, there))
            if found is not None:
                self.rows.append(found)
        if not self.rows:
            raise ValueError(f"{path}: no image has a panoptic PNG in {targets.where} and its file in {images.where}")
        annotated = {row.get("image_id") for row in data["annotations"]}
        for number, name in names.items():
            if number not in annotated:
                self.findings.add(NO_MAP, str(path), number, f"{name} has no annotation; left out")
        digest = hashlib.sha256(f"{images.fingerprint} {targets.fingerprint}".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        image = read_image(self.images, row.pair.image)
        data, where = self.targets.read(row.pair.target), self.targets.path(row.pair.target)
        try:
            ids = decode_segment_ids(data)
        except ValueError as error:
            raise BadExample(where, str(error)) from error
        if ids.shape != image.shape[:2]:
            sizes = f"{ids.shape[1]} x {ids.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}"
            raise BadExample(where, f"the map has {sizes}")
        present, places = np.unique(ids, return_inverse=True)
        unknown = [int(segment) for segment in present if segment and int(segment) not in row.segments]
        if unknown:
            raise BadExample(where, f"segments {unknown[:5]} are not in the annotations")
        labels = np.array([row.segments.get(int(segment), VOID) for segment in present], dtype=np.uint8)
        return Example(row.pair.id, self.images.path(row.pair.image), image, labels[places].reshape(ids.shape))

    def _row(
        self,
        path: Path,
        row: Any,
        names: Mapping[Any, str],
        labels: Mapping[int, int],
        images: tuple[str, set[str]],
        targets: tuple[str, set[str]],
    ) -> _Row | None:
        """One annotation, or None after adding what is wrong with it."""
        number: Any = row.get("image_id") if isinstance(row, dict) else None
        if number not in names:
            return self.findings.add(
                "unknown image", str(path), str(number), "annotation of an image that is not listed"
            )
        image = _there(images, names[number])
        target = _there(targets, str(row.get("file_name")))
        if image is None:
            return self.findings.add("missing image", str(path), number, f"{names[number]} is not among the images")
        if target is None:
            return self.findings.add(
                NO_MAP, str(path), number, f"{row.get('file_name')} is not in {self.targets.where}"
            )
        segments: dict[int, int] = {}
        for segment in row.get("segments_info", ()):
            category = segment.get("category_id")
            if category not in labels:
                text = f"segment {segment.get('id')} of category {category}, which is not listed: void"
                self.findings.add("class out of range", str(path), number, text)
            segments[segment["id"]] = VOID if segment.get("iscrowd") else labels.get(category, VOID)
        return _Row(Pair(str(number), image, target), segments)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as COCO json: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if missing:
        raise ValueError(f"{path}: no list named {', '.join(missing)}; a COCO panoptic file has one")
    return data


def _there(place: tuple[str, set[str]], name: str) -> str | None:
    """The file of that name below a prefix, or of its last part."""
    prefix, names = place
    wanted = PurePosixPath(name)
    keys: Sequence[str] = (f"{prefix}{wanted}", f"{prefix}{wanted.name}")
    return next((key for key in keys if key in names), None)


def _with_background(classes: Classes, background: str) -> Classes:
    ids = classes.category_ids
    if background in classes:
        raise ValueError(f"task.background: {background!r} is the name of a class; choose another")
    return Classes([background, *classes], [0 if 0 not in ids else max(ids) + 1, *ids])
