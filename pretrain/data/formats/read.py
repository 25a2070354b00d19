"""Files that hold values of any depth and any number of channels, by their first bytes."""

from __future__ import annotations

from pretrain.core.images import MAX_PIXELS
from pretrain.data.formats.dicom import is_dicom, read_dicom
from pretrain.data.formats.stored import Stored
from pretrain.data.formats.tiff import is_tiff, read_tiff


def holds_values(data: bytes) -> bool:
    """Whether a file or its beginning is of a kind that `read_stored` reads."""
    return is_tiff(data) or is_dicom(data)


def read_stored(data: bytes, max_pixels: int = MAX_PIXELS, *, pages_are_channels: bool = False) -> Stored | None:
    """The values of a TIFF or DICOM; None for a file of another kind.

    Raises:
        DecodeError: it cannot be used; `SeveralPagesError` where it has several pages, and they are no channels.
    """
    if is_tiff(data):
        return read_tiff(data, max_pixels, pages_are_channels=pages_are_channels)
    if is_dicom(data):
        return read_dicom(data, max_pixels, pages_are_channels=pages_are_channels)
    return None
