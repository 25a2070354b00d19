from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data.__main__ import main
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.show import decode, examine, save_sheet
from pretrain.data.write.images import UnreadableImageError
from tests.data.photos import ramps, stored
from tests.data.tars import flip, image_bytes, make_dataset, tar_bytes


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def opened(tmp_path, members) -> Dataset:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(members))
    build_index([str(path)])
    return Dataset.open(path)


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    images = [np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), dtype=np.uint8) for i in range(5)]
    statistics = examine(opened(tmp_path, [(f"{i}.png", png(image)) for i, image in enumerate(images)]))
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    mean, std = statistics.mean_std(3)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)
    assert (min(statistics.heights), max(statistics.heights), set(statistics.widths)) == (16, 20, {20})


def test_large_images_are_sampled_without_bias(tmp_path):
    image = np.random.default_rng(0).integers(0, 200, (900, 700, 3), dtype=np.uint8)
    mean, std = examine(opened(tmp_path, [("0.png", png(image))])).mean_std(3)
    np.testing.assert_allclose(mean, image.mean((0, 1)) / 255, rtol=0.01)
    np.testing.assert_allclose(std, image.std((0, 1)) / 255, rtol=0.01)


def test_modes_labels_and_unreadable_samples_are_counted(tmp_path):
    array = io.BytesIO()
    np.save(array, np.full((4, 6, 5), 51, np.uint8))
    members = [
        ("a.jpg", image_bytes(0)),
        ("a.cls", b"1"),
        ("b.jpg", image_bytes(1, mode="L")),
        ("b.cls", b"1\n"),
        ("c.jpg", image_bytes(2, mode="CMYK")),
        ("c.cls", b"0"),
        ("d.png", image_bytes(3, mode="I;16", image_format="PNG")),
        ("e.npy", array.getvalue()),
        ("f.jpg", b"hello"),
        ("g.txt", b"no image"),
    ]
    (tmp_path / "classes.json").write_text('{"classes": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}')
    statistics = examine(opened(tmp_path, members))
    assert statistics.modes == {"RGB": 1, "L": 1, "CMYK": 1, "I;16": 1, "npy 5": 1}
    assert statistics.labels == {"1 dog": 2, "0 cat": 1}
    assert [key for key, _ in statistics.unreadable] == ["f", "g"]
    np.testing.assert_allclose(statistics.mean_std(5)[0], [0.2] * 5)
    rows = dict(statistics.rows())
    assert rows["samples"] == "7 in 1 shards"
    assert rows["labels (2)"] == "1 dog: 2, 0 cat: 1"
    assert rows["unreadable"].startswith("2\nf: not a JPEG")


def test_photos_that_are_turned_are_counted_and_measured_upright(tmp_path):
    shown = ramps(16, 24)
    members = [(f"{o}.png", stored(shown, o, "PNG")) for o in range(1, 9)]
    statistics = examine(opened(tmp_path, members))
    assert (set(statistics.heights), set(statistics.widths), statistics.turned) == ({16}, {24}, 7)
    assert dict(statistics.rows())["EXIF orientation"] == "7 photos are turned upright (data.orientation)"
    assert all((decode({"png": data})[1] == shown).all() for _, data in members)


def test_sixteen_bits_are_cut_to_the_upper_eight():
    deep = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    assert decode({"png": png(deep)})[1][0, :, 0].tolist() == [0, 0, 1, 255]


def test_a_sample_with_a_wrong_checksum_is_counted_as_unreadable(tmp_path):
    dataset = make_dataset(tmp_path, shards=1)
    flip(tmp_path / "train-000000.tar", 600)
    assert examine(dataset).unreadable == [("000000", "crc32c mismatch")]


def test_what_training_cannot_decode_is_unreadable_here_too():
    data = bytearray(image_bytes(0, size=(90, 60)))
    data[len(data) // 3 : len(data) // 3 + 2] = b"\xff\xd5"
    Image.open(io.BytesIO(data)).load()  # PIL says nothing
    with pytest.raises(UnreadableImageError, match="Corrupt JPEG data"):
        decode({"jpg": bytes(data)})


def test_the_seed_chooses_the_samples(tmp_path):
    dataset = make_dataset(tmp_path, shards=4, samples=6)
    sheets = []
    for seed in (0, 0, 1):
        save_sheet(dataset, tmp_path / "sheet.png", count=5, seed=seed)
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    assert examine(dataset, limit=5).examined == 5


@pytest.mark.parametrize(("count", "size"), [(3, (480, 190)), (8, (1280, 190)), (100, (1280, 380))])
def test_the_sheet_is_as_large_as_its_images_need(tmp_path, count, size):
    dataset = make_dataset(tmp_path, shards=2, samples=6)
    flip(tmp_path / "train-000000.tar", 600)
    out = tmp_path / "deep" / "sheet.png"
    save_sheet(dataset, out, count=count)
    sheet = Image.open(out)
    assert sheet.size == size
    assert len(np.unique(np.asarray(sheet.convert("L"))[:150])) > 50


def test_the_command_prints_a_table_and_writes_the_sheet(tmp_path, capsys):
    make_dataset(tmp_path)
    assert main(["show", str(tmp_path), "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    out = capsys.readouterr().out
    for text in ("12 in 3 shards", "mean, RGB", "16 / 16 / 16", "labels (3)", "unreadable"):
        assert text in out
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
