"""PASCAL VOC: an .xml per image with boxes. Everingham et al. 2010; labelImg and most tools write it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element

from finetune.data.convert.annotated import (
    Annotated,
    Annotations,
    Shape,
    Unusable,
    add_objects,
    box,
    name_of,
    number,
    sides,
)
from finetune.data.convert.files import Source, read_xml, readable
from finetune.data.examples import DataProblems


def read(source: Source, findings: DataProblems) -> Annotations:
    """Boxes; `difficult` ones are ignored, as in VOC's evaluation.

    The official data counts pixels from 1 and includes the last one; other tools write the corners themselves.
    """
    images, official, difficult = [], 0, 0
    for name, root in readable(source, source.of(".xml"), _root, findings):
        first = 1 if (root.findtext("source/database") or "").strip().startswith("The VOC") else 0
        official += first
        stem = str(PurePosixPath(name).with_suffix(".jpg"))
        named = (root.findtext("filename") or "").strip()
        image = Annotated(name, (named, stem) if named else (stem,))
        image.size = sides(root.findtext("size/height"), root.findtext("size/width"))
        objects = enumerate(root.findall("object"), 1)
        add_objects(image, ((f"object {n}", found) for n, found in objects), lambda o, f=first: _object(o, f))
        difficult += sum(shape.ignored for shape in image.shapes)
        images.append(image)
    notes = []
    if official:
        notes.append(f"{official} files of the VOC challenge count pixels from 1: their boxes begin one pixel earlier")
    if difficult:
        notes.append(f"{difficult} difficult objects are written as ignored regions (iscrowd)")
    return Annotations(images, notes=notes)


def _root(path: Path) -> Element:
    root = read_xml(path)
    if root.tag != "annotation":
        raise ValueError(f"{path}: its root is <{root.tag[:40]}>, expected <annotation>")
    return root


def _object(found: Element, first: int) -> Shape:
    label = name_of(found.findtext("name"))
    place = found.find("bndbox")
    if place is None:
        raise Unusable("unsupported shape", "no <bndbox>")
    x1, y1, x2, y2 = (number(place.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    ignored = (found.findtext("difficult") or "").strip() == "1"
    return box(label, x1 - first, y1 - first, x2, y2, ignored=ignored)
