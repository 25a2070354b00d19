"""The same two images and their objects, as each annotation tool writes them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {"a.jpg": (60, 40), "b.png": (30, 50)}  # width, height
# name -> (class, x1, y1, x2, y2); b also has a triangle
BOXES = {
    "a.jpg": [("cat", 6.0, 4.0, 30.0, 24.0), ("dog", 12.0, 10.0, 54.0, 36.0)],
    "b.png": [("dog", 3.0, 5.0, 15.0, 45.0)],
}
TRIANGLE = [(6.0, 10.0), (24.0, 10.0), (24.0, 40.0)]  # a cat in b


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        Image.new("RGB", size, (200, 100, 50)).save(folder / name)
    return folder


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def yolo(root: Path) -> Path:
    """Ultralytics: data.yaml, images/, labels/; a triangle as a segment."""
    write_images(root / "images")
    numbers = {"dog": 0, "cat": 1}
    for name, (width, height) in SIZES.items():
        scale = np.array([width, height, width, height])
        lines = [
            " ".join(
                [
                    str(numbers[c]),
                    *(f"{v:.6f}" for v in np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / scale),
                ]
            )
            for c, x1, y1, x2, y2 in BOXES[name]
        ]
        if name == "b.png":
            lines.append("1 " + " ".join(f"{x / width:.6f} {y / height:.6f}" for x, y in TRIANGLE))
        put(root / "labels" / f"{Path(name).stem}.txt", "\n".join(lines) + "\n")
    put(root / "data.yaml", "path: ../datasets/pets\ntrain: images\nval: images\nnc: 2\nnames: ['dog', 'cat']\n")
    return root


def voc(root: Path) -> Path:
    """labelImg; boxes only."""
    write_images(root / "JPEGImages")
    for name, (width, height) in SIZES.items():
        objects = "".join(
            f"""
	<object>
		<name>{c}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>0</difficult>
		<bndbox>
			<xmin>{x1:.0f}</xmin>
			<ymin>{y1:.0f}</ymin>
			<xmax>{x2:.0f}</xmax>
			<ymax>{y2:.0f}</ymax>
		</bndbox>
	</object>"""
            for c, x1, y1, x2, y2 in BOXES[name]
        )
        text = f"""<annotation>
	<folder>JPEGImages</folder>
	<filename>{name}</filename>
	<path>C:\\Users\\me\\pets\\{name}</path>
	<source>
		<database>Unknown</database>
	</source>
	<size>
		<width>{width}</width>
		<height>{height}</height>
		<depth>3</depth>
	</size>
	<segmented>0</segmented>{objects}
