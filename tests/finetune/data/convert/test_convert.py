"""`fovea data convert`: what a tool wrote is what the reader of training reads, and what is lost is counted."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataSource
from finetune.data import classification, multi_label
from finetune.data.coco import rle
from finetune.data.coco.examples import CocoExamples, open_examples
from finetune.data.convert.command import main
from finetune.data.maps import masks
from tests.finetune.data.convert.tool_files import (
    BOXES,
    SIZES,
    TOOLS,
    TRIANGLE,
    cvat,
    label_studio,
    labelme,
    png,
    put,
    voc,
    write_images,
    yolo,
)


def make_source(images: Path, **keys: Any) -> DataSource:
    return DataSource.model_validate({"images": str(images), **keys})


def read_back(out: Path, images: Path, *, with_masks: bool = False) -> CocoExamples:
    section = SimpleNamespace(with_masks=with_masks, empty_images="report")
    return open_examples(section, make_source(images, annotations=str(out)))


def objects(examples: CocoExamples) -> dict[str, list[tuple[str, list[float]]]]:
    found = {}
    for place, name in enumerate(examples.names):
        target = examples[place].target
        labels = [examples.classes[label - 1] for label in target.labels.tolist()]
        found[Path(name).name] = list(zip(labels, target.boxes.round(2).tolist(), strict=True))
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_the_objects_of_every_tool_are_read_back_as_annotated(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = TOOLS[tool](tmp_path / "set"), tmp_path / "out.json"
    assert main([str(source), str(out)]) == 0
    form = tool.partition(" ")[0]
    assert f"format: {form} (recognized)" in capsys.readouterr().out
    images = next(tmp_path.rglob("a.jpg")).parent
    examples = read_back(out, images)
    expected = {name: [(c, list(box)) for c, *box in boxes] for name, boxes in BOXES.items()}
    if tool != "voc":
        expected["b.png"].append(("cat", [6.0, 10.0, 24.0, 40.0]))
    assert objects(examples) == expected
    assert not examples.findings.found


def test_polygons_are_masks_of_the_same_pixels(tmp_path: Path):
    out = tmp_path / "out.json"
    assert main([str(cvat(tmp_path / "set")), str(out)]) == 0
    content = json.loads(out.read_text())
    (row,) = [row for row in content["annotations"] if "segmentation" in row]
    mask, _ = rle.from_segmentation([[v for p in TRIANGLE for v in p]], (50, 30))
    assert rle.from_segmentation(row["segmentation"], (50, 30))[0] == mask
    assert row["area"] == rle.areas([mask])[0]
    assert [category["name"] for category in content["categories"]] == ["cat", "dog", "bird"]  # as CVAT lists them


def cvat_shape(root: Path, shape: str) -> Path:
    write_images(root)
    return put(
        root / "annotations.xml",
        f'<annotations><image name="a.jpg" width="60" height="40">{shape}</image></annotations>',
    )


def test_masks_of_cvat_labelme_and_label_studio_are_the_same_pixels(tmp_path: Path):
    part = np.zeros((6, 8), np.uint8)
    part[1:5, 2:7] = 1
    whole = np.zeros((40, 60), np.uint8)
    whole[10:16, 20:28] = part
    runs, last = [0], 0
    for value in part.flatten().tolist():
        if value != last:
            runs, last = [*runs, 0], value
        runs[-1] += 1
    mask = f'<mask label="cat" rle="{", ".join(map(str, runs))}" left="20" top="10" width="8" height="6" z_order="0"/>'
    sources = [cvat_shape(tmp_path / "cvat", mask)]
    shape = {"label": "cat", "points": [[20, 10], [27, 15]], "shape_type": "mask", "mask": png_text(part * 255)}
    data = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [shape],
        "imagePath": "a.jpg",
        "imageHeight": 40,
        "imageWidth": 60,
    }
    write_images(tmp_path / "labelme")
    sources.append(put(tmp_path / "labelme/a.json", json.dumps(data)))
    value = {"format": "rle", "rle": packed(whole), "brushlabels": ["cat"]}
    result = {"type": "brushlabels", "original_width": 60, "original_height": 40, "value": value}
    task = [{"id": 1, "data": {"image": "s3://bucket/a.jpg"}, "annotations": [{"result": [result]}]}]
    write_images(tmp_path / "ls")
    sources.append(put(tmp_path / "ls/tasks.json", json.dumps(task)))
    for source in sources:
        out = source.with_name("out.json")
        assert main([str(source), str(out)]) == 0
        target = read_back(out, source.parent, with_masks=True)[0].target
        assert np.array_equal(rle.decode(target.masks, (40, 60))[0], whole), source
        assert target.boxes.tolist() == [[22, 11, 27, 15]]


def png_text(mask: np.ndarray) -> str:
    return base64.b64encode(png(mask)).decode()


def packed(mask: np.ndarray) -> list[int]:
    """As Label Studio's editor packs it: RGBA, in runs and, here for every second block, in single values."""
    values = np.repeat(mask.flatten() * 255, 4).tolist()
    bits = f"{len(values):032b}{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    place, literal = 0, False
    while place < len(values):
        if literal:
            block = values[place : place + 5]
            bits += "0" + f"{0:02b}" + f"{len(block) - 1:03b}" + "".join(f"{v:08b}" for v in block)
            place += len(block)
        else:
            end = place
            while end < len(values) and values[end] == values[place] and end - place < 65536:
                end += 1
            bits += "1" + f"{3:02b}" + f"{end - place - 1:016b}" + f"{values[place]:08b}"
            place = end
        literal = not literal
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_turned_boxes_and_ellipses_become_polygons_around_the_same_place(tmp_path: Path):
    shapes = '<box label="cat" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90"/>'
    shapes += '<ellipse label="cat" cx="30" cy="20" rx="20" ry="5" rotation="90"/>'
    out = tmp_path / "out.json"
    assert main([str(cvat_shape(tmp_path / "set", shapes)), str(out)]) == 0
    boxes = [row["bbox"] for row in json.loads(out.read_text())["annotations"]]
    assert boxes == [[25, 5, 10, 20], [25, 0, 10, 40]]


