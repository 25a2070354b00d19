"""Images with one class each: shards with `.cls` members, a folder or tar of class folders, a csv of file and class.

A label is an index into `classes`. A sample that cannot be used (no label, an unknown class, a missing file) is listed
in the findings and left out; nothing is guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finetune.data.class_names import FILE, numbered, of_numbers, read_classes
from finetune.data.convert.formats import pointer
from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.reading import PHOTOS, ImageFiles, Reading
from finetune.predictions import Classes
from pretrain.core.text import shown
from pretrain.data import image_list
from pretrain.data.formats.stored import DecodeError
from pretrain.data.image_list import read_list
from pretrain.data.labels import number_labels, splits_among
from pretrain.data.names import find_files
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.shards.listing import is_shard
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.views.decode import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    decode_sample,
)

SEPARATOR = "|"  # of several labels of an image
UNREADABLE, NO_LABEL, UNKNOWN, EMPTY = "unreadable sample", "no label", "unknown class", "class without images"


def open_examples(
    section: Any, source: Any, *, classes: Classes | None = None, reading: Reading = PHOTOS
) -> LabelledShards | LabelledFiles:
    """The labelled images of a `finetune.config.DataSource`.

    Args:
        classes: of the training set, which the labels of this set must belong to; None: read from the source.
        reading: of the images; a class does not depend on their orientation, so "auto" turns photos upright.

    Raises:
        ValueError: the source has none of the formats, has no labelled image, or its classes have other names.
    """
    found = _open(source, classes)
    found.reading = reading
    return found


def _open(source: Any, classes: Classes | None) -> LabelledShards | LabelledFiles:
    kind = source.format if source.format != "auto" else _kind(source.images)
    given = read_classes(source.classes) if source.classes else None
    where = source.images if isinstance(source.images, str) else " ".join(source.images)
    if kind == "shards":
        found = _open_shards(source.images, given, classes)
    elif kind == "csv":
        found = _open_list(Path(where), given, classes)
    else:
        found = _open_folders(where, given, classes)
    splits = splits_among(found.classes) if given is None else []
    if splits:
        way_out = (
            f"give one of them, {where}/{splits[0]}" if kind in ("folder", "tar") else "write the images of one of them"
        )
        raise ValueError(
            f"{where}: its classes {', '.join(splits)} are parts of a data set, not classes; {way_out} (if they are "
            f"classes, name them in data.*.classes)"
        )
    return found


class LabelledShards:
    """Samples of indexed shards whose `.cls` member is the number of a class.

    labels: int64 [n], indices into `classes`.
    """

    reading: Reading = PHOTOS

    def __init__(
        self, dataset: Dataset, places: np.ndarray, labels: np.ndarray, classes: Classes, findings: DataProblems
    ) -> None:
        self.reader, self.places, self.labels = Reader(dataset), places, labels
        self.classes, self.findings = classes, findings
        self.fingerprint = _digest(dataset.fingerprint, places.astype("<i8").tobytes(), labels, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        shard, sample = self.places[index].tolist()
        file, how = self.reader.dataset.names[shard], self.reading
        try:
            read = self.reader.read(shard, sample, only=IMAGE_EXTENSIONS)
            image = decode_sample(read, how.in_chans, how.of_photos, how.value_range, how.max_pixels)
        except BadSample as error:
            raise BadExample(f"{file}/{error.key}", error.reason) from error
        except DecodeError as error:
            raise BadExample(f"{file}/{self.reader.key(shard, sample)}", str(error)) from error
        name = f"{file}/{read['__key__']}"
        return Example(name, name, image, int(self.labels[index]))

    def file(self, index: int) -> bytes:
        """The image member of a sample."""
        try:
            read = self.reader.read(*self.places[index].tolist(), only=IMAGE_EXTENSIONS)
        except BadSample as error:
            raise BadExample(error.key, error.reason) from error
        return next((read[extension] for extension in IMAGE_EXTENSIONS if extension in read), b"")


class LabelledFiles(ImageFiles):
    """Image files and their labels, int64 [n], indices into `classes`."""

    def __init__(
        self, files: Files, names: Sequence[str], labels: np.ndarray, classes: Classes, findings: DataProblems
    ) -> None:
        super().__init__(files, names)
        self.labels, self.classes, self.findings = labels, classes, findings
        self.fingerprint = _digest(files.fingerprint(names), "\n".join(self.names).encode(), labels, classes)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        return Example(name, self.files.path(name), self.photo(index), int(self.labels[index]))


def _kind(images: str | list[str]) -> str:
    """The format of `data.*.images`."""
    if not isinstance(images, str):
        return "shards"
    path = Path(images)
    if path.suffix.lower() in image_list.SUFFIXES:
        return "csv"
    if path.is_dir():
        return "shards" if any(map(is_shard, path.iterdir())) else "folder"
    if is_shard(path) and not path.with_name(path.name + ".idx").is_file():
        return "tar"
    return "shards"


def _open_shards(images: str | list[str], given: Classes | None, classes: Classes | None) -> LabelledShards:
    dataset = Dataset.open(images)
    if LABEL_EXTENSION not in dataset.extensions:
        raise ValueError(
            f"{dataset.names[0]} ...: these shards have no labels, only {', '.join(dataset.extensions)}; write them "
            f"with labels (`fovea data write --help`), or give a folder of class folders"
        )
    beside = Path(dataset.paths[0]).with_name(FILE)
    own = given or (read_classes(beside) if beside.is_file() else None)
    findings, places, numbers = DataProblems(), [], []
    reader = Reader(dataset)
    for shard, count in enumerate(dataset.counts.tolist()):
        for sample in range(count):
            number = _number(reader, shard, sample, findings)
            if number is not None:
                places.append((shard, sample))
                numbers.append(number)
    reader.close()
    known = agreed_classes(own, classes, where=str(beside)) or numbered(max(numbers, default=-1) + 1)
    findings.labels = dataset.num_samples
    labels = _labels(np.array(numbers, np.int64), known)
    for place, number, label in zip(places, numbers, labels.tolist(), strict=True):
        if label < 0:
            name = dataset.names[place[0]]
            text = f"class {number} is not one of the {len(known)} classes"
            findings.add(UNKNOWN, name, reader.key(*place), text, lost=1)
    reader.close()
    keep = labels >= 0
    _need_some(keep.sum(), images, findings)
    return LabelledShards(
        dataset, np.array(places, np.int32).reshape(-1, 2)[keep], labels[keep], known, findings
    )  # fmt: skip


def _number(reader: Reader, shard: int, sample: int, findings: DataProblems) -> int | None:
    """The class number in a sample's `.cls` member."""
    name = reader.dataset.names[shard]
    try:
        read = reader.read(shard, sample, only=(LABEL_EXTENSION,))
    except BadSample as error:
        findings.add(UNREADABLE, name, error.key, error.reason, lost=1)
        return None
    text = read.get(LABEL_EXTENSION)
    try:
        if text is not None:
            return int(text)
    except ValueError:
        pass
    wrong = f"no .{LABEL_EXTENSION} member" if text is None else f".{LABEL_EXTENSION} holds {text[:30]!r}, no number"
    findings.add(NO_LABEL, name, read["__key__"], wrong, lost=1)
    return None


