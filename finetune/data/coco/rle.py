"""Binary masks as COCO's run-length encoding (RLE), the form in which instances are kept, sent and scored.

An RLE is {"size": [height, width], "counts": text}: COCO's compressed form, which is valid JSON. Pixels run down the
columns. Lin et al. 2014, "Microsoft COCO"; the encoding itself is pycocotools'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask

from finetune.data.coco.ids import integer

Rle = Mapping[str, Any]  # {"size": [height, width], "counts": text}
FAR = 1e6  # pixels; pycocotools visits every pixel of a polygon's edge, also outside the image
coco: Any = mask  # its stubs accept fewer kinds of input than it does


def encode(masks: np.ndarray) -> list[Rle]:
    """Masks [n, H, W], inside where not 0, to n RLEs."""
    columns = np.asfortranarray((masks != 0).astype(np.uint8).transpose(1, 2, 0))
    return [_text(rle) for rle in coco.encode(columns)] if len(masks) else []


def decode(rles: Sequence[Rle], size: tuple[int, int]) -> np.ndarray:
    """RLEs of an image of `size` = (height, width) to masks of 0 and 1, uint8 [n, H, W]."""
    if not rles:
        return np.zeros((0, *size), dtype=np.uint8)
    return np.ascontiguousarray(coco.decode(list(rles)).transpose(2, 0, 1))


def decode_one(rle: Rle) -> np.ndarray:
    """One RLE to a mask of 0 and 1, uint8 [H, W], in column-major memory order, without the copy of `decode`."""
    return coco.decode(rle)


def placed(rle: Rle, corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """The mask of a part of an image, whose (top, left) is `corner`, as one of the image of `size`, (height, width)."""
    part, (top, left), (height, width) = decode_one(rle), corner, size
    columns = np.zeros((height, part.shape[1]), dtype=np.uint8, order="F")
    columns[top : top + part.shape[0]] = part
    flat = columns.ravel("F")
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
    runs = [0, *runs] if flat[0] else runs
    runs[0] += left * height
    rest = (width - left - part.shape[1]) * height
    runs = [*runs[:-1], runs[-1] + rest] if len(runs) % 2 else [*runs, rest]
    return _text(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def union(rles: Sequence[Rle]) -> Rle:
    """The pixels of any of the masks of one image."""
    return _text(coco.merge(list(rles)))


def areas(rles: Sequence[Rle]) -> np.ndarray:
    """Pixels of each mask, float32 [n]."""
    return np.asarray(coco.area(list(rles)) if rles else [], dtype=np.float32)


def boxes(rles: Sequence[Rle]) -> np.ndarray:
    """The smallest box around each mask, float32 [n, 4] as x1, y1, x2, y2 in pixels; zeros for an empty mask."""
    xywh = np.asarray(coco.toBbox(list(rles)) if rles else [], dtype=np.float32).reshape(-1, 4)
    xywh[:, 2:] += xywh[:, :2]
    return xywh


def from_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Rle, list[str]]:
    """COCO's `segmentation` in an image of `size` = (height, width): polygons, or an RLE of either kind.

    Returns:
        the mask, and what is wrong with pieces that are no polygons, next to others that are.

    Raises:
        ValueError: it is neither, an RLE of another size, an RLE whose runs do not sum to its size, or without a pixel.
    """
    stray: list[str] = []
    if isinstance(segmentation, dict):
        rle = _checked(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        parts = segmentation if isinstance(segmentation[0], list) else [segmentation]  # one polygon without its list
        pieces: list[list[float]] = []
        for part in parts:
            try:
                pieces.append(_polygon(part))
            except ValueError as error:
                stray.append(str(error))
        if not pieces:
            raise ValueError(stray[0])
        rle = coco.merge(coco.frPyObjects(pieces, *size))
    else:
        raise ValueError("no mask: segmentation is neither polygons nor an RLE")
    if not coco.area(rle):
        raise ValueError("the mask has no pixel in the image")
    return _text(rle), stray


def _checked(segmentation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A compressed RLE of the given size. pycocotools would read beyond the runs of a wrong one."""
    given, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(given, list) or [integer(side) for side in given] != list(size):
        raise ValueError(f"mask of size {given} in an image of height {size[0]} and width {size[1]}")
    if isinstance(counts, str | bytes):
        runs = _runs(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise ValueError("RLE counts are neither text nor a list of integers")
    if sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
        raise ValueError(f"RLE runs sum to {sum(runs)} pixels, the image has {size[0] * size[1]}")
    clean = {"size": list(size), "counts": counts}
    return coco.frPyObjects(clean, *size) if isinstance(counts, list) else clean


def _runs(text: bytes) -> list[int]:
    """The run lengths that a compressed RLE holds.

    Each is written in base 32 from the lowest digit, offset by 48, bit 32 meaning that digits follow; from the fourth
    on it is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        digit = byte - 48
        if not 0 <= digit < 64:
            raise ValueError(f"RLE counts hold {chr(byte)!r}")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("RLE counts end inside a number")
    return runs


def _polygon(part: Any) -> list[float]:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        raise ValueError(f"a polygon needs x, y of at least 3 points, got {str(part)[:60]}")
    try:
        points = [float(value) for value in part]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon holds a value that is not a number: {str(part)[:60]}") from error
    if not np.isfinite(points).all():
        raise ValueError("a polygon holds a number that is not finite")
    if max(map(abs, points)) > FAR:
        raise ValueError(f"a polygon reaches {max(points, key=abs):g}, far outside any image")
    return points


def _text(rle: Any) -> Rle:
    counts = rle["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}
