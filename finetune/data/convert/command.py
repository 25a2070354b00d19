"""`fovea data convert`: annotations of other tools to COCO json, or to a csv of labels, with a report."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from finetune.data.class_names import read_classes
from finetune.data.coco import coco_json
from finetune.data.convert.files import Source, read_text
from finetune.data.convert.formats import FORMATS, format_of, recognize
from finetune.data.convert.pictures import Found, Picture, find_pictures, folder_of_images, upright_size
from finetune.data.convert.write import coco, coco_bytes, label_list, numbered_classes
from finetune.data.examples import BadExample, DataProblems
from finetune.data.files import Files
from pretrain.core.files import write_bytes
from pretrain.core.machine.terminal import safe_output
from pretrain.core.text import shown
from pretrain.data.write.images import UnreadableImageError

_NAMED = 3  # examples of each kind of problem


@safe_output()
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit status 0, or 2 where nothing is written."""
    arguments = _parser().parse_args(argv)
    try:
        _convert(arguments)
    except (ValueError, OSError) as error:
        print(f"fovea data convert: {shown(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fovea data convert",
        description="Annotations of other tools to COCO json (boxes, polygons, masks) or to a csv (labels of images).",
    )
    add = parser.add_argument
    add("source", type=Path, help="annotation file, or the folder of one file per image")
    add("out", type=Path, help="OUT.json: COCO; OUT.csv: labels of complete images")
    add("--format", choices=("auto", *FORMATS), default="auto", help="default: recognized by content")
    add("--images", metavar="DIR", help="folder, tar or shards of the images (default: beside the annotations)")
    add("--split", metavar="NAME", help="convert the images of train, val, ... only; or those listed in NAME.txt")
    add("--classes", type=Path, metavar="FILE", help="classes and ids to use: a COCO json, classes.json or .txt")
    add("--attribute", metavar="NAME", help="VIA: the attribute that holds the class")
    add("--background", action="store_true", help="images that no annotation names have no objects (default: left out)")
    add(
        "--max-lost",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of objects that may be lost (default: 0.05)",
    )
    add("--overwrite", action="store_true", help="replace OUT")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    source, out = Source(arguments.source, arguments.attribute), arguments.out
    kind = out.suffix.lower()
    if kind not in (".json", ".csv"):
        raise ValueError(f"{out}: expected OUT.json for objects, or OUT.csv for labels of images")
    if not source.path.exists():
        raise ValueError(f"{source.path}: no such file or folder")
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out}: exists; --overwrite replaces it")
    if not 0 <= arguments.max_lost <= 1:
        raise ValueError(f"--max-lost {arguments.max_lost:g}: expected 0 to 1")
    findings = DataProblems()
    form = arguments.format if arguments.format != "auto" else recognize(source)
    annotations = FORMATS[form](source, findings)
    where = arguments.images or folder_of_images(source)
    files = Files.open(where)
    found = find_pictures(annotations, files, findings, source=source, split=arguments.split, of_images=kind == ".csv")
    print(f"format: {form}{'' if arguments.format != 'auto' else ' (recognized)'}; images: {where}")
    for note in [*annotations.notes, *_notes(found, arguments, kind)]:
        print(shown(note))
    if kind == ".json":
        background = _background(found, files, findings) if arguments.background else []
        given = _classes(arguments.classes) if arguments.classes else annotations.classes
        classes = numbered_classes(found.pictures, given)
        description = f"converted from {form} by fovea data convert"
        content, counts = coco(found.pictures, classes, findings, background=background, description=description)
        data, images = coco_bytes(content), len(content["images"])
        what = f"{images} images, {counts.total()} objects"
        what += f", {sum(row['iscrowd'] for row in content['annotations'])} ignored regions"
    else:
        if not Path(where).is_dir():
            raise ValueError(f"{where}: a csv names files of a folder; give the folder of images")
        given = _classes(arguments.classes) if arguments.classes else None
        data, counts = label_list(found.pictures, given, findings, images=Path(where).resolve(), out=out.resolve())
        what = f"{len(data.splitlines()) - 1} images, {counts.total()} labels"
    _report(counts, findings)
    _check_lost(findings, arguments.max_lost)
    if not counts:
        missing = "object" if kind == ".json" else "label of a complete image (tags, choices, flags)"
        raise ValueError(f"{source.path}: no {missing} that can be used: nothing is written")
    write_bytes(out, data)
    print(f"wrote {out}: {what} of {len(counts)} classes")


def _classes(path: Path) -> Mapping[int, str]:
    """Names of classes by number."""
    if path.suffix.lower() == ".txt":
        return {place: line.strip() for place, line in enumerate(read_text(path).splitlines()) if line.strip()}
    if format_of(path) == "coco":
        known = coco_json.read_classes(path, coco_json.load(path)["categories"])
    else:
        known = read_classes(path)
    return dict(zip(known.category_ids, known, strict=True))


def _notes(found: Found, arguments: argparse.Namespace, kind: str) -> list[str]:
    """What a user should know of the images."""
    notes = []
    if found.other_splits:
        notes.append(f"{found.other_splits} images are not of --split {arguments.split}")
    if found.turned:
        notes.append(
            f"{found.turned} photos have an EXIF orientation: where the annotations do not state their size, they are "
            "taken as those of the upright photo"
        )
    empty = [picture.name for picture in found.pictures if not _is_annotated(picture)]
    if empty and kind == ".json":
        notes.append(f"{len(empty)} images are annotated without an object: background ({_some(empty)})")
    if found.unannotated:
        what = "taken as background" if arguments.background else "left out; --background takes them as background"
        what = "left out" if kind == ".csv" else what
        notes.append(f"{len(found.unannotated)} images have no annotations: {what} ({_some(found.unannotated)})")
    other = sum(len(picture.annotated.labels if kind == ".json" else picture.shapes) for picture in found.pictures)
    if other:
        what = "labels of complete images" if kind == ".json" else "objects"
        notes.append(f"{other} {what} are not written; they need OUT{'.csv' if kind == '.json' else '.json'}")
    return notes


def _is_annotated(picture: Picture) -> bool:
    return bool(picture.shapes or picture.annotated.problems)


def _background(found: Found, files: Files, findings: DataProblems) -> list[tuple[str, tuple[int, int]]]:
    """Name and size of the images that no annotation names."""
    sizes = []
    for name in found.unannotated:
        try:
            sizes.append((name, upright_size(files, name)))
        except (BadExample, UnreadableImageError) as error:
            findings.add("unreadable image", files.where, name, str(error))
    return sizes


def _report(counts: Counter[str], findings: DataProblems) -> None:
    """Objects by class; problems by kind, the first ones by name."""
    for name, count in counts.most_common():
        print(f"  {count:8d} {shown(name)}")
    for kind, count in findings.counts().items():
        lost = findings.lost[kind]
        print(f"{count} x {kind}{f': {lost} lost' if lost else ''}", file=sys.stderr)
        first = [problem for problem in findings.found if problem.kind == kind][:_NAMED]
        for line in [*map(str, first), *([f"... and {count - _NAMED} more"] if count > _NAMED else [])]:
            print(f"    {line}", file=sys.stderr)


def _check_lost(findings: DataProblems, limit: float) -> None:
    lost = findings.lost.total()
    if lost > limit * findings.labels:
        raise ValueError(
            f"{lost} of {findings.labels} objects or labels would be lost, more than --max-lost {limit:g}: nothing is "
            "written. Correct what is named, or raise --max-lost"
        )


def _some(names: list[str]) -> str:
    return shown(", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else ""))
