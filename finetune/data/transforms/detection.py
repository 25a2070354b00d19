"""Images with objects to tensors of one size: scale, crop and mirror at random, or the complete image fitted in.

The augmentation is large-scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste", as ViTDet uses it): a scale from a wide
range relative to the fitted image, a crop at random where it is larger than the canvas, fill where it is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.coco import rle
from finetune.data.coco.instances import Instances
from finetune.data.examples import Example
from finetune.data.transforms.dense import canvas, photometric, resize_image

MIN_SIDE = 1.0  # pixels of a box that is kept after the crop


@dataclass(frozen=True)
class CropView:
    """The position of a canvas on the resized image.

    Attributes:
        size: (height, width) that the image of `original` = (height, width) is resized to.
        top, left: pixels of it that are above and left of the canvas.
        canvas: (height, width).
    """

    original: tuple[int, int]
    size: tuple[int, int]
    top: int
    left: int
    canvas: tuple[int, int]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes float32 [n, 4] of the original image in pixels of the canvas, clipped to it."""
        (height, width), (high, wide) = self.original, self.size
        scale = np.array([wide / width, high / height] * 2, dtype=np.float32)
        moved = boxes * scale - np.array([self.left, self.top] * 2, dtype=np.float32)
        bottom, right = (min(c, s - o) for c, s, o in zip(self.canvas, self.size, (self.top, self.left), strict=True))
        return np.clip(moved, 0, np.array([right, bottom] * 2, dtype=np.float32))

    def mask(self, mask: np.ndarray, box: np.ndarray) -> np.ndarray:
        """A mask of 0 and 1, uint8 [h, w] of the original, on the canvas: bilinear, then at least a half.

        Only the part in `box` [4] (on the canvas, as returned by `boxes`) is computed.
        """
        x1, y1 = np.floor(box[:2]).astype(int)
        x2, y2 = np.ceil(box[2:]).astype(int)
        (top, rows), (left, columns) = (
            _between(np.arange(first + offset, last + offset), length, resized)
            for first, last, offset, length, resized in (
                (y1, y2, self.top, self.original[0], self.size[0]),
                (x1, x2, self.left, self.original[1], self.size[1]),
            )
        )
        upper, lower = (
            mask[np.ix_(row, left[0])] * (1 - columns) + mask[np.ix_(row, left[1])] * columns
            for row in (top[0], top[1])
        )
        result = np.zeros(self.canvas, dtype=np.uint8)
        result[y1:y2, x1:x2] = upper * (1 - rows[:, None]) + lower * rows[:, None] >= 0.5
        return result

    def image(self, image: np.ndarray, fill: tuple[float, ...]) -> Tensor:
        """[h, w, C] of the original -> [C, H, W] of the canvas, of its type."""
        pixels = resize_image(image, self.size)
        pixels = pixels[:, self.top : self.top + self.canvas[0], self.left : self.left + self.canvas[1]]
        filled = canvas(fill, self.canvas, pixels.dtype)
        filled[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return filled


@dataclass(frozen=True)
class Mirror:
    """An image of `size` = (height, width) mirrored along `axes` (0: upside down, 1: left to right)."""

    axes: tuple[int, ...]
    size: tuple[int, int]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        mirrored = boxes.copy()
        for axis in self.axes:
            low, high = (1, 3) if axis == 0 else (0, 2)
            mirrored[:, low] = self.size[axis] - boxes[:, high]
            mirrored[:, high] = self.size[axis] - boxes[:, low]
        return mirrored

    def masks(self, masks: np.ndarray) -> np.ndarray:
        """Of masks [n, h, w]."""
        return np.flip(masks, tuple(axis + 1 for axis in self.axes))


@dataclass(frozen=True)
class DetectionTrain:
    """One random view of an image and the objects in it. Crowds are no targets but ignored regions.

    Args:
        size: (height, width) of the canvas in pixels.
        scale: range of the random factor of the fitted size.
        hflip, vflip: probabilities.
        photometric: change brightness, contrast, saturation and hue.
        masks: return them too; a box is then the smallest around the visible part of its mask.
        crowds: return also the map of pixels outside crowds.
        fill: pixel in 0 to 255 outside the image.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    hflip: float
    vflip: float
    photometric: bool
    masks: bool
    crowds: bool
    fill: tuple[float, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """image [C, H, W], boxes float32 [n, 4], labels int64 [n], ignored float32 [m, 4], the boxes of crowds;
        masks uint8 [n, H, W]; valid bool [H, W]."""
        view = self._view(example, rng)
        axes = tuple(axis for axis, p in ((1, self.hflip), (0, self.vflip)) if rng.random() < p)
        mirror = Mirror(axes, view.original)
        image = view.image(np.ascontiguousarray(np.flip(example.image, axes)), self.fill)
        sample: dict[str, Any] = {"image": photometric(image, rng) if self.photometric else image}
        truth: Instances = example.target
        sample |= _targets(truth.select(~truth.crowd), mirror, view, self.masks)
        crowds = truth.select(truth.crowd)
        sample["ignored"] = torch.from_numpy(view.boxes(mirror.boxes(crowds.boxes)))
        if self.crowds:
            sample["valid"] = _valid(crowds, mirror, view, self.masks)
        return sample

    def _view(self, example: Example, rng: np.random.Generator) -> CropView:
        original = example.image.shape[0], example.image.shape[1]
        size = fitted(original, self.size, float(rng.uniform(*self.scale)))
        top, left = (int(rng.integers(max(side - limit, 0) + 1)) for side, limit in zip(size, self.size, strict=True))
        return CropView(original, size, top, left, self.size)


@dataclass(frozen=True)
class DetectionEval:
    """The complete image, as large as fits into `size` = (height, width), at the top left."""

    size: tuple[int, int]
    fill: tuple[float, ...]

    def __call__(self, example: Example) -> dict[str, Any]:
        """image [C, H, W]; content and original_size, (height, width) of the image in it and in the file."""
        original = example.image.shape[0], example.image.shape[1]
        view = CropView(original, fitted(original, self.size), 0, 0, self.size)
        return {
            "image": view.image(example.image, self.fill),
            "content": torch.tensor(view.size),
            "original_size": torch.tensor(original),
        }


def fitted(original: tuple[int, int], canvas: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image of size `original` as large as fits into `canvas`, times `factor`."""
    ratio = factor * min(canvas[0] / original[0], canvas[1] / original[1])
    return max(round(original[0] * ratio), 1), max(round(original[1] * ratio), 1)


def _targets(truth: Instances, mirror: Mirror, view: CropView, masks: bool) -> dict[str, Tensor]:
    """Boxes, labels and masks of the objects that are visible in the view."""
    boxes = view.boxes(mirror.boxes(truth.boxes))
    seen = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= MIN_SIDE
    truth, boxes = truth.select(seen), boxes[seen]
    if not masks:
        return {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(truth.labels)}
    shown = _masks(truth, mirror, view)
    boxes = _around(shown)
    left = boxes[:, 2] > boxes[:, 0]
    found = {"boxes": boxes[left], "labels": truth.labels[left], "masks": shown[left]}
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _masks(truth: Instances, mirror: Mirror, view: CropView) -> np.ndarray:
    """uint8 [n, H, W] on the canvas."""
    assert truth.masks is not None, "the annotations were opened without masks"
    around = view.boxes(mirror.boxes(rle.boxes(truth.masks)))  # a mask may extend slightly beyond its annotated box
    shown = np.zeros((len(truth), *view.canvas), dtype=np.uint8)
    # One at a time: all of them at full size would need much memory.
    for place, (mask, box) in enumerate(zip(truth.masks, around, strict=True)):
        shown[place] = view.mask(mirror.masks(rle.decode_one(mask)[None])[0], box)
    return shown


def _valid(crowds: Instances, mirror: Mirror, view: CropView, masks: bool) -> Tensor:
    """bool [H, W], False in a crowd."""
    if masks:
        return torch.from_numpy(~_masks(crowds, mirror, view).any(axis=0))
    valid = torch.ones(view.canvas, dtype=torch.bool)
    for x1, y1, x2, y2 in view.boxes(mirror.boxes(crowds.boxes)).round().astype(int).tolist():
        valid[y1:y2, x1:x2] = False
    return valid


def _around(masks: np.ndarray) -> np.ndarray:
    """The smallest box around each mask [n, H, W], float32 [n, 4]; zeros for an empty one."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _between(places: np.ndarray, length: int, resized: int) -> tuple[np.ndarray, np.ndarray]:
    """The two of `length` pixels around each of the `places` among `resized`, [2, k], and the second's share [k]."""
    at = np.clip((places + 0.5) * length / resized - 0.5, 0, length - 1)
    first = np.floor(at).astype(np.int64)
    return np.stack([first, np.minimum(first + 1, length - 1)]), (at - first).astype(np.float32)
