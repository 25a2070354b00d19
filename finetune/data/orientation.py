"""Photos with an EXIF orientation under annotations: which pixels the annotations refer to.

auto     the sides of the annotations decide where only one of both fits, the upright or the stored photo; where both
         fit (a square photo, or an orientation that keeps the sides), upright is assumed and reported
exif     the upright photo
stored   the pixels as they lie in the file
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from finetune.data.examples import BadExample, DataProblems
from finetune.data.files import Files
from finetune.data.reading import Reading
from pretrain.core.images import DataOrientation
from pretrain.data.views.orientation import SWAPS_SIDES, UPRIGHT, read_orientation, upright
from pretrain.data.write.images import UnreadableImageError, image_sides

LOOKED_AT = 1000  # number of images whose orientation is read when a set is opened
_HEAD = 1 << 16  # bytes


def decode_annotated(data: bytes, size: tuple[int, ...], reading: Reading, *, name: str, what: str) -> np.ndarray:
    """The pixels [H, W, C] of a photo whose `what` (its map or annotations) has the (height, width) `size`.

    Raises:
        DecodeError: it cannot be decoded.
        BadExample: of `name`, it has another size.
    """
    stored, orientation = reading.stored(data), reading.orientation
    tag = read_orientation(data)
    turned = stored if orientation == "stored" else upright(stored, tag)
    if turned.shape[:2] == size:
        return turned
    if orientation == "auto" and stored.shape[:2] == size:
        return stored
    height, width = turned.shape[:2]
    reason = f"the image has {width} x {height} pixels, its {what} {size[1]} x {size[0]}"
    if size == (width, height):
        reason += "; width and height are exchanged"
        if tag in SWAPS_SIDES:
            reason += f": data.orientation={orientation}, its EXIF orientation is {tag}; auto fits the annotations"
    raise BadExample(name, reason)


def upright_map(values: np.ndarray, data: bytes, orientation: DataOrientation) -> np.ndarray:
    """The values [H, W] of a map, turned like a photo if its file `data` has an EXIF orientation of its own."""
    return values if orientation == "stored" else upright(values, read_orientation(data))


def report_orientations(
    findings: DataProblems, files: Files, names: Sequence[str], size_of: Callable[[int], tuple[int, ...] | None]
) -> None:
    """Report what `auto` assumes about the images `names`, of which up to LOOKED_AT are looked at.

    Args:
        size_of: (height, width) of the annotations of an image, by its place in `names`; None if unknown.
    """
    looked: list[int] = np.linspace(0, len(names) - 1, min(LOOKED_AT, len(names))).astype(int).tolist()
    either: list[str] = []
    stored: list[str] = []
    for place in looked:
        try:
            tag = read_orientation(files.head(names[place], _HEAD))
            if tag == UPRIGHT:
                continue
            width, height = image_sides(files.read(names[place]))
        except (BadExample, UnreadableImageError):
            continue  # reported when it is read
        if tag not in SWAPS_SIDES or width == height:
            either.append(names[place])
        elif size_of(place) == (height, width):
            stored.append(names[place])
    if either:
        text = (
            f"{len(either)} of {len(looked)} images looked at, this one first, have an EXIF orientation that keeps the "
            "sides: the annotations are taken as those of the upright photo; set data.orientation=stored if they were "
            "made on the stored pixels, or exif if not"
        )
        findings.add("EXIF orientation assumed", files.where, either[0], text)
    if stored:
        text = (
            f"{len(stored)} of {len(looked)} images looked at, this one first, have annotations whose sides fit the "
            "stored pixels, not the photo turned by its EXIF orientation: these images are not turned"
        )
        findings.add("annotated as stored", files.where, stored[0], text)
