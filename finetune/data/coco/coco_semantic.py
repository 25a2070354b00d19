"""Class maps from COCO: the masks of instances painted on one map, or the segments of panoptic PNGs.

Lin et al. 2014; Kirillov et al. 2019 ("Panoptic Segmentation"); https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.data.coco import examples as coco
from finetune.data.coco import rle
from finetune.data.coco.coco_json import load, read_classes
from finetune.data.coco.ids import flag, image_id, integer
from finetune.data.coco.image_names import find_names
from finetune.data.coco.instances import Instances
from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.maps.label_maps import VOID, decode_segment_ids
from finetune.data.maps.mask_pairs import NO_MAP, Pair, fingerprint, read_pair, report_pairs, split_container
from finetune.data.reading import PHOTOS, Reading
from finetune.predictions import Classes
from pretrain.core.files import read_bytes


def open_instances(section: Any, source: Any, classes: Classes | None, reading: Reading) -> PaintedInstances:
    """The images of a COCO instance file with their masks as class maps.

    Args:
        section: `background` names the class of pixels that no mask covers; None: they are void.
    """
    background = section.background
    objects = classes
    if classes is not None and background is not None:
        objects = Classes(classes[1:], classes.category_ids[1:])
    as_detection: Any = SimpleNamespace(with_masks=True, empty_images="keep")
    found = coco.open_examples(as_detection, source, classes=objects, reading=reading)
    return PaintedInstances(found, background)


class PaintedInstances:
    """Instances as class maps: crowds are void; where objects overlap, the smaller is on top."""

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

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.objects.file(index)


def paint(objects: Instances, size: tuple[int, int], *, first: int, rest: int) -> np.ndarray:
    """uint8 [H, W]: `rest` outside objects, void in crowds, else the label of the smallest object at the pixel.

    Args:
        first: the value for label 1.
    """
    target = np.full(size, rest, dtype=np.uint8)
    masks = objects.masks or []
    # Crowds first, then objects by decreasing size: later ones are on top.
    for place in np.lexsort((-objects.areas, ~objects.crowd)).tolist():
        covered = rle.decode([masks[place]], size)[0].astype(bool)
        target[covered] = VOID if objects.crowd[place] else objects.labels[place] - 1 + first
    return target


def open_panoptic(section: Any, source: Any, classes: Classes | None, reading: Reading) -> PanopticMaps:
    """The images of a COCO panoptic file; its PNGs are in `source.masks`, by default the folder with its name.

    Raises:
        ValueError: it is no panoptic file, or none of its images exists.
    """
    if source.annotations is None:
        raise ValueError(f"{source.images}: format coco_panoptic needs `annotations`, a COCO json")
    path = Path(source.annotations)
    where = source.masks or str(path.with_suffix(""))
    (place, prefix), (images_place, images_prefix) = split_container(where), split_container(source.images)
    return PanopticMaps(path, Files.open(images_place), images_prefix, Files.open(place), prefix, reading)


@dataclass(frozen=True)
class _ImageSegments:
    pair: Pair
    segments: Mapping[int, int]  # ids in the PNG to labels


class PanopticMaps:
    """Images with the segments of their PNG as class maps; unlabelled pixels and crowds are void."""

    def __init__(
        self,
        path: Path,
        images: Files,
        images_prefix: str,
        targets: Files,
        prefix: str,
        reading: Reading = PHOTOS,
    ) -> None:
        data = load(path)
        self.reading = reading
        self.images, self.targets, self.findings = images, targets, DataProblems()
        self.classes = read_classes(path, data["categories"])
        labels = {number: label for label, number in enumerate(self.classes.category_ids)}
        names = _image_names(path, data["images"])
        rows = self._annotations(path, data["annotations"], names)
        found, absent = find_names(path, {number: names[number] for number in rows}, images, below=images_prefix)
        for number, reason in absent.items():
            self.findings.add("missing image", str(path), number, reason, lost=_count(rows[number]))
        segments = {number: self._segments(path, number, rows[number], labels) for number in found}
        pngs = {number: str(rows[number].get("file_name")) for number, given in segments.items() if given is not None}
        maps, unmapped = find_names(path, pngs, targets, below=prefix, suffixes=(".png",), what="segment maps")
        for number, reason in unmapped.items():
            self.findings.add(NO_MAP, str(path), number, reason, lost=_count(rows[number]))
        self.rows = [
            _ImageSegments(Pair(str(number), found[number], name), segments[number] or {})
            for number, name in maps.items()
        ]
        if not self.rows:
            why = "".join(f"\n  {line}" for line in self.findings.lines(3))
            raise ValueError(
                f"{path}: no image has segments, a PNG in {targets.where} and a file in {images.where}{why}"
            )
        for number in names.keys() - rows.keys():
            self.findings.add(NO_MAP, str(path), number, f"{names[number]} has no annotation; left out")
        pairs = [row.pair for row in self.rows]
        report_pairs(self.findings, images, targets, pairs, reading.orientation)
        of_files = fingerprint(pairs, images, targets)
        self.fingerprint = hashlib.sha256(of_files.encode() + read_bytes(path)).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        image, ids = read_pair(row.pair, self.images, self.targets, decode_segment_ids, self.reading)
        where = self.targets.path(row.pair.target)
        present, places = np.unique(ids, return_inverse=True)
        unknown = [int(segment) for segment in present if segment and int(segment) not in row.segments]
        if unknown:
            raise BadExample(where, f"segments {unknown[:5]} are not in the annotations")
        labels = np.array([row.segments.get(int(segment), VOID) for segment in present], dtype=np.uint8)
        return Example(row.pair.id, self.images.path(row.pair.image), image, labels[places].reshape(ids.shape))

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.images.read(self.rows[index].pair.image)

    def _annotations(
        self, path: Path, given: Sequence[Any], names: Mapping[int | str, str]
    ) -> dict[int | str, dict[str, Any]]:
        """Annotations by image id; others are reported."""
        rows: dict[int | str, dict[str, Any]] = {}
        for row in given:
            number = image_id(row.get("image_id")) if isinstance(row, dict) else None
            self.findings.labels += _count(row)
            if number is None or number not in names:
                text = "annotation of an image that is not listed"
                self.findings.add("unknown image", str(path), str(number), text, lost=_count(row))
            elif number in rows:
                text = f"{names[number]} has an earlier one"
                self.findings.add("repeated annotation", str(path), number, text, lost=0 if row == rows[number] else 1)
            else:
                rows[number] = row
        return rows

    def _segments(
        self, path: Path, number: int | str, row: dict[str, Any], labels: Mapping[int, int]
    ) -> dict[int, int] | None:
        """Labels of an image's segments by their ids, or None after reporting its problem."""
        segments: dict[int, int] = {}
        try:
            for segment in row["segments_info"]:
                identity, category = int(segment["id"]), integer(segment["category_id"])
                if category is None:
                    raise ValueError(f"category_id {segment['category_id']!r}")
                if category not in labels:
                    text = f"segment {identity} of category {segment['category_id']}, which is not listed: void"
                    self.findings.add("class out of range", str(path), number, text, lost=1)
                crowd = flag(segment.get("iscrowd"))
                segments[identity] = VOID if crowd else labels.get(category, VOID)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"its segments_info is no list of id and category_id: {error!r}"
            return self.findings.add("bad annotation", str(path), number, text, lost=_count(row))
        return segments


def _image_names(path: Path, rows: Sequence[Any]) -> dict[int | str, str]:
    """file_name of each image by its id."""
    names: dict[int | str, str] = {}
    for place, row in enumerate(rows):
        number = image_id(row.get("id")) if isinstance(row, dict) else None
        if number is None or "file_name" not in row:
            raise ValueError(f"{path}: images[{place}] has no id and file_name")
        if number in names:
            raise ValueError(f"{path}: image id {number} is given more than once")
        names[number] = str(row["file_name"])
    return names


def _count(row: Any) -> int:
    """Segments of an annotation; 1 if it has no list of them."""
    segments = row.get("segments_info") if isinstance(row, dict) else None
    return max(len(segments), 1) if isinstance(segments, list) else 1


def _with_background(classes: Classes, background: str) -> Classes:
    ids = classes.category_ids
    if background in classes:
        raise ValueError(f"task.background: {background!r} is the name of a class; choose another")
    return Classes([background, *classes], [0 if 0 not in ids else max(ids) + 1, *ids])