def test_difficult_objects_of_voc_are_ignored_and_its_pixels_count_from_one(tmp_path: Path):
    source = voc(tmp_path / "set")
    for path in source.iterdir():
        text = path.read_text().replace("<database>Unknown", "<database>The VOC2007 Database")
        path.write_text(text.replace("<difficult>0", "<difficult>1", 1) if path.stem == "a" else text)
    out = tmp_path / "out.json"
    assert main([str(source), str(out)]) == 0
    rows = json.loads(out.read_text())["annotations"]
    assert [row["iscrowd"] for row in rows] == [1, 0, 0]
    assert rows[2]["bbox"] == [2, 4, 13, 41]


def test_what_is_lost_is_named_and_too_much_of_it_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = yolo(tmp_path / "set"), tmp_path / "out.json"
    lines = [
        "7 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0 0",
        "0 0.5 0.5 0.1 0.1 0.9",
        "0 20 30 40 50",
        "0 nan 0.5 0.1 0.1",
        "0 0.5 0.5",
    ]
    put(root / "labels/a.txt", (root / "labels/a.txt").read_text() + "\n".join(lines))
    put(root / "labels/gone.txt", "0 0.5 0.5 0.2 0.2\n")
    Image.new("RGB", (9, 9)).save(root / "images/new.png")
    put(root / "labels/empty.txt", "")
    Image.new("RGB", (9, 9)).save(root / "images/empty.png")
    assert main([str(root), str(out)]) == 2
    said = capsys.readouterr()
    assert not out.exists()
    assert "7 of 11 objects or labels would be lost" in said.err
    for kind in (
        "unknown class",
        "bad line",
        "coordinates are no fractions",
        "bad coordinates",
        "missing image",
        "empty box",
    ):
        assert kind in said.err
    assert "labels/a.txt: line 3" in said.err
    assert main([str(root), str(out), "--max-lost", "0.7", "--background"]) == 0
    said = capsys.readouterr().out
    assert "1 images are annotated without an object: background (images/empty.png)" in said
    assert "1 images have no annotations: taken as background (images/new.png)" in said
    assert [row["file_name"] for row in json.loads(out.read_text())["images"]] == [
        "images/a.jpg", "images/b.png", "images/empty.png", "images/new.png"]  # fmt: skip


