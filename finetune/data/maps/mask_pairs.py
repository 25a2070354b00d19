"""Images with a map each: matching files by name, and reading a pair."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.data.examples import BadExample, DataProblems, Example
from finetune.data.files import Files
from finetune.data.orientation import decode_annotated, report_orientations, upright_map
from finetune.data.reading import PHOTOS, Reading
from finetune.predictions import Classes
from pretrain.core.images import DataOrientation
from pretrain.core.text import shown
from pretrain.data.formats.stored import DecodeError
from pretrain.data.names import respelled
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.write.images import UnreadableImageError, open_image

# Which files are maps: those of the first kind that exists. JPEG changes ids.
MAP_SUFFIXES = tuple(map(frozenset, ((".png",), (".gif",), (".tif", ".tiff"), (".bmp",), (".npy",))))
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
        reading: of the images.
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
        reading: Reading = PHOTOS,
    ) -> None:
        self.images, self.targets, self.pairs, self.decode = images, targets, tuple(pairs), decode
        self.classes, self.findings = classes, findings
        self.reading = reading
        report_pairs(findings, images, targets, self.pairs, reading.orientation)
        of_files = fingerprint(self.pairs, images, targets)
        self.fingerprint = hashlib.sha256(f"{of_files} {settings}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        image, target = read_pair(pair, self.images, self.targets, self.decode, self.reading)
        return Example(pair.id, self.images.path(pair.image), image, target)

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.images.read(self.pairs[index].image)


def fingerprint(pairs: Sequence[Pair], images: Files, targets: Files) -> str:
    """sha256 hex of the files of all pairs, in their order."""
    sides = (images.fingerprint(pair.image for pair in pairs), targets.fingerprint(pair.target for pair in pairs))
    return hashlib.sha256(" ".join(sides).encode()).hexdigest()


def read_pair(
    pair: Pair, images: Files, targets: Files, decode: Decode, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, C] and its map [H, W]; BadExample if one cannot be decoded or their sizes differ."""
    data, where = targets.read(pair.target), targets.path(pair.target)
    try:
        target = upright_map(decode(data), data, reading.orientation)
    except ValueError as error:
        raise BadExample(where, str(error)) from error
    try:
        image = decode_annotated(images.read(pair.image), target.shape, reading, name=where, what="map")
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


@dataclass(frozen=True)
class StemBelow:
    """The key of files below a folder: the name without that folder, extension, `start` and `ending` of its last part;
    None for other files."""

    prefix: str = ""
    ending: str = ""
    suffixes: Collection[str] = SUFFIXES
    start: str = ""

    def __call__(self, name: str) -> str | None:
        return self.of(name) if _suffix(name) in self.suffixes else None

    def of(self, name: str) -> str | None:
        """The key of a file of any extension."""
        stem = os.path.splitext(name)[0]  # noqa: PTH122 - names in a tar are no paths
        if not name.startswith(self.prefix):
            return None
        folder, slash, last = stem[len(self.prefix) :].rpartition("/")
        if len(last) < len(self.start + self.ending) or not (
            last.startswith(self.start) and last.endswith(self.ending)
        ):
            return None
        return folder + slash + last[len(self.start) : len(last) - len(self.ending)]


def named(pattern: str | None, prefix: str, suffixes: Collection[str]) -> StemBelow:
    """The key of files named by a pattern such as "{name}_mask.gif"; its suffix may be left out."""
    start, _, rest = (pattern or "{name}").partition("{name}")
    ending, suffix = os.path.splitext(rest)  # noqa: PTH122 - ".gif" alone would be a hidden file's stem
    if not suffix and rest.startswith("."):
        ending, suffix = "", rest
    return StemBelow(prefix, ending, {suffix.lower()} if suffix else suffixes, start)


def of_one_kind(targets: Files, key: StemBelow) -> StemBelow:
    """`key` for maps of the first of MAP_SUFFIXES that any of its files has."""
    met = {_suffix(name) for name in targets.names if key(name) is not None}
    return replace(key, suffixes=next((kind for kind in MAP_SUFFIXES if kind & met), MAP_SUFFIXES[0]))


