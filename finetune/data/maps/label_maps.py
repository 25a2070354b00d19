"""Maps of class ids: files to ids, and the ids of the user's files to labels."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image

from finetune.predictions import Classes
from pretrain.data.formats.stored import DecodeError, check_size
from pretrain.data.views.decode import open_header
from pretrain.data.write.images import UnreadableImageError, open_array, open_image

VOID = 255
_NO_CLASS = -1
_SIXTEEN_BITS = ("I", "I;16", "I;16B")
_FORMATS = ("PNG", "GIF", "TIFF", "BMP")  # which keep exact values
_NPY, _JPEG = b"\x93NUMPY", b"\xff\xd8"
_ARRAYS = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")


class Labels:
    """Ids of the user's masks to labels: 0 to K - 1, or 255 for void.

    Args:
        classes: `category_ids` are the ids of the classes.
        void_ids: other values in the masks, which become void.

    Raises:
        ValueError: more classes than labels, or an id that is both a class and void.
    """

    def __init__(self, classes: Classes, void_ids: Collection[int]):
        both = sorted(set(classes.category_ids) & set(void_ids))
        if both:
            raise ValueError(
                f"id {both[0]} of class {classes[classes.category_ids.index(both[0])]!r} is also void; change "
                "task.void_ids, task.reduce_zero_label or the classes"
            )
        if len(classes) > VOID:
            raise ValueError(f"{len(classes)} classes; at most {VOID} labels fit in a byte")
        known = [*classes.category_ids, *void_ids]
        if min(known) < 0:
            raise ValueError(f"class id {min(known)} is negative: it cannot occur in a mask")
        self._table = np.full(max(*known, VOID) + 2, _NO_CLASS, dtype=np.int16)
        self._table[list(void_ids)] = VOID
        self._table[list(classes.category_ids)] = np.arange(len(classes))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Labels uint8 [H, W] of ids [H, W].

        Raises:
            ValueError: an id that is neither a class nor void.
        """
        labels = self._table[np.minimum(ids.astype(np.int32), len(self._table) - 1)]
        unknown = labels == _NO_CLASS
        if unknown.any():
            found, counts = np.unique(ids[unknown], return_counts=True)
            some = ", ".join(f"{i} ({n} pixels)" for i, n in zip(found[:5].tolist(), counts[:5].tolist(), strict=True))
            raise ValueError(
                f"ids that are neither a class nor void: {some}; correct the mask, the classes or task.void_ids"
            )
        return labels.astype(np.uint8)


def decode_ids(data: bytes) -> np.ndarray:
    """The ids of a map, uint8 or int32 [H, W]: a gray PNG, TIFF or BMP, palette indices of these or of the first frame
    of a GIF, whose colours are ignored, or an `.npy` of integers or bool.

    Raises:
        ValueError: it is none of these, is damaged, is a colour image, or has ids below 0.
    """
    if data.startswith(_NPY):
        return _checked(_array(data))
    image = open_map(data)
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or (values != np.floor(values)).any():
            raise ValueError("its floats are no integers: not a map of ids")
        return _checked(values)
    if image.mode not in ("L", "P", "1", *_SIXTEEN_BITS):
        raise ValueError(
            f"a mask of mode {image.mode}: colours are not class ids; save one channel of ids, or a palette image, or "
            "give the colours of the classes, data.*.classes=labelmap.txt"
        )
    ids = np.asarray(image)
    return _checked(ids.astype(np.int64)) if image.mode in _SIXTEEN_BITS else ids.astype(np.uint8)


def open_map(data: bytes) -> Image.Image:
    """A decoded PNG, GIF (its first frame), TIFF or BMP, as it is stored; ValueError if it is none or damaged."""
    try:
        image = open_header(data, _FORMATS)
        check_size(*image.size)
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise ValueError("a TIFF of several pages is no map; save one page")
        image.load()
    except Image.UnidentifiedImageError:
        if data.startswith(_JPEG):
            raise ValueError("a JPEG does not keep exact ids; save it as PNG") from None
        raise ValueError("not a PNG, GIF, TIFF, BMP or npy file") from None
    except ValueError:  # also DecodeError
        raise
    except Exception as error:  # a decoder raises errors of any type on hostile bytes
        raise ValueError(f"damaged: {error}") from error
    return image


def _array(data: bytes) -> np.ndarray:
    try:
        values = open_array(data, types=_ARRAYS)
    except (UnreadableImageError, DecodeError):
        raise
    except Exception as error:  # numpy raises errors of any type on hostile headers
        raise ValueError(f"damaged npy: {error}") from error
    if values.ndim == 3 and values.shape[2] != 1:
        raise ValueError(f"npy of shape {values.shape}; a map has one channel")
    return values.reshape(values.shape[:2]).astype(np.int64)


def _checked(ids: np.ndarray) -> np.ndarray:
    """int32; ValueError for ids that no class can have."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise ValueError(
            f"ids from {ids.min():.0f} to {ids.max():.0f}; expected 0 and above (void is 255, task.void_ids)"
        )
    return ids.astype(np.int32)


def decode_segment_ids(data: bytes) -> np.ndarray:
    """The segment ids int32 [H, W] of a COCO panoptic PNG: red + 256 green + 65536 blue.

    Raises:
        ValueError: it is not a colour PNG, or is damaged.
    """
    image = _png(data)
    if image.mode != "RGB":
        raise ValueError(f"a panoptic PNG of mode {image.mode}; COCO's are RGB")
    return np.asarray(image).astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)


def decode_depth(data: bytes, units_per_metre: float) -> np.ndarray:
    """Depth in metres, float32 [H, W], of a 16-bit gray PNG; 0 remains 0: unknown.

    Raises:
        ValueError: it is not a 16-bit PNG, or is damaged.
    """
    image = _png(data)
    if image.mode not in _SIXTEEN_BITS:
        raise ValueError(f"a depth map of mode {image.mode}; expected a gray PNG of 16 bits")
    return np.asarray(image).astype(np.float32) / np.float32(units_per_metre)


def _png(data: bytes) -> Image.Image:
    try:
        image = open_image(data)
        if image.format != "PNG":
            raise ValueError(f"a {image.format} does not keep exact ids or depths; save it as PNG")
        image.load()
    except UnreadableImageError as error:
        raise ValueError(str(error)) from error
    except (OSError, SyntaxError, EOFError, IndexError) as error:
        raise ValueError(f"damaged PNG: {error}") from error
    return image