</annotation>
"""
        put(root / "Annotations" / f"{Path(name).stem}.xml", text)
    return root / "Annotations"


def labelme(root: Path) -> Path:
    write_images(root)
    for name, (width, height) in SIZES.items():
        shapes: list[dict[str, Any]] = [
            {"label": c, "points": [[x2, y2], [x1, y1]], "group_id": None, "description": "", "shape_type": "rectangle",
             "flags": {}, "mask": None}
            for c, x1, y1, x2, y2 in BOXES[name]
        ]  # fmt: skip
        if name == "b.png":
            shapes.append({"label": "cat", "points": [list(p) for p in TRIANGLE], "group_id": None,
                           "shape_type": "polygon", "flags": {}})  # fmt: skip
        data = {"version": "5.5.0", "flags": {"outdoor": name == "a.jpg"}, "shapes": shapes, "imagePath": name,
                "imageData": base64.b64encode(b"jpg").decode(), "imageHeight": height, "imageWidth": width}  # fmt: skip
        put(root / f"{Path(name).stem}.json", json.dumps(data, indent=2))
    return root


def _via_entries() -> dict[str, Any]:
    entries = {}
    for name in SIZES:
        regions: list[dict[str, Any]] = [
            {"shape_attributes": {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1},
             "region_attributes": {"class": c, "remark": "far"}}
            for c, x1, y1, x2, y2 in BOXES[name]
        ]  # fmt: skip
        if name == "b.png":
            xs, ys = zip(*TRIANGLE, strict=True)
            regions.append({"shape_attributes": {"name": "polygon", "all_points_x": xs, "all_points_y": ys},
                            "region_attributes": {"class": {"cat": True}}})  # fmt: skip
        entries[f"{name}1234"] = {
            "filename": name,
            "size": 1234,
            "regions": regions,
            "file_attributes": {"caption": ""},
        }
    return entries


def via(root: Path) -> Path:
    write_images(root)
    project = {
        "_via_settings": {"project": {"name": "pets"}},
        "_via_img_metadata": _via_entries(),
        "_via_attributes": {},
    }
    return put(root / "via_project.json", json.dumps(project))


def via_export(root: Path) -> Path:
    write_images(root)
    return put(root / "via_region_data.json", json.dumps(_via_entries()))


def via_csv(root: Path) -> Path:
    write_images(root)

    def quoted(value: Any) -> str:
        return '"' + json.dumps(value).replace('"', '""') + '"'

    rows = ["filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"]
    for entry in _via_entries().values():
        for place, region in enumerate(entry["regions"]):
            of = f"{quoted(region['shape_attributes'])},{quoted(region['region_attributes'])}"
            rows.append(f'{entry["filename"]},1234,"{{}}",{len(entry["regions"])},{place},{of}')
    return put(root / "via_region_data.csv", "\n".join(rows))


def cvat(root: Path) -> Path:
    write_images(root / "images")
    images = ""
    for place, (name, (width, height)) in enumerate(SIZES.items()):
        shapes = "".join(
            f"""
    <box label="{c}" source="manual" occluded="0" xtl="{x1:.2f}" ytl="{y1:.2f}" xbr="{x2:.2f}" ybr="{y2:.2f}">
      <attribute name="age">3</attribute>
    </box>"""
            for c, x1, y1, x2, y2 in BOXES[name]
        )
        if name == "b.png":
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in TRIANGLE)
            shapes += f"""
    <polygon label="cat" source="manual" occluded="0" points="{points}" z_order="0">
    </polygon>"""
        images += f"""
  <image id="{place}" name="{name}" width="{width}" height="{height}">{shapes}
    <tag label="{"outdoor" if name == "a.jpg" else "indoor"}" source="manual">
    </tag>
  </image>"""
    labels = "".join(
        f"<label><name>{c}</name><color>#fa3253</color><type>any</type></label>" for c in ("cat", "dog", "bird")
    )
    text = f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>7</id>
      <name>pets</name>
      <labels>{labels}</labels>
    </task>
  </meta>{images}
</annotations>
"""
    return put(root / "annotations.xml", text)


def label_studio(root: Path) -> Path:
    write_images(root / "images")
    tasks = []
    for place, (name, (width, height)) in enumerate(SIZES.items()):
        size = {"original_width": width, "original_height": height, "image_rotation": 0}
        results: list[dict[str, Any]] = [
            {**size, "id": f"r{n}", "from_name": "label", "to_name": "image", "type": "rectanglelabels",
             "value": {"x": 100 * x1 / width, "y": 100 * y1 / height, "width": 100 * (x2 - x1) / width,
                       "height": 100 * (y2 - y1) / height, "rotation": 0, "rectanglelabels": [c]}}
            for n, (c, x1, y1, x2, y2) in enumerate(BOXES[name])
        ]  # fmt: skip
        if name == "b.png":
            points = [[100 * x / width, 100 * y / height] for x, y in TRIANGLE]
            results.append({**size, "id": "p", "from_name": "poly", "to_name": "image", "type": "polygonlabels",
                            "value": {"points": points, "closed": True, "polygonlabels": ["cat"]}})  # fmt: skip
        chosen = ["indoor", "pet"] if name == "b.png" else ["outdoor"]
        results.append(
            {"id": "c", "from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": chosen}}
        )
        annotation = {"id": place, "completed_by": 1, "result": results, "was_cancelled": False, "ground_truth": False}
        data = {"image": f"/data/upload/3/1a2b3c4d-{name}"}
        tasks.append({"id": place + 1, "annotations": [annotation], "file_upload": f"1a2b3c4d-{name}", "data": data})
    return put(root / "project-1.json", json.dumps(tasks))


TOOLS: dict[str, Callable[[Path], Path]] = {
    "yolo": yolo, "voc": voc, "labelme": labelme, "via": via, "via export": via_export, "via csv": via_csv,
    "cvat": cvat, "label-studio": label_studio,
}  # fmt: skip


def png(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()
