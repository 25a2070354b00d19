"""The pictures that annotations belong to: found by name, their sizes compared, fractions made pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from finetune.data.convert.annotated import Annotated, Annotations, Shape, in_order
from finetune.data.convert.files import Source, read_text
from finetune.data.examples import BadExample, DataProblems
from finetune.data.files import Files
from pretrain.core.text import shown
from pretrain.data.labels import splits_among
from pretrain.data.names import Names
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.views.orientation import SWAPS_SIDES, UPRIGHT, read_orientation
from pretrain.data.write.images import UnreadableImageError, image_sides, open_array, open_image

_BESIDE = {"labels": "images", "annotations": "jpegimages"}  # folders of annotations and of their images
_HEAD = 1 << 16  # bytes


@dataclass(frozen=True)
class Picture:
    """An image to write: its name in the folder of images, (height, width), and its objects in pixels."""

    name: str
    size: tuple[int, int]
    annotated: Annotated
    shapes: list[Shape]


@dataclass
class Found:
    """unannotated: images without an entry. turned: photos with an EXIF orientation."""

    pictures: list[Picture]
    unannotated: list[str]
    turned: int = 0
    other_splits: int = 0


def folder_of_images(source: Source) -> Path:
    """Where images are if the user does not say: in the folder of the annotations, or that beside it."""
    folder = source.folder
    parts = folder.resolve().parts
    for place in reversed(range(1, len(parts))):
        other = _BESIDE.get(parts[place].lower())
        if other is not None:
            for beside in sorted(Path(*parts[:place]).iterdir()):
                if beside.name.lower() == other and beside.is_dir():
                    return Path(beside, *parts[place + 1 :])
    return folder


def find_pictures(
    annotations: Annotations,
    files: Files,
    findings: DataProblems,
    *,
    source: Source,
    split: str | None,
    of_images: bool,
) -> Found:
    """The images of the annotations in `files`.

    Args:
        findings: gets the objects that are lost, or with `of_images` the labels of complete images, and their number.
        split: the part to use, by the name of its folder or of the file's entry, or a list of images (.txt).

    Raises:
        ValueError: none exists, or they are of several splits and none is chosen.
    """
    images = in_order(annotations.images)
    if not images:
        raise ValueError("; ".join(findings.lines(1)) or f"{source.path}: no annotation in it")
    found = _match(images, files)
    if not any(found):
        there = shown(", ".join(name for name in files.names[:1000] if _is_image(name))[:100]) or "no image"
        raise ValueError(
            f"{source.path}: none of its {len(images)} images is in {files.where}: it names {images[0].names[0]}; "
            f"there: {there}; give the folder of the images by --images"
        )
    keep = _of_split(images, found, split, source)
    result = Found([], [], other_splits=keep.count(False))
    taken: set[str] = set()
    for image, name in [pair for pair, kept in zip(zip(images, found, strict=True), keep, strict=True) if kept]:
        lost = len(image.labels) if of_images else len(image.shapes)
        findings.labels += lost
        if name is None:
            findings.add("missing image", image.source, image.names[0], f"{image.names[0]} is not there", lost=lost)
        elif name in taken:
            findings.add("image annotated twice", image.source, name, "an earlier entry is used", lost=lost)
        else:
            taken.add(name)
            _measure(result, image, name, files, findings, lost)
        for problem in [] if of_images else image.problems:
            findings.labels += 1
            findings.add(problem[0], image.source, problem[1], problem[2], lost=1)
    known = taken | {name for name in found if name is not None}
    result.unannotated = [
        name
        for name in files.names
        if _is_image(name) and name not in known and (split is None or split.lower() in _folders(name))
    ]
    return result


def upright_size(files: Files, name: str) -> tuple[int, int]:
    """(height, width) of the photo turned by its EXIF orientation; BadExample or UnreadableImageError if it is none."""
    (height, width), tag = _size(files, name)
    return (width, height) if tag in SWAPS_SIDES else (height, width)


def _match(images: Sequence[Annotated], files: Files) -> list[str | None]:
    names = Names(name for name in files.names if _is_image(name))
    found = names.match([image.names[0] for image in images])
    for other in range(1, max((len(image.names) for image in images), default=1)):
        left = [place for place, name in enumerate(found) if name is None and len(images[place].names) > other]
        again = names.match([images[place].names[other] for place in left])
        for place, name in zip(left, again, strict=True):
            found[place] = name
    return found


def _measure(result: Found, image: Annotated, name: str, files: Files, findings: DataProblems, lost: int) -> None:
    try:
        stored, tag = _size(files, name)
    except (BadExample, UnreadableImageError) as error:
        findings.add("unreadable image", image.source, name, str(error), lost=lost)
        return
    upright = stored[::-1] if tag in SWAPS_SIDES else stored
    result.turned += tag != UPRIGHT
    if image.size is not None and image.size not in (stored, upright):
        (h, w), (height, width) = image.size, upright
        text = f"annotated with {w} x {h} pixels, the image has {width} x {height}"
        findings.add("image of another size", image.source, name, text, lost=lost)
        return
    size = image.size or (upright[0], upright[1])
    result.pictures.append(Picture(name, size, image, [_in_pixels(shape, size) for shape in image.shapes]))


def _size(files: Files, name: str) -> tuple[tuple[int, int], int]:
    """(height, width) as stored, and the EXIF orientation."""
    if PurePosixPath(name).suffix.lower() == ".npy":
        height, width = open_array(files.read(name)).shape[:2]
        return (height, width), UPRIGHT
    head = files.head(name, _HEAD)
    try:
        width, height = open_image(head).size
    except UnreadableImageError:
        head = files.read(name)
        width, height = image_sides(head)
    return (height, width), read_orientation(head)


def _in_pixels(shape: Shape, size: tuple[int, int]) -> Shape:
    if not shape.fractions:
        return shape
    height, width = size
    box = shape.box and (shape.box[0] * width, shape.box[1] * height, shape.box[2] * width, shape.box[3] * height)
    polygons = tuple(
        tuple(value * (height if place % 2 else width) for place, value in enumerate(part)) for part in shape.polygons
    )
    return replace(shape, box=box, polygons=polygons, fractions=False)


def _of_split(
    images: Sequence[Annotated], found: Sequence[str | None], split: str | None, source: Source
) -> list[bool]:
    if split is not None and split.endswith(".txt"):
        listed = {PurePosixPath(line.strip().replace("\\", "/")).name for line in read_text(Path(split)).splitlines()}
        keys = [PurePosixPath(image.names[0].replace("\\", "/")) for image in images]
        keep = [key.name in listed or key.stem in listed for key in keys]  # VOC lists names without suffix
    else:
        parts = [_parts(image, name) for image, name in zip(images, found, strict=True)]
        if split is None:
            splits = splits_among(set().union(*parts)) if parts else []
            if len(splits) > 1:
                raise ValueError(
                    f"{source.path}: holds images of {', '.join(splits)}; convert each by --split NAME to its own file"
                )
            return [True] * len(images)
        keep = [split.lower() in of for of in parts]
    if not any(keep):
        raise ValueError(f"{source.path}: no image is of --split {split}")
    return keep


def _parts(image: Annotated, name: str | None) -> set[str]:
    """The names that can be an image's split: the entry's own, or its folders."""
    return {image.split} if image.split else _folders(name or image.names[0].replace("\\", "/"))


def _folders(name: str) -> set[str]:
    return {part.lower() for part in PurePosixPath(name).parent.parts}


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES
