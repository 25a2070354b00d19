"""Class maps from every layout people keep them in, and what is wrong with them, named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data.examples import BadExample
from finetune.data.maps import depth, masks
from finetune.tasks.configs.depth import DepthConfig
from finetune.tasks.configs.segmentation import SegmentationConfig
from tests.finetune.data.maps.written import ids, opened, photo, png, write

ROOT = Path(__file__).parents[4]
SHARED = Path(os.environ.get("FOVEA_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data sets here; FOVEA_DATA names their folder")


def test_pairs_are_matched_by_name_in_nested_folders_and_unmatched_files_are_reported(tmp_path: Path):
    write(tmp_path, {
        "img/a/1.jpg": photo(), "img/b/1.png": photo(), "img/c.jpg": photo(), "mask/a/1.png": ids(0, 1),
        "mask/b/1.png": ids(1, 255), "mask/d.png": ids(0), "classes.json": json.dumps(["sky", "road"]),
    })  # fmt: skip
    found = opened(images=tmp_path / "img", masks=tmp_path / "mask")
    assert [pair.id for pair in found.pairs] == ["a/1", "b/1"]
    assert found.classes == ("sky", "road")
    assert np.unique(found[1].target).tolist() == [1, 255] and found[1].image.shape == (6, 8, 3)
    assert found.findings.counts() == {"image without a map": 1, "map without an image": 1}
    text = "\n".join(found.findings.lines())
    assert "c.jpg" in text and "d.png" in text
    again = pickle.loads(pickle.dumps(found))
    assert (again[0].target == found[0].target).all() and again.fingerprint == found.fingerprint
    write(tmp_path, {"img/a/1.jpg": photo((6, 9)), "mask/d.png": ids(0, 1, 2)})
    assert opened(images=tmp_path / "img", masks=tmp_path / "mask").fingerprint != found.fingerprint


def test_maps_are_found_by_names_of_other_systems_and_one_without_an_image_is_a_lost_label(tmp_path: Path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    files = {f"img/{name}.jpg": photo() for name in (composed, "b c", "D", "e.1", "x")}
    files |= {f"mask/{name}.png": ids(0, 1) for name in (decomposed, "b%20c", "d", "e_1", "y")}
    write(tmp_path, {**files, "classes.json": json.dumps(["sky", "road"])})
    found = opened(images=tmp_path / "img", masks=tmp_path / "mask")
    targets = {pair.id: pair.target for pair in found.pairs}
    assert targets == {composed: f"{decomposed}.png", "b c": "b%20c.png", "D": "d.png", "e.1": "e_1.png"}
    assert found.findings.counts() == {"image without a map": 1, "map without an image": 1}
    assert found.findings.labels == 5 and found.findings.lost == {"map without an image": 1}


def test_folders_inside_one_tar_are_read_without_unpacking(tmp_path: Path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, data in {"images/x.jpg": photo(), "masks/x.png": ids(2, 0), "thumbs/x.jpg": photo()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write(tmp_path, {"classes.json": json.dumps({"classes": [{"id": i, "name": f"c{i}"} for i in (0, 2)]})})
    tar_path = tmp_path / "train.tar"
    found = opened(images=tar_path / "images", masks=tar_path / "masks")
    assert found.classes.category_ids == (0, 2)
    assert np.unique(found[0].target).tolist() == [0, 1], "ids of the file become places among the classes"
    assert not len(found.findings)


def test_a_list_of_names_starts_at_1_if_0_is_void(tmp_path: Path):
    write(tmp_path, {"i/1.jpg": photo(), "m/1.png": ids(0, 1, 2, 255), "classes.json": json.dumps(["sky", "road"])})
    found = opened(SegmentationConfig(reduce_zero_label=True), images=tmp_path / "i", masks=tmp_path / "m")
    assert found.classes.category_ids == (1, 2)
    assert found[0].target[0, :4].tolist() == [255, 0, 1, 255]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (ids(0, 7), r"1\.png: ids that are neither a class nor void: 7 \(24 pixels\)"),
        (ids(0, size=(5, 8)), r"1\.png: the image has 8 x 6 pixels, its map 8 x 5"),
        (photo(), r"1\.png: a mask of mode RGB"),
        (b"\x89PNG broken", r"1\.png"),
    ],
)
def test_a_wrong_mask_is_a_bad_example_with_its_name(tmp_path: Path, mask: bytes, reason: str):
    write(tmp_path, {"i/1.jpg": photo(), "m/1.png": mask, "classes.json": json.dumps(["a", "b"])})
    found = opened(images=tmp_path / "i", masks=tmp_path / "m")
    with pytest.raises(BadExample, match=reason):
        found[0]


def test_masks_of_0_and_255_are_reported_because_255_is_void(tmp_path: Path):
    write(tmp_path, {"i/1.jpg": photo(), "m/1.png": ids(0, 255), "classes.json": json.dumps(["sky", "road"])})
    found = opened(images=tmp_path / "i", masks=tmp_path / "m").findings
    assert found.counts() == {"class never seen": 1}
    assert "no pixel of 'road' (id 1) in 1 masks, only 'sky' and void; if its id is 255" in found.lines()[0]
    known = {"classes": [{"id": 0, "name": "sky"}, {"id": 255, "name": "road"}]}
    write(tmp_path, {"classes.json": json.dumps(known), "m/1.png": ids(0, 255)})
    said = opened(SegmentationConfig(void_ids=()), images=tmp_path / "i", masks=tmp_path / "m")
    assert not len(said.findings) and np.unique(said[0].target).tolist() == [0, 1]


def test_ade20k_is_found_by_its_folders_and_its_0_is_void(tmp_path: Path):
    rows = [("Idx", "Name"), ("1", "wall"), ("2", "screen, door"), ("3", "screen")]
    table = "".join(f"{number}\t.1\t1\t1\t1\t{name}\n" for number, name in rows)
    write(tmp_path, {
        "images/training/A_1.jpg": photo(), "annotations/training/A_1.png": ids(0, 1, 3), "objectInfo150.txt": table,
    })  # fmt: skip
    found = opened(images=tmp_path / "images/training")
    assert found.classes == ("wall", "screen 2", "screen 3")
    assert np.unique(found[0].target).tolist() == [0, 2, 255]


@pytest.mark.parametrize(("ending", "stored"), [("labelIds", (7, 11, 5)), ("labelTrainIds", (0, 2, 255))])
def test_cityscapes_has_the_same_labels_from_label_ids_and_train_ids(
    tmp_path: Path, ending: str, stored: tuple[int, ...]
):
    name = "ulm/ulm_000_000"
    write(tmp_path, {
        f"leftImg8bit/train/{name}_leftImg8bit.png": photo(),
        f"gtFine/train/{name}_gtFine_{ending}.png": ids(*stored),
        f"gtFine/train/{name}_gtFine_color.png": photo(),
    })  # fmt: skip
    found = opened(images=tmp_path / "leftImg8bit/train")
    assert len(found.classes) == 19 and found.classes[2] == "building"
    assert np.unique(found[0].target).tolist() == [0, 2, 255]


def test_voc_uses_the_listed_images_and_palette_indices(tmp_path: Path):
    palette = Image.fromarray(np.resize(np.array([0, 15, 255], np.uint8), (6, 8)), "P")
    palette.putpalette([9, 8, 7] * 256)
    out = io.BytesIO()
    palette.save(out, "PNG")
    write(tmp_path, {
        "JPEGImages/1.jpg": photo(), "JPEGImages/2.jpg": photo(), "SegmentationClass/1.png": out.getvalue(),
        "SegmentationClass/2.png": out.getvalue(), "ImageSets/Segmentation/train.txt": "2\n3\n",
    })  # fmt: skip
    found = opened(images=tmp_path / "ImageSets/Segmentation/train.txt")
    assert [pair.id for pair in found.pairs] == ["2"]
    assert found.classes[15] == "person" and np.unique(found[0].target).tolist() == [0, 15, 255]
    assert found.findings.counts() == {"missing image": 1}


def test_panoptic_segments_become_classes_and_crowds_void(tmp_path: Path):
    numbers = np.zeros((2, 3, 3), np.uint8)
    numbers[0, :, 0], numbers[1, 0, 1], numbers[1, 1, 0] = (5, 5, 9), 1, 77
    file = {
        "images": [{"id": 4, "file_name": "4.jpg"}, {"id": 5, "file_name": "5.jpg"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "grass"}],
        "annotations": [
            {"image_id": 4, "file_name": "panoptic_train/4.png", "segments_info": [
                {"id": 5, "category_id": 90}, {"id": 9, "category_id": 3}, {"id": 77, "category_id": 3, "iscrowd": 1},
                {"id": 256, "category_id": 12},
            ]},
            {"image_id": 8, "file_name": "8.png", "segments_info": []},
        ],
    }  # fmt: skip
    write(tmp_path, {"i/4.jpg": photo((2, 3)), "p/4.png": png(numbers), "p.json": json.dumps(file)})
    found = opened(images=tmp_path / "i", annotations=tmp_path / "p.json")
    assert found.classes.category_ids == (3, 90)
    assert found[0].target.tolist() == [[1, 1, 0], [255, 255, 255]]
    assert found.findings.counts() == {"class out of range": 1, "unknown image": 1, "image without a map": 1}
    assert (found.findings.labels, found.findings.lost) == (5, {"class out of range": 1, "unknown image": 1})


def test_instances_are_painted_with_the_smaller_on_top_and_crowds_void(tmp_path: Path):
    def box(x: int, y: int, w: int, h: int, number: int, category: int, crowd: int = 0) -> dict[str, Any]:
        runs = np.zeros((6, 8), bool)
        runs[y : y + h, x : x + w] = True
        flat = runs.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
        counts = np.diff(np.concatenate([[0], edges, [48]])).tolist()
        return {"id": number, "image_id": 1, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                "iscrowd": crowd, "segmentation": {"size": [6, 8], "counts": counts}}  # fmt: skip

    file = {
        "images": [{"id": 1, "file_name": "1.png", "height": 6, "width": 8}],
        "categories": [{"id": 0, "name": "cell"}, {"id": 6, "name": "dot"}],
        "annotations": [box(1, 1, 1, 1, 1, 6), box(0, 0, 4, 6, 2, 0), box(3, 0, 5, 6, 3, 0, crowd=1)],
    }
    write(tmp_path, {"i/1.png": photo(), "a.json": json.dumps(file)})
    config = SegmentationConfig(background="rest")
    found = masks.open_examples(config, DataSource(images=str(tmp_path / "i"), annotations=str(tmp_path / "a.json")))
    assert found.classes == ("rest", "cell", "dot") and found.classes.category_ids == (7, 0, 6)
    target = found[0].target
    assert target[1, 1] == 2 and (target[:, 0] == 1).all() and (target[:, 4:] == 255).all() and target[0, 3] == 1
    source = DataSource(images=str(tmp_path / "i"), annotations=str(tmp_path / "a.json"))
    assert (masks.open_examples(config, source, classes=found.classes)[0].target == target).all()
    without = masks.open_examples(
        SegmentationConfig(), DataSource(images=str(tmp_path / "i"), annotations=str(tmp_path / "a.json"))
    )
    assert without.classes == ("cell", "dot") and without[0].target[1, 1] == 1


def test_more_classes_than_fit_in_a_byte_are_refused(tmp_path: Path):
    entry = {"id": 1, "file_name": "1.png", "height": 6, "width": 8}
    categories = [{"id": i, "name": f"c{i}"} for i in range(256)]
    square = {"id": 1, "image_id": 1, "category_id": 255, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}
    file = {"images": [entry], "categories": categories, "annotations": [square]}
    write(tmp_path, {"i/1.png": photo(), "a.json": json.dumps(file)})
    with pytest.raises(ValueError, match="256 classes; at most 255 labels"):
        opened(images=tmp_path / "i", annotations=tmp_path / "a.json")


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"segments_info": None}, "bad annotation"),
        ({"segments_info": [{"category_id": 3}]}, "bad annotation"),
        ({"segments_info": [{"id": 5, "category_id": [3]}]}, "bad annotation"),
        ({"image_id": [4]}, "unknown image"),
        ({"image_id": 4}, "repeated annotation"),
        ("row", "unknown image"),
    ],
)
def test_an_unreadable_panoptic_annotation_is_reported(tmp_path: Path, wrong: Any, kind: str):
    right = {"image_id": 4, "file_name": "4.png", "segments_info": [{"id": 5, "category_id": 3}]}
    file = {
        "images": [{"id": 4, "file_name": "4.jpg"}, {"id": 5, "file_name": "5.jpg"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "grass"}],
        "annotations": [right, wrong if isinstance(wrong, str) else right | {"image_id": 5} | wrong],
    }
    write(tmp_path, {f"i/{name}.jpg": photo() for name in (4, 5)} | {"p/4.png": photo(), "p.json": json.dumps(file)})
    found = opened(images=tmp_path / "i", masks=tmp_path / "p", annotations=tmp_path / "p.json")
    assert len(found) == 1 and found.findings.counts()[kind] == 1


def test_a_validation_set_of_other_classes_is_refused(tmp_path: Path):
    for name, known in (("t", ["a", "b"]), ("v", ["a", "c"])):
        write(tmp_path / name, {"i/1.jpg": photo(), "m/1.png": ids(0), "classes.json": json.dumps(known)})
    train = opened(images=tmp_path / "t/i", masks=tmp_path / "t/m")
    source = DataSource(images=str(tmp_path / "v/i"), masks=str(tmp_path / "v/m"))
    with pytest.raises(ValueError, match=r"\(2: 0 a, 1 c \.\.\.\) are not those of the training set \(2: 0 a, 1 b"):
        masks.open_examples(SegmentationConfig(), source, classes=train.classes)


def test_a_key_that_the_format_does_not_read_is_refused(tmp_path: Path):
    write(tmp_path, {"i/1.jpg": photo(), "m/1.png": ids(0), "a.json": json.dumps({"annotations": [{}]})})
    places = {"images": tmp_path / "i", "masks": tmp_path / "m"}
    with pytest.raises(ValueError, match="masks given, which format coco does not read; remove it"):
        opened(**places, annotations=tmp_path / "a.json")
    with pytest.raises(ValueError, match="format coco_panoptic needs `annotations`"):
        opened(**places, format="coco_panoptic")


def test_missing_masks_are_refused_with_the_remedy(tmp_path: Path):
    write(tmp_path, {"i/1.jpg": photo(), "m/2.png": ids(0), "classes.json": json.dumps(["a", "b"])})
    with pytest.raises(ValueError, match="no class maps found"):
        opened(images=tmp_path / "i")
    with pytest.raises(ValueError, match=r"1\.jpg .*2\.png .*must be equal except"):
        opened(images=tmp_path / "i", masks=tmp_path / "m")


def test_depth_maps_are_read_in_metres(tmp_path: Path):
    far = np.full((6, 8), 2560, np.uint16)
    far[0] = 0
    write(tmp_path, {"i/1.jpg": photo(), "d/1.png": png(far)})
    source = DataSource(images=str(tmp_path / "i"), depth=str(tmp_path / "d"))
    found = depth.open_examples(DepthConfig(units_per_metre=256), source)
    assert found[0].target.dtype == np.float32 and np.unique(found[0].target).tolist() == [0, 10]


def test_nuclei_of_the_samples_become_background_and_nucleus():
    folder = ROOT / "samples/nuclei"
    found = opened(SegmentationConfig(background="background"), images=folder / "val", annotations=folder / "val.json")
    assert len(found) == 50 and found.classes == ("background", "nucleus") and not len(found.findings)
    assert 0 < found[0].target.mean() < 1


@needs_data
def test_camvid_is_read_from_its_tar():
    tar = SHARED / "camvid11_480x360/train.tar"
    found = opened(images=tar / "images", masks=tar / "masks")
    assert len(found) == 366 and len(found.classes) == 11 and not len(found.findings)
    example = found[100]
    assert example.target.shape == (360, 480) and set(np.unique(example.target)) <= {*range(11), 255}
