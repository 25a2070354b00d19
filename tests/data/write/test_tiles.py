"""`fovea data write --tile`: the squares of large images, value for value."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pretrain.data.__main__ import main as data_command
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.views.decode import image_values
from pretrain.data.write.images import UnreadableImageError, prepare
from pretrain.data.write.tiles import cut

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (70, 100, 3)).astype(np.uint8)
BANDS = RNG.integers(0, 4096, (70, 100, 5)).astype(np.uint16)


def file_of(pixels: np.ndarray, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    if kind == "NPY":
        np.save(out, pixels)
    elif kind == "TIFF":
        tifffile.imwrite(out, pixels, photometric="minisblack", planarconfig="contig", tile=(32, 32))
    else:
        Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


def tiles(data: bytes, tile: int = 32, overlap: int = 8) -> dict[str, tuple[str, np.ndarray]]:
    found = cut(data, tile=tile, overlap=overlap, quality=95, max_pixels=10_000)
    return {place: (extension, image_values(stored)[1]) for place, extension, stored in found}


@pytest.mark.parametrize(
    ("pixels", "kind", "extension"),
    [(PHOTO, "PNG", "png"), (BANDS, "TIFF", "npy"), (BANDS, "NPY", "npy"), (BANDS[..., 0], "PNG", "png")],
)
def test_tiles_are_the_pixels_of_the_image_and_cover_it(pixels: np.ndarray, kind: str, extension: str):
    whole = pixels if pixels.ndim == 3 else pixels[..., None]
    covered = np.zeros(whole.shape[:2], int)
    found = tiles(file_of(pixels, kind))
    for place, (suffix, part) in found.items():
        top, left = map(int, place.split("_"))
        assert suffix == extension and part.shape[:2] == (32, 32)
        np.testing.assert_array_equal(part, whole[top : top + 32, left : left + 32])
        covered[top : top + 32, left : left + 32] += 1
    assert (covered >= 1).all() and len(found) == 3 * 4
    assert list(tiles(file_of(pixels, kind), tile=200)) == ["0_0"]


def test_a_jpeg_is_turned_upright_and_stays_a_jpeg():
    smooth = np.add.outer(np.arange(70), np.arange(100)).astype(np.uint8)[..., None].repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = tiles(file_of(smooth, "JPEG", quality=95, exif=exif))
    assert {extension for extension, _ in found.values()} == {"jpg"}
    upright = np.rot90(smooth, -1)
    for place, (_, part) in found.items():
        top, left = map(int, place.split("_"))
        assert np.abs(part.astype(int) - upright[top : top + 32, left : left + 32]).max() <= 6
    assert "68_38" in found  # 100 pixels high, 70 wide


def test_an_image_that_cannot_be_used_has_no_tiles():
    for data, reason in (
        (b"", "empty"),
        (b"GIF89a", "not a JPEG"),
        (file_of(np.zeros((200, 200), np.uint8), "PNG"), "too large"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            tiles(data)


def test_shards_hold_the_tiles_of_every_image_with_its_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, number in (("sea/a.png", 0), ("land/a.png", 1), ("land/b.tif", 1)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(file_of(PHOTO + np.uint8(number), "PNG" if name[-3:] == "png" else "TIFF"))
    command = ["write", str(tmp_path / "in"), str(tmp_path / "out"), "--tile", "50", "--workers", "1"]
    assert data_command(command) == 0
    assert "12 tiles in 1 shards" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "out")
    reader, seen = Reader(dataset), set()
    for place in range(12):
        sample = reader.read(0, place)
        key, _, corner = sample["__key__"].rpartition("/")
        top, left = map(int, corner.split("_"))
        _, part = image_values(sample.get("png") or sample["npy"])
        np.testing.assert_array_equal(part, (PHOTO + np.uint8(key[:4] == "land"))[top : top + 50, left : left + 50])
        assert int(sample["cls"]) == (0 if key[:4] == "land" else 1)
        seen.add((key, top, left))
    assert len(seen) == 12 and {(top, left) for _, top, left in seen} == {(0, 0), (0, 50), (20, 0), (20, 50)}
    assert data_command([*command, "--overlap", "10"]) == 2
    assert "overlap: 0 there, 10 now" in capsys.readouterr().err
    assert data_command([*command, "--overlap", "50"]) == 2
    assert "--overlap 50: must be 0 or more and less than --tile" in capsys.readouterr().err


def test_smaller_colours_of_16_bits_keep_their_bits(tmp_path: Path):
    import zlib

    deep = RNG.integers(0, 4096, (40, 60, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (60).to_bytes(4, "big") + (40).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert prepare(png, size=40, quality=90) == ("png", png)
    extension, smaller = prepare(png, size=20, quality=90)
    kind, values = image_values(smaller)
    assert extension == "npy" and kind == "uint16 .npy" and values.shape == (20, 30, 3) and values.max() > 256
    np.testing.assert_array_equal(tiles(png, tile=20, overlap=0)["20_40"][1], deep[20:, 40:])
