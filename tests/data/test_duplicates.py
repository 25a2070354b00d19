"""Images that are in a data set twice, or in two."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from launch.cli import main
from pretrain.data.duplicates.near import near_pairs, thumbnail
from pretrain.data.duplicates.search import duplicates, look
from pretrain.data.loader.samples import Samples
from pretrain.data.shards.dataset import Dataset
from tests.runs import SHARDS


def photos() -> list[Image.Image]:
    """Those of samples/grocery/val."""
    return [Image.fromarray(sample.image()) for sample in Samples(Dataset.open(str(SHARDS / "val")))]


def altered(photo: Image.Image, how: str, rng: np.random.Generator) -> Image.Image:
    width, height = photo.size
    match how:
        case "crop":
            part = rng.uniform(0.8, 0.95)
            w, h = int(width * part), int(height * part)
            left, top = (int(rng.integers(0, most + 1)) for most in (width - w, height - h))
            return photo.crop((left, top, left + w, top + h))
        case "re-encode":
            data = io.BytesIO()
            photo.save(data, "JPEG", quality=40)
            return Image.open(data).convert("RGB")
        case "resize":
            part = rng.uniform(0.4, 0.7)
            return photo.resize((int(width * part), int(height * part)))
        case "mirror":
            return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    bright = ImageEnhance.Brightness(photo).enhance(rng.uniform(0.75, 1.25))
    return ImageEnhance.Color(ImageEnhance.Contrast(bright).enhance(rng.uniform(0.8, 1.2))).enhance(0.7)


HOW = ("crop", "re-encode", "resize", "mirror", "colour")


def shards(folder: Path, images: dict[str, Image.Image]) -> str:
    source = folder / "photos"
    source.mkdir(parents=True)
    for name, image in images.items():
        image.save(source / f"{name}.png")
    assert main(["data", "write", str(source), str(folder / "shards")]) == 0
    return str(folder / "shards")


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "pairs.csv").read_text().splitlines()))


def key(name: str) -> str:
    return name.split("/", 1)[1]


@pytest.mark.slow
def test_a_hundred_planted_duplicates_are_found_among_real_photos():
    rng, real = np.random.default_rng(0), photos()
    planted = [(how, int(number)) for how in HOW for number in rng.choice(len(real), 20, replace=False)]
    images = [*real, *(altered(real[number], how, rng) for how, number in planted)]
    found = {(near.a, near.b) for near in near_pairs(np.stack([thumbnail(np.asarray(i)) for i in images]), None, 0.9)}
    expected = {(number, len(real) + position) for position, (_, number) in enumerate(planted)}
    assert len(expected & found) >= 98
    of = {len(real) + position: number for position, (_, number) in enumerate(planted)}  # copies of one photo are alike
    false = {(a, b) for a, b in found - expected if of.get(a, a) != of.get(b, b)}
    assert len(false) <= 0.01 * len(real)


def test_what_the_list_leaves_is_without_duplicates_and_the_largest_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    real = photos()[:6]
    images = {f"photo{number}": photo for number, photo in enumerate(real)}
    mirrored = real[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    images |= {"same": real[0], "small": real[1].resize((40, 40)), "mirrored": mirrored}
    where, out = shards(tmp_path, images), tmp_path / "out"
    capsys.readouterr()
    assert main(["data", "dups", where, "--out", str(out)]) == 1
    assert "9 images: 3 pairs (1 bytes, 0 pixels, 2 near); 3 images are needless" in capsys.readouterr().out
    pairs = {frozenset((key(row["first"]), key(row["second"]))): row["kind"] for row in rows(out)}
    assert pairs == {
        frozenset(("photo0", "same")): "bytes",
        frozenset(("photo1", "small")): "near",
        frozenset(("photo2", "mirrored")): "near",
    }
    left_out = {key(name) for name in (out / "exclude.txt").read_text().split()}
    assert "small" in left_out and "photo1" not in left_out
    with Image.open(out / "pairs.png") as sheet:
        assert sheet.size == (6 * 160, 190)
    rest = look(Dataset.open(where, exclude=out / "exclude.txt"))
    assert len(rest.names) == 6 and not duplicates(rest, None, 0.9)


def test_equal_pixels_in_other_files_are_exact_duplicates(tmp_path: Path):
    real = photos()[:3]
    source = tmp_path / "photos"
    source.mkdir()
    for number, photo in enumerate(real):
        photo.save(source / f"{number}.png")
    real[0].save(source / "again.webp", lossless=True)
    assert main(["data", "write", str(source), str(tmp_path / "shards")]) == 0
    assert main(["data", "dups", str(tmp_path / "shards"), "--exact", "--out", str(tmp_path / "out")]) == 1
    (row,) = rows(tmp_path / "out")
    assert {key(row["first"]), key(row["second"])} == {"0", "again"} and row["kind"] == "pixels"


def test_images_of_another_data_set_are_named_as_leakage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    real, rng = photos(), np.random.default_rng(3)
    train = shards(tmp_path / "train", {f"t{number}": photo for number, photo in enumerate(real[:8])})
    val = shards(
        tmp_path / "val",
        {"v0": altered(real[3], "crop", rng), "v1": altered(real[5], "re-encode", rng), "v2": real[20], "v3": real[21]},
    )
    capsys.readouterr()
    assert main(["data", "dups", train, "--against", val, "--out", str(tmp_path / "out")]) == 1
    assert "8 images and 4 of the other data set: 2 pairs" in capsys.readouterr().out
    assert {(key(row["first"]), key(row["second"])) for row in rows(tmp_path / "out")} == {("t3", "v0"), ("t5", "v1")}
    assert {key(name) for name in (tmp_path / "out/exclude.txt").read_text().split()} == {"t3", "t5"}
    assert main(["data", "dups", val]) == 0


def test_images_without_contrast_are_no_near_duplicates():
    ramp = np.linspace(0, 4, 64)[None, :, None].repeat(64, 0).repeat(3, 2)  # as of a lens, in images of one tone
    faint = [(level + ramp).astype(np.uint8) for level in (0, 100, 101, 250)]
    assert not list(near_pairs(np.stack([thumbnail(image) for image in faint]), None, 0.9))
    clear = [(level + 20 * ramp).astype(np.uint8) for level in (0, 100)]
    assert list(near_pairs(np.stack([thumbnail(image) for image in clear]), None, 0.9))
