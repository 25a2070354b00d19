"""`fovea data stats`: numbers of known images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from pretrain.data.__main__ import main as data_command
from pretrain.data.shards.dataset import Dataset

RNG = np.random.default_rng(0)
SCENES = RNG.integers(0, 4000, (4, 30, 20, 5)).astype(np.uint16) + np.arange(5, dtype=np.uint16)
SCENES[:, :3, :, 2] = 4095  # a tenth of channel 2 is saturated


def write(folder: Path, images: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, image in images.items():
        if isinstance(image, bytes):
            (folder / name).write_bytes(image)
        elif name.endswith(".npy"):
            np.save(folder / name, image)
        elif name.endswith(".tif"):
            tifffile.imwrite(folder / name, image, photometric="minisblack", planarconfig="contig")
        else:
            Image.fromarray(image).save(folder / name)
    return folder


def stats(*arguments: str | Path) -> int:
    return data_command(["stats", *map(str, arguments)])


def test_numbers_of_12_bits_in_16_are_those_of_numpy_and_go_next_to_the_index(tmp_path, capsys):
    folder = write(tmp_path / "scenes", {f"{n}.tif": scene for n, scene in enumerate(SCENES)})
    assert data_command(["write", str(folder), str(tmp_path / "out"), "--workers", "1"]) == 0
    before = Dataset.open(tmp_path / "out").fingerprint
    assert stats(tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "4 of 4 images have 5 channels: 12 bits in uint16 TIFF" in said and "data.range=[0, 4095]" in said
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert found["fingerprint"] == before == Dataset.open(tmp_path / "out").fingerprint
    of = found["by_channels"]["5"]
    values = SCENES.reshape(-1, 5).astype(float)
    np.testing.assert_allclose(of["mean"], values.mean(0))
    np.testing.assert_allclose(of["std"], values.std(0))
    assert of["min"] == values.min(0).tolist() and of["max"] == values.max(0).tolist()
    for q, row in of["percentiles"].items():
        np.testing.assert_allclose(row, np.percentile(values, float(q), axis=0))
    np.testing.assert_allclose(of["share_at_max"], (values >= values.max(0)).mean(0))
    assert of["share_at_max"][2] >= 0.1 > 0.01 > of["share_at_max"][0]
    np.testing.assert_allclose(of["settings"]["mean"], values.mean(0) / 4095, rtol=1e-5)
    np.testing.assert_allclose(of["settings"]["std"], values.std(0) / 4095, rtol=1e-5)


def test_a_given_range_clips_before_mean_and_std(tmp_path, capsys):
    folder = write(tmp_path / "scenes", {f"{n}.npy": scene for n, scene in enumerate(SCENES)})
    assert stats(folder, "--range", "1000", "2000", "--out", tmp_path / "found.json") == 0
    settings = json.loads((tmp_path / "found.json").read_text())["by_channels"]["5"]["settings"]
    pixels = ((SCENES.reshape(-1, 5).astype(float) - 1000) / 1000).clip(0, 1)
    assert settings["range"] == [1000, 2000]
    np.testing.assert_allclose(settings["mean"], pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(settings["std"], pixels.std(0), rtol=1e-5)


def test_bits_that_lie_high_and_ranges_of_float_bands_are_named(tmp_path, capsys):
    folder = write(tmp_path / "high", {"a.png": SCENES[0, ..., 0] << 4})
    assert stats(folder) == 0
    assert "16 bits, of which the lowest 4 are always 0 in 16-bit PNG" in capsys.readouterr().out
    heights = np.stack([np.linspace(-2, 8, 600), np.linspace(0, 0.5, 600)], -1).reshape(30, 20, 2).astype(np.float32)
    assert stats(write(tmp_path / "float", {"a.npy": heights})) == 0
    assert "data.range=[[-2.0, 8.0], [0.0, 0.5]] data.mean=[0.5, 0.5]" in capsys.readouterr().out


def test_photos_other_channels_and_damaged_files_are_told_apart(tmp_path, capsys):
    photo = RNG.integers(0, 256, (30, 20, 3)).astype(np.uint8)
    images = {
        "a.png": photo,
        "b.jpg": photo,
        "g.png": photo[..., 0],
        "h.png": SCENES[0, ..., 0],
        "c.tif": SCENES[0],
        "d.tif": b"II*\0damaged",
        "e.dcm": b"",
    }
    nan = io.BytesIO()
    np.save(nan, np.full((4, 4), np.nan, np.float32))
    assert stats(write(tmp_path / "mixed", {**images, "f.npy": nan.getvalue()})) == 0
    said = capsys.readouterr().out
    assert "2 of 8 images have 3 channels: 8 bits in 8-bit image" in said and "data.range=null" not in said
    assert (
        "unreadable d.tif" in said and "unreadable e.dcm: empty file" in said and "unreadable f.npy: holds NaN" in said
    )
    assert "2 of 8 images have 1 channels" in said and "images of 8 bits among others" in said
    assert "images of several numbers of channels" in said
    assert stats(write(tmp_path / "bad", {"d.tif": b"II*\0damaged"})) == 2
    assert "none of 1 images can be read" in capsys.readouterr().err
