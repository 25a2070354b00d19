"""A name in an annotation means one file, or none: never another image."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pretrain.data.names import Names, find_files, respelled, sample_keys

NFC, NFD = (unicodedata.normalize(form, "é_0.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("wanted", "files", "found"),
    [
        ("images\\0.jpg", ["0.jpg", "1.jpg"], "0.jpg"),
        ("images/0.jpg", ["images\\0.jpg"], "images\\0.jpg"),
        ("images\\0.jpg", ["images\\0.jpg", "0.jpg"], "images\\0.jpg"),
        ("C:\\data\\train\\0.jpg", ["train/0.jpg", "val/0.jpg"], "train/0.jpg"),
        ("/home/me/train/0.jpg", ["train/0.jpg", "val/0.jpg"], "train/0.jpg"),
        ("file:///home/me/a%20b.jpg", ["a b.jpg"], "a b.jpg"),
        ("./0.jpg", ["0.jpg", "a/0.jpg"], "0.jpg"),
        ("../images/0.jpg", ["0.jpg"], "0.jpg"),
        (NFC, [NFD], NFD),
        (NFD, [NFC, "é_1.jpg"], NFC),
        ("my%20photo.jpg", ["my photo.jpg"], "my photo.jpg"),
        ("IMG_1.JPG", ["img_1.jpg", "img_2.jpg"], "img_1.jpg"),
        ("0.JPG", ["0.jpg", "0.png"], "0.jpg"),
        ("a_jpg.rf.0c1.jpg", ["a_jpg_rf_0c1.jpg"], "a_jpg_rf_0c1.jpg"),
        ("a (1).b.jpg", ["a (1)_b.png"], "a (1)_b.png"),
        ("a (1).b.jpg", ["a_1_b.jpg"], "a_1_b.jpg"),
        ("x.rf.0a1b2c3d4e", ["x.rf.0a1b2c3d4e.jpg"], "x.rf.0a1b2c3d4e.jpg"),
        ("cam1/7.png", ["cam0/7.png"], None),
        ("7.png", ["cam0/7.png", "cam1/7.png"], None),
        ("a b.jpg", ["a_b.jpg", "a_b~2.jpg"], None),
        ("gone.jpg", ["0.jpg"], None),
        ("", ["0.jpg"], None),
    ],
)
def test_a_name_of_another_system_means_the_only_file_that_fits(wanted: str, files: list[str], found: str | None):
    assert Names(files).match([wanted]) == [found]


def test_the_file_of_one_image_is_not_taken_for_another_that_is_missing():
    names = Names(["img_1.jpg", "b.jpg"])
    assert names.match(["img_1.jpg", "IMG_1.jpg", "img 1.jpg"]) == ["img_1.jpg", None, None]
    assert "img_1.jpg, with almost this name, is another image" in names.why_not("IMG_1.jpg")
    assert "could be 2 files (a/0.jpg, b/0.jpg)" in Names(["a/0.jpg", "b/0.jpg"]).why_not("0.jpg")
    assert Names(["0.jpg"]).why_not("1.jpg") == "is not among the images"


def test_every_file_is_found_by_its_name_in_the_shards_written_of_its_folder():
    names = ["a.b.jpg", "a b.jpg", "a_b.jpg", "a_b.png", "a.b.c.jpg", "a_b.c.jpg", "a.b_c.jpg", "(1) 100%.jpg",
             "d/a.b.jpg", "v1.2/x.jpg", "__m__/x.jpg", "q\\r.jpg", "tab\t.jpg",
             NFC, NFD, "Ä#?&=+;'\".jpg", "a%2Eb.jpg"]  # fmt: skip
    keys = sample_keys(names)
    assert len(set(keys)) == len(names)
    assert all("." not in key.rpartition("/")[2] for key in keys), "webdataset ends a key at the first dot"
    members = [f"{key}.{name.rpartition('.')[2]}" for key, name in zip(keys, names, strict=True)]
    assert Names(members).match(names) == members
    assert Names(members).match([f"elsewhere/{name}" for name in names]) == members


def test_a_key_depends_on_no_other_file_unless_two_would_be_one():
    assert sample_keys(["a.b.jpg"]) == ["a_b"] and sample_keys(["a_b.jpg", "a.b.jpg"]) == ["a_b", "a%2Eb%2Ejpg"]
    assert sample_keys(["/x/../é (2).jpg"]) == ["x/é (2)"]


def test_keys_of_two_sets_are_paired_if_only_one_fits():
    there = [NFD, "a b", "c_d", "X", "Y", "y"]
    assert respelled([NFC, "A b", "c.d", "x", "y"], there) == {NFC: NFD, "A b": "a b", "c.d": "c_d", "x": "X", "y": "y"}
    assert respelled(["x"], ["X", "x "]) == {"x": "x "} and respelled(["x."], ["X", "x_"]) == {"x.": "x_"}
    assert respelled(["q"], ["Q", "q~2"]) == {}, "two fit"
    assert respelled(["a/1"], ["b/1"]) == {}


def test_names_in_a_list_are_found_below_its_folder(tmp_path: Path):
    other = unicodedata.normalize("NFD", "café")
    for name in ("photos/0.jpg", f"{other}/1.jpg", "a b.jpg", "UP.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    wanted = ["photos/0.jpg", "./photos//0.jpg", "photos\\0.jpg", "D:\\me\\photos\\0.jpg", "/nowhere/photos/0.jpg",
              f"{unicodedata.normalize('NFC', 'café')}/1.jpg", "a%20b.jpg", "up.jpg", "../2.jpg", "x" * 300,
              "a\0b.jpg"]  # fmt: skip
    photo = "photos/0.jpg"
    assert find_files(tmp_path, wanted) == [
        *[photo] * 5, f"{other}/1.jpg", "a b.jpg", "UP.JPG", None, None, None,
    ]  # fmt: skip
    photos = tmp_path / "photos"
    assert find_files(photos, ["../a b.jpg", str(photos / "0.jpg")]) == ["../a b.jpg", "0.jpg"]
    assert find_files(photos, [str(tmp_path / "up.jpg")]) == [str(tmp_path / "UP.JPG")]
