"""The input of `fovea data write`: image files, their keys and their labels, from a folder or a CSV."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.text import shown
from pretrain.data import image_list
from pretrain.data.image_list import ListedImage, read_list
from pretrain.data.labels import number_labels, splits_among
from pretrain.data.names import find_files, sample_keys
from pretrain.data.shards.image_files import SUFFIXES, walk
from pretrain.data.write.clips import VIDEO_FORMATS, FramesOf, frame_files


@dataclass(frozen=True)
class ImageSource:
    """One image file, video file or folder of frames.

    name: relative to the folder, or as in the CSV. size: in bytes, -1 if absent.
    """

    name: str
    key: str
    size: int
    label: int | None


@dataclass(frozen=True)
class Sources:
    """Files sorted by name, under `root`; classes: id -> name, empty without; ignored: other suffixes, counted."""

    root: Path
    files: list[ImageSource]
    classes: dict[int, str]
    ignored: Counter[str]


def find_sources(
    source: Path, *, labels: str, classes: Mapping[int, str] | None = None, frames_of: FramesOf | None = None
) -> Sources:
    """Read a folder (recursively) or a CSV.

    frames_of: what becomes a sample: None: each image; folders: each folder that holds images; videos: each video file.

    labels: "none", or "auto": the names of the top sub-folders if there are two or more and every image is in one, or
    a CSV's columns (see `read_list`), where some images may have no label. Names get the ids of `classes` if given,
    else 0, 1, ... in sorted order; integer labels of a CSV are kept.

    Raises:
        ValueError: nothing found, a bad CSV, a class that is not in `classes`, or folders of classes that are named
            train, val, ...
    """
    if source.is_dir():
        names, ignored = _images(source) if frames_of is None else _clips(source, frames_of)
        rows = _of_folders(source, names, labels, classes)
        root = source
    elif source.suffix.lower() in image_list.SUFFIXES and source.is_file() and frames_of == "folders":
        raise ValueError(f"{source}: clips of frames are read from a folder of folders, not from a list")
    elif source.suffix.lower() in image_list.SUFFIXES and source.is_file():
        rows, ignored = _of_list(source), Counter[str]()
        root = source.parent
    elif source.is_file() and source.suffix.lower() == ".tar":
        raise ValueError(
            f"{source}: a tar is a shard already: `fovea data index {source}` makes it ready to train on; to write it "
            "again, give a folder of its files"
        )
    elif source.exists():
        raise ValueError(f"{source}: neither a folder of images nor a .csv that lists them")
    else:
        raise ValueError(f"{source}: no such folder or CSV")
    if not rows:
        other = f"; it has other files: {_counted(ignored)}" if ignored else ""
        what, suffixes = ("video", VIDEO_FORMATS) if frames_of == "videos" else ("image", SUFFIXES)
        raise ValueError(f"{source}: no {what} found (looked for {', '.join(sorted(suffixes))}){other}")
    ids: list[int | None] = [None] * len(rows)
    found_classes: dict[int, str] = {}
    if labels == "auto":
        ids, found_classes = number_labels(source, rows, classes)
        unknown = sorted({row.label or row.class_name for row, i in zip(rows, ids, strict=True) if i is None} - {""})
        if unknown:
            listed = shown(", ".join(unknown[:5]))
            raise ValueError(f"{source}: not in the given classes: {listed} ({len(unknown)} in all)")
    labelled = sorted(zip((row.file for row in rows), ids, strict=True))
    keys = sample_keys([name for name, _ in labelled])
    files = [
        ImageSource(name, key, _size(root / name), label) for (name, label), key in zip(labelled, keys, strict=True)
    ]
    return Sources(root, files, found_classes, ignored)


def _of_folders(source: Path, names: list[str], labels: str, classes: Mapping[int, str] | None) -> list[ListedImage]:
    """Every image with its top folder as its class, or without one if they are no classes."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    if labels == "none" or "" in tops or len(set(tops)) < 2:
        tops = [""] * len(names)
    splits = [] if classes else splits_among(sorted(set(tops)))
    if splits:
        raise ValueError(
            f"{source}: its folders {shown(', '.join(splits))} are parts of a data set, not classes; write one of them "
            f"({shown(source / splits[0])}), or all images without labels (--labels none)"
        )
    return [ListedImage(0, name, "", top) for name, top in zip(names, tops, strict=True)]


def _of_list(source: Path) -> list[ListedImage]:
    """The rows of a CSV, each file once, by the names that find them."""
    listed = read_list(source).rows
    found = find_files(source.parent, [row.file for row in listed])
    rows: dict[str, ListedImage] = {}
    for row, name in zip(listed, found, strict=True):
        file = name or row.file  # an absent one is reported as skipped
        first = rows.setdefault(file, ListedImage(row.line, file, row.label, row.class_name))
        if (first.label, first.class_name) != (row.label, row.class_name):
            raise ValueError(
                f"{source}: {shown(row.file)} is listed more than once, with other labels "
                f"(lines {first.line}, {row.line}); an image has one class"
            )
    return list(rows.values())


def _images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of images below `folder`, links followed, without hidden ones; and the other suffixes, counted."""
    return _files(folder, SUFFIXES)


def _clips(folder: Path, frames_of: FramesOf) -> tuple[list[str], Counter[str]]:
    """Names of the video files, or of the folders of frames, below `folder`; and the other suffixes, counted."""
    if frames_of == "videos":
        if importlib.util.find_spec("av") is None:
            raise ValueError("video files need PyAV: pip install 'fovea[video]'")
        return _files(folder, VIDEO_FORMATS)
    names, ignored = _images(folder)
    folders = {name.rpartition("/")[0] for name in names}
    if "" in folders:
        raise ValueError(
            f"{folder}: holds images itself; a clip is a folder of frames below it: give the folder above, or move them"
        )
    return sorted(folders), ignored


def _files(folder: Path, suffixes: Collection[str]) -> tuple[list[str], Counter[str]]:
    names: list[str] = []
    ignored: Counter[str] = Counter()
    for entry in walk(folder):
        path = Path(entry.path)
        if path.suffix.lower() not in suffixes:
            ignored[path.suffix.lower() or "no suffix"] += 1
        else:  # what is no file is reported when it cannot be read
            names.append(path.relative_to(folder).as_posix())
    return sorted(names), ignored


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            return sum(_size(file) for file in frame_files(path))
        return path.stat().st_size
    except OSError:
        return -1


def _counted(ignored: Counter[str]) -> str:
    return ", ".join(f"{shown(suffix)} {count}" for suffix, count in ignored.most_common(5))