def _open_folders(where: str, given: Classes | None, classes: Classes | None) -> LabelledFiles:
    files = Files.open(where)
    found = [(PurePosixPath(name), name) for name in files.names]
    pictures = [(path, name) for path, name in found if path.suffix.lower() in SUFFIXES]
    findings = DataProblems(labels=sum(len(path.parts) > 1 for path, _ in pictures))
    folders = {path.parts[0] for path, _ in found if len(path.parts) > 1}
    if Path(where).is_dir():
        folders |= {folder.name for folder in Path(where).iterdir() if folder.is_dir() and folder.name[0] != "."}
    folders = sorted(folders)
    known = agreed_classes(given, classes, where=where) or Classes(folders)
    places = {name: place for place, name in enumerate(known)}
    names, labels = [], []
    for path, name in pictures:
        if len(path.parts) < 2:
            findings.add(NO_LABEL, where, name, "is not in a class folder")
        elif path.parts[0] not in places:
            text = f"folder {path.parts[0]} is not one of the {len(known)} classes"
            findings.add(UNKNOWN, where, name, text, lost=1)
        else:
            names.append(name)
            labels.append(places[path.parts[0]])
    met = set(labels)
    for folder in folders:
        if folder in places and places[folder] not in met:
            if other := pointer(where, "OUT.csv"):
                raise ValueError(f"{where}: {shown(folder)} is no class: it holds no image{other}")
            findings.add(EMPTY, where, folder, f"holds no image ({', '.join(sorted(SUFFIXES))})")
    _need_some(len(names), where, findings)
    return LabelledFiles(files, names, np.array(labels, np.int64), known, findings)


