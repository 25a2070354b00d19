"""Images of more than 8 bits keep their bits: measured, written, decoded and cut as float32 under a stated range."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.__main__ import check
from pretrain.config import PretrainConfig, batch_bytes
from pretrain.core.configlib import ConfigError, load_config
from pretrain.data.__main__ import main
from pretrain.data.depths import look_at_values
from pretrain.data.formats.stored import DecodeError
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.shards.dataset import Dataset
from pretrain.data.show import examine
from pretrain.data.views import augment
from pretrain.data.views.decode import decode_image, decode_npy
from pretrain.data.views.pixels import to_pixels
from pretrain.data.views.specs import ViewSpec
from pretrain.data.views.values import to_pixels_of_range
from pretrain.data.write.images import prepare
from tests.data.tars import saved
from tests.runs import write_config

RAMP = (np.arange(64 * 64).reshape(64, 64) % 4096).astype(np.uint16)
RANGE = (0.0, 4095.0)
ZERO_ONE: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "in_chans": 1}


def png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, gray, gray and alpha, RGB or RGBA by the last axis."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def levels(pixels: np.ndarray) -> int:
    return len(np.unique(pixels))


def written(folder: Path, files: dict[str, bytes], *arguments: str) -> Dataset:
    for number, (name, data) in enumerate(files.items()):
        place = folder / "photos" / ("cell", "void")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    assert main(["write", str(folder / "photos"), str(folder / "shards"), "--workers", "1", *arguments]) == 0
    return Dataset.open(folder / "shards")


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_pngs_of_every_kind_keep_4096_levels(channels, in_chans):
    values = np.repeat(RAMP[..., None], channels, axis=2)
    pixels = decode_image(png(values), in_chans, value_range=RANGE)
    assert pixels.dtype == np.float32 and pixels.shape == (64, 64, in_chans)
    assert levels(pixels[..., 0]) == 4096
    np.testing.assert_allclose(pixels[..., 0], RAMP * (255 / 4095), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32", "uint8"])
def test_arrays_of_every_type_and_number_of_channels_are_read(kind):
    values = np.random.default_rng(0).integers(0, 200, (6, 8, 13)).astype(kind)
    low_high = tuple((float(c), 200.0 + c) for c in range(13))
    pixels = decode_npy(saved(values), 13, low_high)
    expected = ((values.astype(float) - np.arange(13)) * 255 / 200).clip(0, 255)
    np.testing.assert_allclose(pixels, expected, atol=1e-3)
    assert decode_npy(saved(values[..., 0]), 1, (0.0, 200.0)).shape == (6, 8, 1)


def test_values_outside_the_range_are_clipped_and_nan_is_damage():
    values = np.array([[[-9999.0], [0.0], [50.0], [np.inf]]], np.float32)
    assert to_pixels_of_range(values, (0.0, 100.0)).ravel().tolist() == [0, 0, 127.5, 255]
    values[0, 0] = np.nan
    with pytest.raises(DecodeError, match="holds NaN"):
        decode_npy(saved(values), 1, (0.0, 100.0))
    with pytest.raises(DecodeError, match="2 ranges, the image 1 channels"):
        decode_npy(saved(values), 1, ((0.0, 1.0), (0.0, 1.0)))


def test_deep_arrays_without_a_range_name_the_key_and_damaged_pngs_never_raise_otherwise():
    with pytest.raises(DecodeError, match=r"uint16 .* expected uint8 .*data\.range=\[low, high\] reads it"):
        decode_npy(saved(RAMP), 1)
    for data in (png(RAMP)[:60], png(np.repeat(RAMP[..., None], 3, 2))[:80], png(RAMP)[:25], b""):
        with pytest.raises(DecodeError):
            decode_image(data, 3, value_range=RANGE)
    with pytest.raises(DecodeError, match="too large"):
        decode_image(png(RAMP)[:16] + struct.pack(">II", 60_000, 60_000) + png(RAMP)[24:], 1, value_range=RANGE)


def test_8_bit_images_and_photos_that_are_turned_are_read_under_a_range_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(RAMP[:4, :9]).save(out, "PNG", exif=exif)
    pixels = decode_image(out.getvalue(), 1, value_range=RANGE)
    np.testing.assert_allclose(pixels[..., 0], np.rot90(RAMP[:4, :9], -1) * (255 / 4095), atol=1e-3)
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).save(out, "PNG")
    np.testing.assert_allclose(decode_image(out.getvalue(), 3, value_range=(0.0, 255.0)), small, atol=1e-4)


def test_views_and_evaluation_images_keep_the_levels_to_the_device(tmp_path: Path):
    dataset = written(tmp_path, {f"{i}.png": png(RAMP) for i in range(2)})
    view = ViewSpec("image", (64, 64), scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, interpolation="bilinear")
    spec = {"seed": 0, "block_shards": 1, "global_batch": 2, "micro_batch": 2, "value_range": RANGE, **ZERO_ONE}
    host = MicroBatches(dataset, LoaderSpec(views=[view], **spec))[0]
    assert host["image"].dtype == torch.float32
    before = host["image"].clone()
    batch = augment.apply([view], host, (0.0,), (1.0,), "cpu")["image"]
    assert host["image"].equal(before)
    np.testing.assert_allclose(batch[0, 0, 0].numpy(), RAMP / 4095, atol=1e-5)
    images, _ = next(iter(EvalImages(dataset, (64, 64), batch_size=2, resize=64, value_range=RANGE, **ZERO_ONE)))
    np.testing.assert_allclose(images[0, 0].numpy(), RAMP / 4095, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_a_resize_of_float_pixels_is_clipped_as_that_of_bytes(tmp_path: Path, interpolation: Any):
    edges = np.zeros((32, 32), np.uint16)
    edges[:, 16:] = 4095
    dataset = written(tmp_path, {"a.png": png(edges)})
    view = ViewSpec("image", (24, 24), scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, interpolation=interpolation)
    spec = {"seed": 0, "block_shards": 1, "global_batch": 1, "micro_batch": 1, "value_range": RANGE, **ZERO_ONE}
    image = MicroBatches(dataset, LoaderSpec(views=[view], **spec))[0]["image"]
    assert image.min() == 0 and image.max() == 255


def test_the_values_are_measured_in_write_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset = written(tmp_path, {f"{i}.png": png(RAMP) for i in range(3)})
    assert "3 of 3 images looked at are 16-bit PNG: values 0 to 4095" in capsys.readouterr().out
    deep = look_at_values(dataset)
    assert deep is not None and deep.needs_range and deep.suggested == "[0, 4095]"
    statistics = examine(dataset, value_range=RANGE)
    np.testing.assert_allclose(statistics.mean_std(3)[0], [RAMP.mean() / 4095] * 3, rtol=1e-4)
    assert main(["show", str(tmp_path / "shards"), "--range", "0", "4095", "--out", str(tmp_path / "a.png")]) == 0
    assert "data.range=[0, 4095]" in capsys.readouterr().out.replace("\n", " ").replace("│", " ").replace("  ", " ")
    assert main(["show", str(tmp_path / "shards"), "--range", "5", "5"]) == 2


@pytest.mark.parametrize(
    ("values", "suggested", "needed"),
    [
        (RAMP * 16, "[0, 65535]", False),
        (RAMP.astype(np.float32) / 4095, "[0, 1]", True),
        (RAMP.astype(np.int16) - 1000, "[-1000, 3095]", True),
        (RAMP.astype(np.uint8), None, False),
    ],
)
def test_a_range_is_asked_for_where_8_bits_would_not_hold_the_image(tmp_path: Path, values, suggested, needed):
    data = png(values) if values.dtype == np.uint16 else saved(values)
    name = "a.png" if values.dtype == np.uint16 else "a.npy"
    deep = look_at_values(written(tmp_path, {name: data}))
    assert (deep and deep.suggested, bool(deep and deep.needs_range)) == (suggested, needed)


def test_a_check_of_12_bit_images_names_the_key_and_passes_with_it(tmp_path: Path):
    written(tmp_path, {f"{i}.png": png(RAMP) for i in range(16)})
    config = write_config(tmp_path, "mae")
    given = [f"data.shards={tmp_path / 'shards'}"]
    with pytest.raises(
        ConfigError, match=r"data\.range: missing; 16 of 16 .* values 0 to 4095.*data\.range=\[0, 4095\]"
    ):
        check(config, given, world_size=1)
    assert check(config, [*given, "data.range=[0, 4095]"], world_size=1)[0].data.range == RANGE
    plain, deep = (load_config(PretrainConfig, config, extra) for extra in ([], ["data.range=[0, 4095]"]))
    assert batch_bytes(deep, 8) == 4 * batch_bytes(plain, 8)
    for wrong in ("[5, 5]", "[[0, 1], [0, 1]]", "[]"):
        with pytest.raises(ConfigError, match=r"data\.range"):
            check(config, [*given, f"data.range={wrong}"], world_size=1)


def test_arrays_of_more_bits_are_written_and_resized_in_their_type():
    for values in (RAMP, RAMP.astype(np.float32) / 4095, np.repeat(RAMP[..., None], 5, 2).astype(np.int16)):
        assert prepare(saved(values), size=None, quality=90) == ("npy", saved(values))
        small = np.load(io.BytesIO(prepare(saved(values), size=32, quality=90)[1]))
        assert small.dtype == values.dtype and small.shape == (32, 32, *values.shape[2:])
        assert abs(float(small.mean()) - float(values.mean())) < 0.01 * float(values.max())


def test_a_program_gives_files_and_deep_arrays_under_the_range(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(RAMP))
    from_file, from_array = to_pixels(tmp_path / "a.png", 1, value_range=RANGE), to_pixels(RAMP, 1, value_range=RANGE)
    assert np.array_equal(from_file, from_array) and levels(from_file) == 4096
    with pytest.raises(ValueError, match=r"an array .* with 3 channels"):
        to_pixels(RAMP, 3, value_range=RANGE)
