"""Names of images in COCO files mean the files that were annotated, whoever wrote them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.coco.examples import open_examples
from pretrain.data.__main__ import main as data_command
from tests.finetune.data.coco.coco_files import (
    HEIGHT,
    MASKS,
    WIDTH,
    annotation,
    opened,
    write,
)


def named(tmp_path: Path, file_name: str, *files: str) -> list[str]:
    """The file that an annotation file means, of those that there are."""
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name)
    image = {"id": 7, "file_name": file_name, "width": WIDTH, "height": HEIGHT}
    return opened(tmp_path, [annotation(1)], images=[image]).names


def test_folders_may_be_missing_in_either_name(tmp_path: Path):
    assert named(tmp_path, "data/train/x.png", "train/x.png", "val/x.png") == ["train/x.png"]
    assert named(tmp_path, "y.jpg", "deep/y.png") == ["deep/y.png"]
    assert named(tmp_path, "w.png", "w.png", "deep/w.png") == ["w.png"]
    assert named(tmp_path, "train/z.jpg", "z.jpg", "z.png") == ["z.jpg"]


@pytest.mark.parametrize(
    ("file_name", "file"),
    [
        ("images\\x.png", "x.png"),
        ("C:\\set\\train\\x.png", "train/x.png"),
        ("/data/set/x.png", "x.png"),
        ("my%20photo.png", "my photo.png"),
        ("X.PNG", "x.png"),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
    ],
)
def test_names_of_other_systems_are_understood(tmp_path: Path, file_name: str, file: str):
    assert named(tmp_path, file_name, file) == [file]


def test_annotations_of_a_folder_fit_the_shards_that_are_written_of_it(tmp_path: Path):
    files = ["a_jpg.rf.0123.png", "a b (1).png", "a_b.png", "a.b.png", "v1.0/été.png"]
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (10 * files.index(name), 0, 0)).save(tmp_path / "images" / name)
    size = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": i, "file_name": name, **size} for i, name in enumerate(files)]
    source = write(tmp_path, [annotation(i, image=i) for i in range(len(files))], images=images)
    assert data_command(["write", source.images, str(tmp_path / "shards"), "--workers", "1"]) == 0
    folder, shards = (
        open_examples(MASKS, source),
        open_examples(MASKS, source.model_copy(update={"images": str(tmp_path / "shards")})),
    )
    assert not len(shards.findings) and shards.ids == folder.ids
    for i in range(len(files)):
        assert (shards[i].image == folder[i].image).all()


def test_equal_frame_numbers_in_two_folders_are_different_images(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cam1/0007\.png is not among the images \(.*cam0/0007\.png"):
        named(tmp_path, "cam1/0007.png", "cam0/0007.png")
