"""DICOM: the values of one image in the unit of its modality (PS3.3 C.7.6.3, C.11.1). Needs the extra `dicom`.

Windows of the file are for screens and are not applied: `data.range=[center - width / 2, center + width / 2]` is one.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from typing import Any

import numpy as np

from pretrain.core.images import MAX_PIXELS
from pretrain.data.formats.stored import MAX_PAGES, DecodeError, SeveralPagesError, Stored, check_memory

_GRAY, _COLOURS = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# Nothing else is read: no name of a patient, no private field.
_FIELDS = [
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "PixelData"),
]


def is_dicom(data: bytes) -> bool:
    """Whether a file or its beginning is a DICOM file."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, max_pixels: int = MAX_PIXELS, *, pages_are_channels: bool = False) -> Stored:
    """The image of a DICOM file: only the bits that are stored, rescaled by slope and intercept, MONOCHROME1 inverted
    within its bits, so that more is brighter. uint8, uint16 and int16 where these hold every possible value exactly,
    else float32.

    Args:
        pages_are_channels: each frame is one channel, in their order.

    Raises:
        DecodeError: pydicom is missing; it is damaged, too large, has several frames, or is of a kind that is not read.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DecodeError("a DICOM file needs pydicom: pip install 'fovea[dicom]'") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # what is damaged is an error here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_FIELDS))
            return _read(header, max_pixels, pages_are_channels)
    except DecodeError:
        raise
    except Exception as error:  # of any type on damaged bytes
        raise DecodeError(f"damaged DICOM: {' '.join(str(error).split()) or type(error).__name__}") from error


def _read(header: Any, max_pixels: int, pages_are_channels: bool) -> Stored:
    if "PixelData" not in header or "PhotometricInterpretation" not in header:
        raise DecodeError("a DICOM without an image of 8 or 16 bits")
    photometric, frames = str(header.PhotometricInterpretation), int(header.get("NumberOfFrames") or 1)
    samples, bits = int(header.SamplesPerPixel), int(header.BitsAllocated)
    gray = photometric in _GRAY and samples == 1
    if not gray and not (photometric in _COLOURS and samples == 3):
        raise DecodeError(
            f"DICOM colours {photometric} of {samples} channels are not read; save it as RGB or MONOCHROME2"
        )
    if bits not in (8, 16):
        raise DecodeError(f"a DICOM of {bits} bits is not read; 8 and 16 bits are")
    if frames > 1 and not (pages_are_channels and gray and frames <= MAX_PAGES):
        raise SeveralPagesError(
            f"a DICOM of {frames} frames; `fovea data write --pages channels` makes up to {MAX_PAGES} gray ones "
            "channels, or save each frame as a file"
        )
    if "ModalityLUTSequence" in header:
        raise DecodeError("a DICOM with a table of its modality is not read; save it with slope and intercept")
    check_memory(int(header.Columns), int(header.Rows), frames * samples * 4, max_pixels)
    values = _decode(header).reshape(frames, int(header.Rows), int(header.Columns), samples)
    values = np.ascontiguousarray(values[..., 0].transpose(1, 2, 0) if gray else values[0])
    if gray:
        values = _rescaled(_bits(values, header, inverted=photometric == "MONOCHROME1"), header)
    return Stored(f"{values.dtype} DICOM", values, colours=(1 if frames == 1 else 0) if gray else 3, extension="")


def _decode(header: Any) -> np.ndarray:
    """The pixels as they are encoded. DecodeError for an encoding without a decoder here."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_deflated:
        raise DecodeError("a deflated DICOM is not read; `dcmconv +te IN OUT` (DCMTK) writes it as it is read")
    if not get_decoder(syntax).is_available:
        raise DecodeError(
            f"DICOM encoding {syntax.name} has no decoder here: pip install pylibjpeg[all], or "
            "`gdcmconv --raw IN OUT` (GDCM) writes it without"
        )
    return pixel_array(header)


def _bits(values: np.ndarray, header: Any, *, inverted: bool) -> np.ndarray:
    """The bits that are stored, without those above them (old files keep overlays there)."""
    width, stored = values.itemsize * 8, int(header.BitsStored)
    if int(header.HighBit) != stored - 1 or not 0 < stored <= width:
        raise DecodeError(f"a DICOM of {stored} stored bits up to bit {header.HighBit} of {width} is not read")
    values = (values << (width - stored)) >> (width - stored)
    if not inverted:
        return values
    return ~values if values.dtype.kind == "i" else values ^ values.dtype.type(2**stored - 1)


def _rescaled(values: np.ndarray, header: Any) -> np.ndarray:
    slope, intercept = float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DecodeError(f"damaged DICOM: slope {slope}, intercept {intercept}")
    stored, signed = int(header.BitsStored), values.dtype.kind == "i"
    ends = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    low, high = sorted(slope * end + intercept for end in ends)
    if (slope, intercept) == (1, 0) and values.dtype != np.int8:
        return values
    for kind in (np.int16, np.uint16) if slope.is_integer() and intercept.is_integer() else ():
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return (values.astype(np.int64) * int(slope) + int(intercept)).astype(kind)
    return (values * slope + intercept).astype(np.float32)