def test_a_file_that_cannot_be_read_counts_as_a_lost_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = yolo(tmp_path / "set")
    objects = sum(len(path.read_text().splitlines()) for path in (root / "labels").glob("*.txt"))
    (root / "labels" / "c.txt").write_bytes(b"0 0.5 0.5 0.1 0.1 \xff\n")
    assert main([str(root), str(tmp_path / "out.json"), "--max-lost", "0"]) == 2
    assert f"1 of {objects + 1} objects or labels would be lost" in capsys.readouterr().err


def test_an_image_that_lost_all_its_objects_is_no_background(tmp_path: Path):
    root, out = yolo(tmp_path / "set"), tmp_path / "out.json"
    put(root / "labels/a.txt", "7 0.5 0.5 0.2 0.2\n")
    assert main([str(root), str(out), "--max-lost", "1"]) == 0
    assert [row["file_name"] for row in json.loads(out.read_text())["images"]] == ["images/b.png"]


def test_an_existing_file_is_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = labelme(tmp_path / "set"), put(tmp_path / "out.json", "mine")
    assert main([str(source), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([str(source), str(out), "--overwrite"]) == 0
    assert len(read_back(out, source)) == 2


def test_labels_of_images_become_a_csv_that_is_read_back(tmp_path: Path):
    source, out = cvat(tmp_path / "set"), tmp_path / "lists/labels.csv"
    out.parent.mkdir()
    assert main([str(source), str(out)]) == 0
    assert out.read_text() == "filename,label\n../set/images/a.jpg,outdoor\n../set/images/b.png,indoor\n"
    examples = classification.open_examples(None, make_source(out))
    assert [examples.classes[examples[place].target] for place in range(2)] == ["outdoor", "indoor"]


def test_several_labels_of_images_become_a_list_for_multi_label(tmp_path: Path):
    source, out = label_studio(tmp_path / "set"), tmp_path / "labels.csv"
    assert main([str(source), str(out)]) == 0
    assert out.read_text() == "filename,labels\nset/images/a.jpg,outdoor\nset/images/b.png,indoor|pet\n"
    found = multi_label.open_examples(None, make_source(out))
    assert found.classes == ("indoor", "outdoor", "pet") and found.targets.astype(int).tolist() == [
        [0, 1, 0],
        [1, 0, 1],
    ]


def test_fractions_belong_to_the_upright_photo_and_stated_sides_decide(tmp_path: Path):
    root = yolo(tmp_path / "set")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((60, 40, 3), np.uint8)
    stored[30:54, 4:24] = 255  # turned by 90 degrees clockwise it is the box 16..36 x 30..54
    Image.fromarray(stored).save(root / "images/a.jpg", exif=exif, quality=100)
    out = tmp_path / "out.json"
    assert main([str(root), str(out)]) == 0
    (row, _) = json.loads(out.read_text())["images"]
    assert (row["width"], row["height"]) == (60, 40)
    examples = read_back(out, root)
    assert examples[0].image.shape == (40, 60, 3)
    source = voc(tmp_path / "voc")
    path = source / "a.xml"
    path.write_text(path.read_text().replace("<width>60", "<width>61"))
    assert main([str(source), str(tmp_path / "voc.json")]) == 2


def test_a_validation_set_gets_the_ids_of_the_training_set(tmp_path: Path):
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    assert main([str(cvat(tmp_path / "a")), str(train)]) == 0
    source = voc(tmp_path / "b")
    for path in source.iterdir():
        path.write_text(path.read_text().replace(">cat<", ">bird<"))
    assert main([str(source), str(val), "--classes", str(train)]) == 0
    ids = {c["name"]: c["id"] for c in json.loads(val.read_text())["categories"]}
    assert ids == {"cat": 1, "dog": 2, "bird": 3}


def test_splits_are_converted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = tmp_path / "set", tmp_path / "out.json"
    for split in ("train", "val"):
        part = yolo(root / split)
        (part / "data.yaml").unlink()
    put(root / "data.yaml", "train: ../train/images\nval: ../val/images\nnames:\n  0: dog\n  1: cat\n")
    assert main([str(root), str(out)]) == 2
    assert "--split" in capsys.readouterr().err
    assert main([str(root / "data.yaml"), str(out), "--split", "val"]) == 0
    assert [row["file_name"] for row in json.loads(out.read_text())["images"]] == [
        "val/images/a.jpg",
        "val/images/b.png",
    ]
    listed = put(tmp_path / "part.txt", "b\n")
    assert main([str(voc(tmp_path / "voc")), str(tmp_path / "voc.json"), "--split", str(listed)]) == 0
    assert len(json.loads((tmp_path / "voc.json").read_text())["images"]) == 1


HOSTILE: dict[str, tuple[str, str, str]] = {
    "entities": (
        "a.xml",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        "DOCTYPE",
    ),
    "laughs": ("a.xml", '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>', "DOCTYPE"),
    "depth": ("a.xml", "<annotation>" * 5000, "nested too deeply"),
    "no xml": ("a.xml", "<annotation><object>", "not XML"),
    "deep json": ("a.json", "[" * 200_000, "nested too deeply"),
    "no utf-8": ("a.json", "\udcff", "not UTF-8"),
    "yaml": ("data.yaml", "names: !!python/object/apply:os.system ['touch executed']", "not YAML"),
    "another json": ("a.json", '{"shapes": 1}', "labelme file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_a_reason(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, text, said = HOSTILE[case]
    root = write_images(tmp_path / "set")
    put(root / name, text.encode("utf-8", "surrogateescape"))
    form = {"a.xml": "voc", "a.json": "labelme"}.get(name, "yolo")
    assert main([str(root), str(tmp_path / "out.json"), "--format", form]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


BAD: list[Any] = [
    '<mask label="cat" rle="5,1000000000000" left="0" top="0" width="9" height="9"/>',
    '<mask label="cat" rle="1" left="0" top="0" width="1000000" height="1000000"/>',
    '<mask label="cat" rle="-1,82" left="0" top="0" width="9" height="9"/>',
    '<mask label="cat" rle="81" left="1e300" top="0" width="9" height="9"/>',
    '<polygon label="cat" points="1,2;3"/>',
    '<polygon label="cat" points="1,2;inf,4;5,6"/>',
    '<box label="cat" xtl="1" ytl="2" xbr="x"/>',
    '<box xtl="1" ytl="2" xbr="3" ybr="9"/>',
    '<polyline label="cat" points="1,2;3,4"/>',
]


def test_every_bad_object_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = '<box label="cat" xtl="1" ytl="2" xbr="30" ybr="20"/>'
    out = tmp_path / "out.json"
    assert main([str(cvat_shape(tmp_path / "set", good + "".join(BAD))), str(out), "--max-lost", "1"]) == 0
    assert [row["bbox"] for row in json.loads(out.read_text())["annotations"]] == [[1, 2, 29, 18]]
    assert str(len(BAD)) == str(
        sum(int(line.split(" lost")[0].split()[-1]) for line in capsys.readouterr().err.splitlines() if " lost" in line)
    )


def test_whoever_meets_such_a_file_names_the_command(tmp_path: Path):
    for tool, make in TOOLS.items():
        source = make(tmp_path / tool)
        with pytest.raises(ValueError, match="fovea data convert"):
            read_back(source, tmp_path / tool)
        if tool != "yolo":
            section = SimpleNamespace(void_ids=[], reduce_zero_label=False, background=None)
            with pytest.raises(ValueError, match="fovea data convert"):
                masks.open_examples(section, make_source(source.parent, annotations=str(source)))
    for tool in ("voc", "yolo", "labelme"):
        images = next((tmp_path / tool).rglob("a.jpg")).parent
        beside = voc(images) if tool == "voc" else images
        with pytest.raises(ValueError, match="fovea data convert"):
            classification.open_examples(None, make_source(tmp_path / tool if tool != "labelme" else beside))
    with pytest.raises(ValueError, match="fovea data convert"):
        classification.open_examples(None, make_source(tmp_path / "via csv" / "via_region_data.csv"))


def test_names_that_act_on_a_terminal_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = yolo(tmp_path / "set"), tmp_path / "out.json"
    put(root / "data.yaml", 'names: ["\\e[31mdog", "cat"]\n')
    assert main([str(root), str(out)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert SIZES.keys() == {Path(row["file_name"]).name for row in json.loads(out.read_text())["images"]}