def _open_list(path: Path, given: Classes | None, classes: Classes | None) -> LabelledFiles:
    """See `read_list`: files (relative to the list's folder, or absolute), and numbers or names of classes."""
    listed = read_list(path)
    if not listed.labelled:
        other = pointer(path, "OUT.csv")
        raise ValueError(f"{path}: has no column label or class_name; its first line must name the columns{other}")
    several = next((row for row in listed.rows if SEPARATOR in row.label), None)
    if several is not None:
        raise ValueError(
            f"{path}, line {several.line}: {shown(several.label)} is several labels; task.name=multi_label trains them"
        )
    agreed = agreed_classes(given, classes, where=str(path))
    mapping = None if agreed is None else dict(zip(agreed.category_ids, agreed, strict=True))
    numbers, names = number_labels(path, listed.rows, mapping)
    known = agreed or of_numbers({number: names.get(number, str(number)) for number in {*numbers, *names} - {None}})
    places = {number: place for place, number in enumerate(known.category_ids)}
    found = find_files(path.parent, [row.file for row in listed.rows])
    findings, labels = DataProblems(labels=len(listed.rows)), dict[str, int]()
    for row, number, name in zip(listed.rows, numbers, found, strict=True):
        where, text = (str(path), f"line {row.line}"), row.label or row.class_name
        if name is None:
            findings.add("missing image", *where, f"{row.file} is not in {path.parent}", lost=1)
        elif name in labels:
            same = number is not None and labels[name] == places[number]
            other = "" if same else ", with another label (task.name=multi_label trains several labels of an image)"
            findings.add(
                "image listed twice", *where, f"{row.file} is on an earlier line too{other}", lost=int(not same)
            )
        elif not text:
            findings.add(NO_LABEL, *where, f"{row.file} has no label", lost=1)
        elif number is None:
            findings.add(UNKNOWN, *where, f"{text} of {row.file} is not one of the {len(known)} classes", lost=1)
        else:
            labels[name] = places[number]
    _need_some(len(labels), path, findings)
    files = Files.listed(path.parent, labels)
    return LabelledFiles(files, list(labels), np.array(list(labels.values()), np.int64), known, findings)


def agreed_classes(own: Classes | None, trained: Classes | None, *, where: str) -> Classes | None:
    """The classes of the training set if they are given, else this set's own, which must not contradict them.

    Raises:
        ValueError: a number has different names in the two.
    """
    if own is None or trained is None:
        return trained or own
    names = dict(zip(trained.category_ids, trained, strict=True))
    for number, name in zip(own.category_ids, own, strict=True):
        if names.get(number, name) != name:
            raise ValueError(
                f"{where}: class {number} is {shown(name)} here, but {shown(names[number])} in the training set; "
                "give both sets one classes.json"
            )
    return trained


def _labels(numbers: np.ndarray, classes: Classes) -> np.ndarray:
    """Indices into `classes` of the numbers in the user's files; -1 where there is no such class."""
    places = {number: place for place, number in enumerate(classes.category_ids)}
    return np.array([places.get(number, -1) for number in numbers.tolist()], np.int64)


def _need_some(count: int, where: Any, findings: DataProblems) -> None:
    if not count:
        why = "\n  ".join(["", *findings.lines(10)])
        formats = "(class folders, a .csv of filename and label, or shards with .cls members)"
        other = pointer(where, "OUT.csv") if isinstance(where, str | Path) else ""
        raise ValueError(f"{where}: no image with a label {formats}{other}{why}")


def _digest(content: str, places: bytes, labels: np.ndarray, classes: Classes) -> str:
    digest = hashlib.sha256()
    for part in (content.encode(), places, labels.astype("<i8").tobytes(), "\n".join(classes).encode()):
        digest.update(part)
    return digest.hexdigest()
