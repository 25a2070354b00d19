"""The objects of many images in a few arrays: compact to keep and to send to every worker."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from finetune.data.coco.instances import Instances
from finetune.data.coco.rle import Rle


class InstanceTable:
    """Item i is the `Instances` of image i. About 150 bytes per object with its mask (COCO's 860,000: 130 MB).

    Args:
        images: either all or none have masks.
        sizes: int [n, 2], (height, width) of each image.
    """

    def __init__(self, images: Sequence[Instances], sizes: np.ndarray) -> None:
        self.ends = np.cumsum([len(objects) for objects in images])
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.boxes = np.concatenate([np.zeros((0, 4), np.float32), *(objects.boxes for objects in images)])
        self.labels = np.concatenate([np.zeros(0, np.int64), *(objects.labels for objects in images)])
        self.crowd = np.concatenate([np.zeros(0, bool), *(objects.crowd for objects in images)])
        self.areas = np.concatenate([np.zeros(0, np.float32), *(objects.areas for objects in images)])
        self.ids = np.concatenate([np.zeros(0, np.int64), *(objects.ids for objects in images)])
        texts = [mask["counts"].encode() for objects in images for mask in objects.masks or ()]
        self.has_masks = bool(images) and images[0].masks is not None
        self.text = b"".join(texts)
        self.text_ends = np.cumsum([len(text) for text in texts])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Instances:
        if not 0 <= index < len(self):
            raise IndexError(f"{len(self)} images, index {index} requested")
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        masks = [self._mask(index, place) for place in range(part.start, part.stop)] if self.has_masks else None
        arrays = (self.boxes, self.labels, self.crowd, self.areas, self.ids)
        return Instances(*(array[part].copy() for array in arrays), masks=masks)

    def digest(self) -> bytes:
        """sha256 of everything."""
        total = hashlib.sha256(self.text)
        for array in (self.ends, self.sizes, self.boxes, self.labels, self.crowd, self.areas, self.ids, self.text_ends):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.digest()

    def _mask(self, index: int, place: int) -> Rle:
        start = int(self.text_ends[place - 1]) if place else 0
        return {"size": self.sizes[index].tolist(), "counts": self.text[start : int(self.text_ends[place])].decode()}
