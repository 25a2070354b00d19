"""What the annotation files of any tool say about images, before their pictures are looked at."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.coco import rle
from pretrain.core.images import MAX_PIXELS

FAR = 1e7  # larger numbers are no coordinates
_CIRCLE = 64  # points of the polygon of a circle or ellipse


class Unusable(ValueError):  # noqa: N818
    """Why an object cannot be converted; kind: of its finding."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Shape:
    """An object: a box (x1, y1, x2, y2), polygons (x, y, x, y, ...), or a mask of the complete image.

    fractions  coordinates are fractions of the image's sides, else pixels
    ignored    neither object nor background: a crowd of COCO
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    polygons: tuple[tuple[float, ...], ...] = ()
    mask: rle.Rle | None = None
    fractions: bool = False
    ignored: bool = False


@dataclass
class Annotated:
    """An image as a tool annotated it.

    source  the annotation file, for messages
    names   of the image; the first that exists is meant
    size    (height, width) in pixels, where the file states it
    labels  of the complete image
    split   train, val, ..., where the file states it
    problems  objects that cannot be converted: kind, place in the file, reason
    """

    source: str
    names: tuple[str, ...]
    size: tuple[int, int] | None = None
    shapes: list[Shape] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    split: str = ""
    problems: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Annotations:
    """All images of a source. classes: names by number, where the format numbers or lists them. notes: what was
    assumed, one sentence each."""

    images: list[Annotated]
    classes: dict[int, str] | None = None
    notes: list[str] = field(default_factory=list)


def add_objects(image: Annotated, objects: Iterable[tuple[str, Any]], read: Callable[[Any], Shape]) -> None:
    """Read the objects (place in the file, object) of an image; those that `read` refuses become problems."""
    for place, found in objects:
        try:
            image.shapes.append(read(found))
        except Unusable as error:
            image.problems.append((error.kind, place, str(error)))


def number(value: Any) -> float:
    """A coordinate, also as text; Unusable if it is not finite or beyond any image."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) < FAR:  # also nan
        raise Unusable("bad coordinates", f"{str(value)[:40]!r} is no coordinate")
    return found


def side(value: Any) -> int:
    """A width or height in pixels; 0 if it is none."""
    try:
        found = number(value)
    except Unusable:
        return 0
    return int(found) if found >= 1 and found == int(found) else 0


def sides(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width) if both are given."""
    found = side(height), side(width)
    return found if min(found) else None


def name_of(value: Any) -> str:
    """A class name; Unusable if there is none."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise Unusable("object without a class", f"its class is {value!r}"[:80])
    return text


def box(label: str, x1: float, y1: float, x2: float, y2: float, **more: Any) -> Shape:
    """The box between two corners, in any order."""
    return Shape(label, box=(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), **more)


def polygon(label: str, points: Sequence[tuple[float, float]], **more: Any) -> Shape:
    """Unusable with fewer than three points."""
    if len(points) < 3:
        raise Unusable("bad polygon", f"a polygon of {len(points)} points")
    return Shape(label, polygons=(tuple(value for point in points for value in point),), **more)


def ellipse(
    label: str, x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0, **more: Any
) -> Shape:
    """As a polygon of 64 points; degrees: clockwise, as y points down."""
    angles = np.arange(_CIRCLE) * (2 * np.pi / _CIRCLE)
    points = np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)
    return polygon(label, turned(points, degrees, (x, y)), **more)


def rectangle(
    label: str, x1: float, y1: float, x2: float, y2: float, degrees: float, about: tuple[float, float]
) -> Shape:
    """A box turned clockwise by `degrees` about a point: a polygon, or a box if it is not turned."""
    if degrees % 360 == 0:
        return box(label, x1, y1, x2, y2)
    points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    return polygon(label, turned(points, degrees, about))


def turned(points: np.ndarray, degrees: float, about: tuple[float, float]) -> list[tuple[float, float]]:
    """Points [n, 2] turned clockwise about a point."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = (points - about).T
    moved = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) + about
    return [(float(a), float(b)) for a, b in moved]


def placed(label: str, part: np.ndarray, left: int, top: int, size: tuple[int, int] | None) -> Shape:
    """A mask [h, w] at a place in an image of `size`; what is outside the image is cut off.

    Raises:
        Unusable: the size of the image is unknown or too large.
    """
    if size is None or size[0] * size[1] > MAX_PIXELS:
        raise Unusable("bad mask", f"a mask in an image of size {size}")
    whole = np.zeros(size, dtype=np.uint8)
    y1, x1 = max(top, 0), max(left, 0)
    piece = part[max(-top, 0) :, max(-left, 0) :][: max(size[0] - y1, 0), : max(size[1] - x1, 0)]
    whole[y1 : y1 + piece.shape[0], x1 : x1 + piece.shape[1]] = piece != 0
    return Shape(label, mask=rle.encode(whole[None])[0])


def in_order(images: Iterable[Annotated]) -> list[Annotated]:
    """By the names of their files, numbers by value."""
    return sorted(images, key=lambda image: [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
                                             for part in re.split(r"(\d{1,15})", image.names[0])])  # fmt: skip
