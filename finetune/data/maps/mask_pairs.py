"""Images with a map each: matching files by name, and reading a pair."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.orientation import decode_annotated, report_orientations, upright_map
from finetune.predictions import Classes
from pretrain.core.images import DataOrientation
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.views.decode import DecodeError
from pretrain.data.write.images import UnreadableImageError, open_image

Key = Callable[[str], str | None]  # a file's name to the key that an image and its map share; None: the file is neither
Decode = Callable[[bytes], np.ndarray]  # raises ValueError if it cannot be used

NO_MAP, NO_IMAGE = "image without a map", "map without an image"


@dataclass(frozen=True)
class Pair:
    """id: the key of both. image, target: names in their containers."""

    id: str
    image: str
    target: str


class Pairs:
    """Examples of images and maps of their size.

    Args:
        images, targets: the containers; they may be the same.
        decode: bytes of a map to [H, W].
        settings: other settings that the content depends on, for the fingerprint.
        orientation: `data.orientation`.
    """

    def __init__(
        self,
        images: Files,
        targets: Files,
        pairs: Sequence[Pair],
        decode: Decode,
        *,
        classes: Classes,
        findings: DataProblems,
        settings: str = "",
        orientation: DataOrientation = "auto",
    ) -> None:
        self.images, self.targets, self.pairs, self.decode = images, targets, tuple(pairs), decode
        self.classes, self.findings = classes, findings
        self.orientation: DataOrientation = orientation
        report_pairs(findings, images, targets, self.pairs, orientation)
        of_files = fingerprint(self.pairs, images, targets)
        self.fingerprint = hashlib.sha256(f"{of_files} {settings}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        image, target = read_pair(pair, self.images, self.targets, self.decode, self.orientation)
        return Example(pair.id, self.images.path(pair.image), image, target)


def fingerprint(pairs: Sequence[Pair], images: Files, targets: Files) -> str:
    """sha256 hex of the files of all pairs, in their order."""
    sides = (images.fingerprint(pair.image for pair in pairs), targets.fingerprint(pair.target for pair in pairs))
    return hashlib.sha256(" ".join(sides).encode()).hexdigest()


def read_pair(
    pair: Pair, images: Files, targets: Files, decode: Decode, orientation: DataOrientation
) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, 3], and its map [H, W]; BadExample if one cannot be decoded or their sizes differ."""
    data, where = targets.read(pair.target), targets.path(pair.target)
    try:
        target = upright_map(decode(data), data, orientation)
    except ValueError as error:
        raise BadExample(where, str(error)) from error
    try:
        image = decode_annotated(images.read(pair.image), target.shape, orientation, name=where, what="map")
    except DecodeError as error:
        raise BadExample(images.path(pair.image), str(error)) from error
    return image, target


def report_pairs(
    findings: DataProblems, images: Files, targets: Files, pairs: Sequence[Pair], orientation: DataOrientation
) -> None:
    """Report what `auto` assumes about the images of `pairs`."""

    def size_of(place: int) -> tuple[int, int] | None:
        try:
            width, height = open_image(targets.read(pairs[place].target)).size
        except (BadExample, UnreadableImageError):
            return None  # reported when it is read
        return height, width

    if orientation == "auto":
        report_orientations(findings, images, [pair.image for pair in pairs], size_of)


def split_container(where: str) -> tuple[str, str]:
    """A folder inside a tar ("train.tar/images") as the tar and the folder with a slash; else `where` and ""."""
    path = Path(where)
    for parent in path.parents:
        if parent.is_file():
            return str(parent), path.relative_to(parent).as_posix().rstrip("/") + "/"
    return where, ""


def stem_below(prefix: str, *, ending: str = "", suffixes: frozenset[str] = SUFFIXES) -> Key:
    """The key of files below a folder: the name without folder, extension and `ending`; None for other files."""

    def key(name: str) -> str | None:
        stem, extension = os.path.splitext(name)  # noqa: PTH122 - names in a tar are no paths
        if not name.startswith(prefix) or extension.lower() not in suffixes or not stem.endswith(ending):
            return None
        return stem[len(prefix) : len(stem) - len(ending)]

    return key


def match(
    images: Files,
    targets: Files,
    image_key: Key,
    target_key: Key,
    findings: DataProblems,
    *,
    only: Sequence[str] | None = None,
) -> list[Pair]:
    """Pairs in the order of their keys; files without a partner are reported.

    Args:
        only: the keys to use, in any order, when maps of other images are not reported; None: all images.

    Raises:
        ValueError: two files have one key, or no image has a map.
    """
    of_images, of_targets = _by_key(images, image_key), _by_key(targets, target_key)
    wanted = sorted(of_images if only is None else set(only))
    pairs = []
    for key in wanted:
        if key not in of_images:
            findings.add("missing image", images.where, key, "is listed but does not exist")
        elif key not in of_targets:
            findings.add(NO_MAP, images.where, of_images[key], f"no map named {key} in {targets.where}; left out")
        else:
            pairs.append(Pair(key, of_images[key], of_targets[key]))
    for key in sorted(set(of_targets) - set(of_images)) if only is None else ():
        findings.add(NO_IMAGE, targets.where, of_targets[key], f"no image named {key} in {images.where}")
    if not pairs:
        raise ValueError(
            f"no image of {images.where} ({_some(of_images)}) has a map of its name in {targets.where} "
            f"({_some(of_targets)}); their names must be equal except for the extension"
        )
    return pairs


def _by_key(files: Files, key: Key) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files.names:
        of = key(name)
        if of is None:
            continue
        if of in found:
            raise ValueError(f"{files.where}: {found[of]} and {name} both have the key {of}; it must be unique")
        found[of] = name
    return found


def _some(names: dict[str, str]) -> str:
    shown = ", ".join(list(names.values())[:2])
    return f"{len(names)} files: {shown} ..." if names else "no such files"
