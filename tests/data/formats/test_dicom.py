"""DICOM files: those that pydicom ships (a CT and an MR slice, and others of real devices), and written ones."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset as Header
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGLosslessSV1

from pretrain.data.__main__ import main as data_command
from pretrain.data.formats.dicom import read_dicom
from pretrain.data.formats.stored import DecodeError, SeveralPagesError
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.views.decode import decode_file, decode_sample, image_values, stored_values
from pretrain.data.write.images import prepare

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
FILM = np.random.default_rng(0).integers(0, 4096, (24, 32)).astype(np.uint16)


def dicom(pixels: np.ndarray, *, bits: int = 12, high: int | None = None, syntax: Any = None, **fields: Any) -> bytes:
    header = Header()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName = "Doe^Jane"
    header.Rows, header.Columns = pixels.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored = pixels.itemsize * 8, bits
    header.HighBit = bits - 1 if high is None else high
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(header, name, value)
    out = io.BytesIO()
    pydicom.dcmwrite(out, header, enforce_file_format=True)
    return out.getvalue()


def test_a_film_of_12_bits_keeps_every_level():
    found = read_dicom(dicom(FILM))
    assert found.kind == "uint16 DICOM" and found.colours == 1
    np.testing.assert_array_equal(found.values[..., 0], FILM)
    pixels = decode_file(dicom(FILM), 3, value_range=(0, 4095))
    assert len(np.unique(pixels)) == len(np.unique(FILM))
    kind, values = stored_values(dicom(FILM)) or ("", FILM)
    assert kind == "uint16 DICOM" and values.max() <= 4095
    with pytest.raises(DecodeError, match="data\\.range"):
        decode_file(dicom(FILM), 1)


def test_monochrome1_is_inverted_within_its_bits():
    data = dicom(FILM, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_dicom(data).values[..., 0], 4095 - FILM)
    signed = FILM.astype(np.int16) - 2048
    data = dicom(signed, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_dicom(data).values[..., 0], -1 - signed)


def test_bits_beside_the_stored_ones_are_no_values():
    overlay = FILM | np.uint16(0x9000)
    np.testing.assert_array_equal(read_dicom(dicom(overlay)).values[..., 0], FILM)
    with pytest.raises(DecodeError, match="12 stored bits up to bit 15 of 16 is not read"):
        read_dicom(dicom(FILM << 4, high=15))
    signed = FILM.astype(np.int16) - 2048
    np.testing.assert_array_equal(read_dicom(dicom(signed & np.int16(0x0FFF))).values[..., 0], signed)


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1024, "int16"), (2, 0, "int16"), (16, 0, "uint16"), (17, 0, "float32"), (0.5, 3, "float32")],
)
def test_slope_and_intercept_give_the_unit_of_the_modality(slope, intercept, dtype):
    found = read_dicom(dicom(FILM, RescaleSlope=slope, RescaleIntercept=intercept)).values[..., 0]
    np.testing.assert_allclose(found, FILM.astype(float) * slope + intercept)
    assert found.dtype == dtype


def test_slices_of_real_devices_are_the_values_of_pydicom():
    # The first bytes of MR_small are those of a TIFF, as DICOM allows.
    assert (SHIPPED / "MR_small.dcm").read_bytes()[:4] == b"II*\0"
    assert image_values((SHIPPED / "MR_small.dcm").read_bytes())[0] == "int16 DICOM"
    for name, dtype in (("CT_small.dcm", "float32"), ("MR_small.dcm", "int16"), ("MR_small_RLE.dcm", "int16")):
        path = SHIPPED / name
        header = pydicom.dcmread(path)
        slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        found = read_dicom(path.read_bytes())
        assert found.values.dtype == dtype
        np.testing.assert_allclose(found.values[..., 0], header.pixel_array * slope + intercept)


def test_every_shipped_file_is_an_image_or_a_named_refusal():
    read, refused = 0, []
    for path in sorted(SHIPPED.glob("*.dcm")):
        data = path.read_bytes()
        if data[128:132] != b"DICM":
            continue
        try:
            values = read_dicom(data).values
        except DecodeError as error:
            refused.append(str(error))
            assert "\n" not in str(error)
        else:
            read += 1
            assert values.ndim == 3 and str(values.dtype) in ("uint8", "uint16", "int16", "float32")
    assert read >= 30 and any("PALETTE COLOR" in reason for reason in refused)


def test_frames_are_refused_or_become_channels():
    frames = np.stack([FILM, FILM // 2, FILM // 3])
    with pytest.raises(SeveralPagesError, match="3 frames; `fovea data write --pages channels`"):
        read_dicom(dicom(frames))
    found = read_dicom(dicom(frames), pages_are_channels=True)
    np.testing.assert_array_equal(found.values, frames.transpose(1, 2, 0))
    assert prepare(dicom(frames), size=None, quality=90, pages="channels")[0] == "npy"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom(FILM, PhotometricInterpretation="PALETTE COLOR"), "colours PALETTE COLOR of 1 channels"),
        (dicom(FILM.astype(np.uint32), bits=20), "32 bits is not read"),
        (dicom(FILM, Rows=60_000, Columns=60_000), "too large: 60000 x 60000 pixels"),
        (dicom(FILM, RescaleSlope="1e400"), "damaged DICOM: slope inf"),
        (dicom(FILM)[:-100], "damaged DICOM"),
    ],
)
def test_what_is_not_read_is_named(data, reason):
    with pytest.raises(DecodeError, match=reason):
        read_dicom(data)


def test_encodings_without_a_decoder_are_named_with_the_way_out():
    with pytest.raises(DecodeError, match="a deflated DICOM is not read; `dcmconv"):
        read_dicom(dicom(FILM, syntax=DeflatedExplicitVRLittleEndian))
    data = bytes.replace(dicom(FILM), ExplicitVRLittleEndian.encode(), JPEGLosslessSV1.encode())
    assert data != dicom(FILM)
    header = pydicom.dcmread(io.BytesIO(dicom(FILM)))
    header.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    header.PixelData = encapsulate([FILM.tobytes()])
    header["PixelData"].VR = "OB"
    out = io.BytesIO()
    header.save_as(out)
    with pytest.raises(DecodeError, match=r"JPEG Lossless.* has no decoder here: pip install"):
        read_dicom(out.getvalue())


def test_shards_of_a_dicom_set_hold_values_and_no_patient(tmp_path: Path, capsys):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.dcm").write_bytes(dicom(FILM))
    (tmp_path / "films" / "b.DCM").write_bytes(dicom(FILM, PhotometricInterpretation="MONOCHROME1"))
    (tmp_path / "films" / "c.dcm").write_bytes(dicom((FILM >> 4).astype(np.uint8), bits=8))
    (tmp_path / "films" / "d.dcm").write_bytes(dicom(np.stack([FILM, FILM])))
    assert data_command(["write", str(tmp_path / "films"), str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "skipped d.dcm: cannot be decoded: a DICOM of 2 frames" in said and "data.range=[0, 4095]" in said
    dataset = Dataset.open(tmp_path / "out")
    assert sorted(dataset.extensions) == ["npy", "png"]
    assert b"Doe" not in Path(dataset.paths[0]).read_bytes()
    reader, seen = Reader(dataset), {}
    for place in range(3):
        sample = reader.read(0, place)
        seen[sample["__key__"]] = decode_sample(sample, 1, value_range=(0.0, 255.0 if "png" in sample else 4095.0))
    np.testing.assert_allclose(seen["a"] + seen["b"], 255, atol=1e-3)
    np.testing.assert_allclose(seen["c"][..., 0], FILM >> 4, atol=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(128, 700), st.integers(0, 255)), max_size=8), st.floats(0.3, 1))
def test_damaged_bytes_give_values_or_a_decode_error(changes, kept):
    damaged = bytearray(dicom(FILM[:8, :8], RescaleIntercept=-1024))
    for place, value in changes:
        damaged[place % len(damaged)] = value
    damaged[128:132] = b"DICM"
    try:
        found = read_dicom(bytes(damaged[: max(140, int(kept * len(damaged)))]), max_pixels=100_000)
    except DecodeError as error:
        assert str(error)
    else:
        assert found.values.ndim == 3
