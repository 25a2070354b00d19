"""How the files of labelled images become pixels: in training, evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.examples import BadExample
from finetune.data.files import Files
from pretrain.core.images import MAX_PIXELS, DataOrientation, Orientation, ValueRange
from pretrain.data.formats.stored import DecodeError
from pretrain.data.views.decode import decode_file


@dataclass(frozen=True)
class Reading:
    """Pixels are uint8 [H, W, in_chans]; with a range of stored values float32 in the same unit, 0 to 255.

    in_chans     of the backbone: 1, 3 or 4 of JPEG, PNG and WebP, any number of TIFF, DICOM and `.npy`
    orientation  `data.orientation`
    value_range  `data.range`
    max_pixels   a larger image is a DecodeError
    """

    in_chans: int = 3
    orientation: DataOrientation = "auto"
    value_range: ValueRange | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def of_photos(self) -> Orientation:
        """How photos without annotated sides are read, and those that a release trained so predicts."""
        return "stored" if self.orientation == "stored" else "exif"

    def photo(self, data: bytes) -> np.ndarray:
        """The pixels of a file that no annotation gives a size; DecodeError if it cannot be used."""
        return decode_file(data, self.in_chans, self.of_photos, self.value_range, self.max_pixels)

    def stored(self, data: bytes) -> np.ndarray:
        """The pixels as they lie in the file, whatever its EXIF orientation."""
        return decode_file(data, self.in_chans, "stored", self.value_range, self.max_pixels)


PHOTOS = Reading()  # 8-bit RGB


class ImageFiles:
    """Images of `files` by name, in order, for a data set whose labels are not in them."""

    def __init__(self, files: Files, names: Sequence[str], reading: Reading = PHOTOS):
        self.files, self.names, self.reading = files, tuple(names), reading

    def __len__(self) -> int:
        return len(self.names)

    def photo(self, index: int) -> np.ndarray:
        """The pixels of an image; BadExample if it cannot be used."""
        name = self.names[index]
        try:
            return self.reading.photo(self.files.read(name))
        except DecodeError as error:
            raise BadExample(self.files.path(name), str(error)) from error

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.files.read(self.names[index])
