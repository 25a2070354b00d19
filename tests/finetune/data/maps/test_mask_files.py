"""Class maps of any kind of file, under any pattern of names, of ids or of colours."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data.examples import BadExample
from finetune.data.maps.colours import read_colours
from finetune.tasks.configs.segmentation import SegmentationConfig
from tests.finetune.data.maps.written import ids, opened, photo, png, write


def encoded(values: np.ndarray, image_format: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, image_format)
    return out.getvalue()


PATTERNS = {  # data set: image, mask, its suffix, mask_names, image_names
    "Carvana": ("train/{}.jpg", "masks/{}_mask.gif", "{name}_mask.gif", None),
    "CamVid": ("train/{}.png", "labels/{}_L.png", "{name}_L.png", None),
    "ISIC": ("train/{}.jpg", "masks/{}_segmentation.png", "{name}_segmentation", None),
    "Cityscapes": ("train/a/{}_leftImg8bit.png", "gt/a/{}_gtFine_labelIds.png", "{name}_gtFine_labelIds",
                   "{name}_leftImg8bit.png"),
    "both numbered": ("train/img_{}.jpg", "masks/mask_{}.tif", "mask_{name}.tif", "img_{name}.jpg"),
    "one folder": ("all/{}.png", "all/{}_mask.png", "{name}_mask.png", None),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
def test_masks_are_found_by_the_pattern_of_their_names(tmp_path: Path, case: str):
    image, mask, mask_names, image_names = PATTERNS[case]
    kind = {".gif": "GIF", ".tif": "TIFF"}.get(Path(mask).suffix, "PNG")
    values = np.resize(np.array([0, 1, 1], np.uint8), (6, 8))
    files = {image.format(n): photo() for n in "xyz"} | {mask.format(n): encoded(values, kind) for n in "xyz"}
    write(tmp_path, {**files, "classes.json": json.dumps(["a", "b"])})
    where = {"images": tmp_path / image.split("/")[0], "masks": tmp_path / mask.split("/")[0]}
    names = {"mask_names": mask_names} | ({"image_names": image_names} if image_names else {})
    found = opened(**where, **names)
    assert len(found) == 3 and not found.findings.found
    assert (found[1].target == values).all()
    if case in ("Carvana", "CamVid"):
        with pytest.raises(ValueError, match=re.escape('mask_names="' + mask_names)):
            opened(**where)


def test_patterns_that_are_none_are_refused():
    for pattern in ("_mask.gif", "{name}/{name}.png", "a/{name}.png"):
        with pytest.raises(ValueError, match="mask_names"):
            DataSource(images="i", masks="m", mask_names=pattern)


COLOURS = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\nsky blue:0,128,250:a,b:run\n",
    "label_colors.txt": "0 0 0\tbackground\n128 0 0\tcat\n0 128 250\tsky blue\n",
    "class_dict.csv": "name,r,g,b\nbackground, 0, 0, 0\ncat, 128, 0, 0\nsky blue, 0, 128, 250\n",
}


@pytest.mark.parametrize("name", COLOURS)
def test_masks_of_colours_are_read_by_the_list_of_their_classes(tmp_path: Path, name: str):
    colours = np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 250]]], np.uint8)
    indexed = Image.fromarray(np.array([[0, 2, 1]], np.uint8))
    indexed.putpalette([0, 0, 0, 0, 128, 250, 128, 0, 0])
    palette = io.BytesIO()
    indexed.save(palette, "PNG")
    files = {"JPEGImages/a.jpg": photo((1, 3)), "JPEGImages/b.jpg": photo((1, 3)), name: COLOURS[name],
             "SegmentationClass/a.png": png(colours), "SegmentationClass/b.png": palette.getvalue()}  # fmt: skip
    write(tmp_path, files)
    source: dict[str, Any] = {"images": tmp_path / "JPEGImages", "masks": tmp_path / "SegmentationClass"}
    if name != "labelmap.txt":  # which is found, where CVAT puts it
        source["classes"] = tmp_path / name
    found = opened(**source)
    assert found.classes == ("background", "cat", "sky blue")
    assert found[0].target.tolist() == [[0, 1, 2]] == found[1].target.tolist()
    void = opened(SegmentationConfig.model_validate({"void_ids": [0]}), **source)
    assert void.classes == ("cat", "sky blue") and void[0].target.tolist() == [[255, 0, 1]]
    assert (
        pickle.loads(pickle.dumps(void))[0].target.tolist() == [[255, 0, 1]] and void.fingerprint != found.fingerprint
    )
    write(tmp_path, {"SegmentationClass/a.png": png(colours + np.uint8(1))})
    with pytest.raises(BadExample, match=r"colours that are no class: \(1, 1, 1\) \(1 pixels\)"):
        _ = opened(**source)[0]


@pytest.mark.parametrize("text", ["", "cat", "cat:1,2:", "a:1,2,3::\nb:1,2,3::", "a:1,2,3::\na:1,2,4::", "a:1,2,256::"])
def test_lists_of_colours_that_are_none_are_refused(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match=r"labelmap\.txt"):
        read_colours(write(tmp_path, {"labelmap.txt": text}) / "labelmap.txt")


@pytest.mark.parametrize(
    ("suffix", "reason"), [("jpg", "JPEG, which changes ids"), ("webp", "no map of the kind .png")]
)
def test_maps_of_kinds_that_are_not_read_are_named(tmp_path: Path, suffix: str, reason: str):
    files = {f"i/{n}.jpg": photo() for n in range(3)} | {f"m/{n}.{suffix}": ids(0, 1) for n in range(3)}
    write(tmp_path, {**files, "classes.json": json.dumps(["a", "b"])})
    with pytest.raises(ValueError, match=rf"m holds 3 \.{suffix}: {reason}; save them as PNG"):
        opened(images=tmp_path / "i", masks=tmp_path / "m")
    write(tmp_path, {"m/0.png": ids(0, 1)})
    found = opened(images=tmp_path / "i", masks=tmp_path / "m").findings
    assert f"no map named 1 in {tmp_path}/m; 1.{suffix} is {reason}; left out" in found.lines()[0]
    assert (found.labels, found.lost) == (3, {"image without a map": 2})