def match(
    images: Files,
    targets: Files,
    image_key: StemBelow,
    target_key: StemBelow,
    findings: DataProblems,
    *,
    only: Sequence[str] | None = None,
) -> list[Pair]:
    """Pairs in the order of their keys; files without a partner are reported.

    Keys are equal, or one is the only one that the other can mean (see `pretrain.data.names`).

    Args:
        only: the keys to use, in any order, when maps of other images are not reported; None: all images.

    Raises:
        ValueError: two files have one key, or no image has a map.
    """
    of_targets = _by_key(targets, target_key)
    is_map = set(of_targets.values()) if images is targets else set[str]()
    of_images = _by_key(images, image_key, but=is_map)
    wanted = sorted(of_images if only is None else set(only))
    image_of, map_of = _meant(wanted, of_images), _meant(wanted, of_targets)
    others = _others(targets, target_key, set(wanted) - of_targets.keys())
    findings.labels += len(of_targets if only is None else map_of)
    pairs = []
    for key in wanted:
        image, target = image_of.get(key), map_of.get(key)
        if image is None:
            lost = int(target is not None)
            findings.add("missing image", images.where, key, "is listed but does not exist", lost=lost)
        elif target is None:
            other = f"; {others[key]} is {_other_kind(others[key], target_key)}" if key in others else ""
            text = f"no map named {key} in {targets.where}{other}; left out"
            findings.add(NO_MAP, images.where, image, text, lost=int(key in others))
            findings.labels += key in others
        else:
            pairs.append(Pair(key, image, target))
    alone = set(of_targets.values()) - set(map_of.values()) if only is None else set[str]()
    for name in sorted(alone):
        findings.add(NO_IMAGE, targets.where, name, f"no image named {target_key(name)} in {images.where}", lost=1)
    if not pairs and others:
        kinds = Counter(map(_suffix, others.values()))
        held = ", ".join(f"{count} {shown(suffix) or 'without a suffix'}" for suffix, count in kinds.most_common())
        raise ValueError(
            f"{targets.where} holds {held}: {_other_kind(next(iter(others.values())), target_key)}; save them as PNG "
            "with the same names"
        )
    if not pairs:
        raise ValueError(
            f"no image of {images.where} ({_some(of_images)}) has a map of its name in {targets.where} "
            f"({_some(of_targets)}); their names must be equal except for the extension{_suggested(of_images, targets)}"
        )
    return pairs


def _meant(keys: Collection[str], files: Mapping[str, str]) -> dict[str, str]:
    """The file of each key that has one: of an equal key, else of the only one that it can mean."""
    same = {key: key for key in keys if key in files}
    changed = respelled(set(keys) - same.keys(), files.keys() - same.keys())
    return {key: files[other] for key, other in (same | changed).items()}


def _others(targets: Files, target_key: StemBelow, keys: Collection[str]) -> dict[str, str]:
    """Files of other kinds that have the names of maps, by key."""
    named = ((target_key.of(name), name) for name in targets.names if _suffix(name) not in target_key.suffixes)
    return {key: name for key, name in named if key is not None and key in keys}


def _other_kind(name: str, target_key: StemBelow) -> str:
    if _suffix(name) in (".jpg", ".jpeg"):
        return "JPEG, which changes ids"
    return f"no map of the kind {' or '.join(sorted(target_key.suffixes))}"


def _suggested(images: Collection[str], targets: Files) -> str:
    """A pattern that fits the first maps, if one does."""
    stems = sorted({key.rpartition("/")[2] for key in images}, key=len, reverse=True)
    names = [name.rpartition("/")[2] for name in targets.names if _suffix(name) in frozenset().union(*MAP_SUFFIXES)][
        :20
    ]
    patterns = Counter(name.replace(stem, "{name}", 1) for name in names if (stem := _inside(name, stems)) is not None)
    pattern, count = next(iter(patterns.most_common(1)), ("", 0))
    return f'; they fit with data.*.mask_names="{pattern}"' if count * 2 > len(names) and pattern != "{name}" else ""


def _inside(name: str, stems: Sequence[str]) -> str | None:
    return next((stem for stem in stems if stem and stem in name), None)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _by_key(files: Files, key: StemBelow, *, but: Collection[str] = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files.names:
        of = key(name)
        if of is None or name in but:
            continue
        if of in found:
            raise ValueError(
                f"{files.where}: {shown(found[of])} and {shown(name)} both have the key {shown(of)}; it must be unique"
            )
        found[of] = name
    return found


def _some(names: dict[str, str]) -> str:
    first = shown(", ".join(list(names.values())[:2]))
    return f"{len(names)} files: {first} ..." if names else "no such files"
