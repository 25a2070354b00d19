"""Images with objects: a COCO annotation file and the images it names, in a folder, a tar or shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.coco.coco_json import CocoFile, read_coco
from finetune.data.coco.image_names import find_names
from finetune.data.coco.instance_table import InstanceTable
from finetune.data.coco.instances import no_instances
from finetune.data.coco.objects import CocoEntry
from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.orientation import decode_annotated, report_orientations
from finetune.data.reading import PHOTOS, Reading
from finetune.predictions import Classes
from pretrain.data.formats.stored import DecodeError


def open_examples(
    section: Any, source: Any, *, classes: Classes | None = None, reading: Reading = PHOTOS
) -> CocoExamples:
    """The images of a `finetune.config.DataSource` with their objects.

    Args:
        section: with `with_masks` and `empty_images`, see `DetectionConfig`.
        classes: of the training set, which the labels of another set must belong to; None: this is the training set.
        reading: of the images.

    Raises:
        ValueError: the annotations or images cannot be read or do not belong together, or no usable object is left.
    """
    if source.annotations is None:
        raise ValueError(f"{source.images}: detection needs `annotations`, a COCO json")
    findings = DataProblems()
    path = Path(source.annotations)
    content = read_coco(path, masks=section.with_masks, findings=findings, like=classes)
    files = Files.open(source.images)
    drop = section.empty_images == "drop" and classes is None
    chosen: list[CocoEntry] = []
    for entry in content.entries:
        if entry.id in content.spoiled:
            text = f"{entry.file_name}: all its objects are left out, and so is the image: it is no background"
            findings.add("image without a usable object", str(path), entry.id, text)
        elif entry.id in content.instances or not drop:
            chosen.append(entry)
            if entry.id not in content.instances and section.empty_images == "report":
                findings.add("image without objects", str(path), entry.id, f"{entry.file_name} is taken as background")
    found, reasons = find_names(path, {entry.id: entry.file_name for entry in chosen}, files)
    for id, reason in reasons.items():
        objects = content.instances.get(id)
        lost = 0 if objects is None else int((~objects.crowd).sum())
        findings.add("missing image", str(path), id, reason, lost=lost)
    named = [(entry, found[entry.id]) for entry in chosen if entry.id in found]
    examples = CocoExamples(content, files, named, findings, masks=section.with_masks, reading=reading)
    if reading.orientation == "auto":
        sides = [(entry.height, entry.width) for entry, _ in named]
        report_orientations(findings, files, examples.names, sides.__getitem__)
    return examples


class CocoExamples:
    """Targets are `Instances`; the id is the image's id in the annotation file.

    Args:
        content: of the annotation file.
        named: the entries to use, each with the name of its image in `files`.

    Attributes:
        has_objects: bool [n], True for images with an object that is no crowd.
    """

    def __init__(
        self,
        content: CocoFile,
        files: Files,
        named: Sequence[tuple[CocoEntry, str]],
        findings: DataProblems,
        *,
        masks: bool,
        reading: Reading = PHOTOS,
    ) -> None:
        nothing = no_instances(masks=masks)
        objects = [content.instances.get(entry.id, nothing) for entry, _ in named]
        self.has_objects = np.array([bool((~found.crowd).any()) for found in objects])
        if not self.has_objects.any():
            raise ValueError(f"{content.path}: no object that can be used{_why(findings)}")
        self.files, self.findings, self.classes = files, findings, content.classes
        self.reading = reading
        self.ids = [entry.id for entry, _ in named]
        self.names = [name for _, name in named]
        self.table = InstanceTable(objects, np.array([(entry.height, entry.width) for entry, _ in named]))
        self.fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        size, path = tuple(self.table.sizes[index].tolist()), self.files.path(name)
        try:
            image = decode_annotated(self.files.read(name), size, self.reading, name=path, what="annotations")
        except (DecodeError, OSError) as error:
            raise BadExample(path, str(error)) from error
        return Example(self.ids[index], name, image, self.table[index])

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.files.read(self.names[index])

    def _digest(self) -> str:
        total = hashlib.sha256(self.files.fingerprint(self.names).encode())
        for part in (self.ids, self.names, list(self.classes), list(self.classes.category_ids)):
            total.update(repr(part).encode())
        total.update(self.table.digest())
        return total.hexdigest()


def _why(findings: DataProblems) -> str:
    if not len(findings):
        return ""
    counts = ", ".join(f"{count} x {kind}" for kind, count in findings.counts().items())
    boxes = "; task.head.name=faster_rcnn or detr needs boxes only" if "bad mask" in findings.counts() else ""
    return f"; problems: {counts}; the first: {findings.lines(1)[0]}{boxes}"
