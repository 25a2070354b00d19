"""Images with objects: a COCO annotation file and the images it names, in a folder, a tar or shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finetune.data.coco.coco_json import CocoEntry, CocoFile, read_coco
from finetune.data.coco.instance_table import InstanceTable
from finetune.data.coco.instances import no_instances
from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.orientation import decode_annotated, report_orientations
from finetune.predictions import Classes
from pretrain.core.images import DataOrientation
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.views.decode import DecodeError


def open_examples(
    section: Any, source: Any, *, classes: Classes | None = None, orientation: DataOrientation = "auto"
) -> CocoExamples:
    """The images of a `finetune.config.DataSource` with their objects.

    Args:
        section: with `with_masks` and `empty_images`, see `DetectionConfig`.
        classes: of the training set, which the labels of another set must belong to; None: this is the training set.
        orientation: `data.orientation`.

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
    if section.empty_images == "report":
        for entry in content.entries:
            if entry.id not in content.instances:
                findings.add("image without objects", str(path), entry.id, f"{entry.file_name} is taken as background")
    chosen = [entry for entry in content.entries if entry.id in content.instances or not drop]
    named = _named(chosen, files, path, findings)
    found = CocoExamples(content, files, named, findings, masks=section.with_masks, orientation=orientation)
    if orientation == "auto":
        report_orientations(findings, files, found.names, lambda place: (named[place][0].height, named[place][0].width))
    return found


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
        orientation: DataOrientation = "auto",
    ) -> None:
        nothing = no_instances(masks=masks)
        objects = [content.instances.get(entry.id, nothing) for entry, _ in named]
        self.has_objects = np.array([bool((~found.crowd).any()) for found in objects])
        if not self.has_objects.any():
            raise ValueError(f"{content.path}: no object that can be used{_why(findings)}")
        self.files, self.findings, self.classes = files, findings, content.classes
        self.orientation: DataOrientation = orientation
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
            image = decode_annotated(self.files.read(name), size, self.orientation, name=path, what="annotations")
        except (DecodeError, OSError) as error:
            raise BadExample(path, str(error)) from error
        return Example(self.ids[index], name, image, self.table[index])

    def _digest(self) -> str:
        total = hashlib.sha256(self.files.fingerprint(self.names).encode())
        for part in (self.ids, self.names, list(self.classes), list(self.classes.category_ids)):
            total.update(repr(part).encode())
        total.update(self.table.digest())
        return total.hexdigest()


def _named(
    entries: Sequence[CocoEntry], files: Files, path: Path, findings: DataProblems
) -> list[tuple[CocoEntry, str]]:
    """The entries whose image exists, with its name in `files`."""
    images = [name for name in files.names if PurePosixPath(name).suffix.lower() in SUFFIXES]
    whole = set(images)
    by_stem: dict[tuple[str | None, str], list[PurePosixPath]] = {}  # and by the last folder, "" for none; None: any
    for file in map(PurePosixPath, images):
        for folder in (file.parent.name, None):
            by_stem.setdefault((folder, file.stem), []).append(file)
    found: list[tuple[CocoEntry, str]] = []
    for entry in entries:
        wanted = PurePosixPath(entry.file_name)
        name = str(wanted) if str(wanted) in whole else _nearest(wanted, by_stem)
        if name is None:
            findings.add("missing image", str(path), entry.id, f"{entry.file_name} is not among the images")
        else:
            found.append((entry, name))
    if entries and not found:
        some = ", ".join(images[:3]) or "no image"
        raise ValueError(f"{path}: none of its {len(entries)} images exists: it names {entries[0].file_name}, "
                         f"the images are {some}, ...")  # fmt: skip
    twice = next((name for name, count in Counter(name for _, name in found).items() if count > 1), None)
    if twice is not None:
        ids = [entry.id for entry, name in found if name == twice]
        raise ValueError(f"{path}: the images {ids} are all {twice}")
    return found


def _nearest(wanted: PurePosixPath, by_stem: Mapping[tuple[str | None, str], Sequence[PurePosixPath]]) -> str | None:
    """The file with the same last part of the name, else the same without suffix; None unless there is exactly one.

    Folders may be missing on either side; a file in another folder is another image.
    """
    folders = (wanted.parent.name, "") if wanted.parent.name else (None,)
    alike = [file for folder in folders for file in by_stem.get((folder, wanted.stem), ())]
    same = [file for file in alike if _ends_alike(file.parent.parts, wanted.parent.parts)]
    for some in ([file for file in same if file.name == wanted.name], same):
        if len(some) == 1:
            return str(some[0])
    return None


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one of two paths ends with the other."""
    shorter = min(len(a), len(b))
    return a[len(a) - shorter :] == b[len(b) - shorter :]


def _why(findings: DataProblems) -> str:
    if not len(findings):
        return ""
    counts = ", ".join(f"{count} x {kind}" for kind, count in findings.counts().items())
    boxes = "; task.head.name=faster_rcnn or detr needs boxes only" if "bad mask" in findings.counts() else ""
    return f"; problems: {counts}; the first: {findings.lines(1)[0]}{boxes}"
