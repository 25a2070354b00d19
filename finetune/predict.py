"""`fovea predict RELEASE_OR_RUN IMAGES... --out DIR`: predictions of a fine-tuned task for images.

    predictions.json   detection: rows of COCO's results format; other tasks: an object per image
    images.json        detection: the images and categories of those rows, as a COCO file
    pictures/          every image next to its prediction, PNG
    maps/              segmentation: a PNG of class numbers, coloured by its palette; depth: a 16-bit PNG of millimetres

An image that cannot be decoded is reported and skipped.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.coco.ids import integer
from finetune.data.examples import Example
from finetune.data.reading import PHOTOS, Reading
from finetune.locate import check_task_folder
from finetune.predictions import Classes, ClassMap, DepthMap, Detected, Prediction
from finetune.tiling.tiles import Tiling
from pretrain.core.files import kind_of_special, read_bytes, read_text, write_json
from pretrain.core.images import MAX_PIXELS
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.text import shown
from pretrain.data.channels import difference, with_names_beside
from pretrain.data.depths import measure_values
from pretrain.data.formats.stored import DecodeError
from pretrain.data.names import Names
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.engine.checkpoint.commit import CheckpointError

if TYPE_CHECKING:
    import torch

    from finetune.tasks.base import Task

MILLIMETRES = 1000.0
_MAX_DEPTH = 65.535  # metres, of a 16-bit PNG of millimetres


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Predict. Exit status 2: no images or no task; 1: no image could be decoded, or predictions could not be
    written."""
    parser = argparse.ArgumentParser(
        prog="fovea predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", metavar="RELEASE_OR_RUN", help="folder of a fine-tuned release, or of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders (read recursively), patterns")
    parser.add_argument("--out", required=True, help="folder, created if it does not exist")
    parser.add_argument("--ids", metavar="COCO_JSON", help="image ids of predictions.json, by file name")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help=f"larger images are skipped (default {MAX_PIXELS})"
    )
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="predict large images in squares of this side, and merge the results"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help="that neighbouring tiles share: the size of an object (default: a quarter of --tile)",
    )
    parser.add_argument(
        "--channels",
        metavar="NAMES",
        help="of the images, in order, separated by commas; default: channels.json in their folder; other than in "
        "training are refused",
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="stored values that are black and white, for images of more than 8 bits; default: that of the training",
    )
    chosen = parser.parse_args(arguments)
    if chosen.range is not None and not chosen.range[0] < chosen.range[1]:
        parser.error(f"--range {chosen.range[0]:g} {chosen.range[1]:g}: expected LOW < HIGH")
    if chosen.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {chosen.batch_size}")
    if chosen.overlap is not None and chosen.tile is None:
        parser.error("--overlap is that of tiles: give --tile")
    try:
        tiling = None
        if chosen.tile is not None:
            tiling = Tiling(chosen.tile, chosen.tile // 4 if chosen.overlap is None else chosen.overlap)
        files = find_images(chosen.images)
        ids = None if chosen.ids is None else read_ids(Path(chosen.ids))
        check_task_folder(Path(chosen.task))
        from finetune.release import open_task
        from pretrain.core.machine.device import find_device

        task, record = open_task(chosen.task)
        if tiling is not None and task.config.name in ("classification", "multi_label"):
            raise ValueError("--tile: a classifier has one answer for an image; predict it without tiles")
        value_range = recorded_range(record) if chosen.range is None else (chosen.range[0], chosen.range[1])
        how = Reading(task.bare_backbone.in_chans, recorded_orientation(record), value_range, chosen.max_pixels)
        _check_channels(chosen.images, chosen.channels, record.get("channels"))
        _check_depth(files, how)
        out, where = Path(chosen.out), find_device(chosen.device)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"fovea predict: {error}", file=sys.stderr)
        return 2
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"fovea predict: --out {chosen.out}: not a folder to write to: {error}", file=sys.stderr)
        return 2
    try:
        failed = predict(
            task,
            files,
            out,
            record=record,
            ids=ids,
            batch_size=chosen.batch_size,
            device=where,
            pictures=not chosen.no_pictures,
            reading=how,
            channels=record.get("picture_channels"),
            tiling=tiling,
        )
    except OSError as error:
        print(f"fovea predict: {out}: cannot be written: {error}", file=sys.stderr)
        return 1
    for path, reason in failed:
        print(f"{shown(path)}: {shown(reason)}; skipped", file=sys.stderr)
    done = len(files) - len(failed)
    print(f"{record['task']['name']}: {done} of {len(files)} images predicted, {out / 'predictions.json'}")
    return 0 if done else 1


def find_images(given: Sequence[str]) -> list[Path]:
    """The image files named by the arguments, each once, those in a folder ordered by path.

    Raises:
        ValueError: an argument matches no image.
    """
    found: dict[Path, Path] = {}  # a file given twice is one image; two links to one file are two images with two names
    for argument in given:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
            if not inside:
                raise ValueError(f"{argument}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
        elif path.is_file():
            inside = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207
            inside = [match for match in matches if match.is_file()]
            if not inside and (kind := kind_of_special(path)) is not None:
                raise ValueError(f"{argument} is {kind}, not an image file")
            if not inside:
                raise ValueError(f"{argument}: no such file, folder or pattern")
        for file in inside:
            found.setdefault(_absolute(file), file)
    return list(found.values())


def _check_channels(images: Sequence[str], given: str | None, trained: Sequence[str] | None) -> None:
    """ValueError where the names of the images' channels are stated, and are not those of the training in order."""
    if given is not None and trained is None:
        raise ValueError("--channels: the task records no names of channels (data.channels) to compare with")
    for where in images:
        names = with_names_beside(None if given is None else tuple(given.split(",")), where)
        if trained is not None and names is not None and (problem := difference(names, trained)):
            raise ValueError(f"{where}: {problem} as in the training; give the images in that order")


def _check_depth(files: Sequence[Path], how: Reading) -> None:
    """ValueError where 8 bits would crush the images and no range says how to read them; up to 16 are looked at."""
    some = [files[int(place)] for place in np.linspace(0, len(files) - 1, min(16, len(files)))]
    deep = measure_values(_contents(some), looked=len(some)) if how.value_range is None else None
    if deep is not None and deep.needs_range:
        low, high = deep.suggested.strip("[]").split(", ")
        raise ValueError(f"{deep}; the task was trained without data.range: give --range, for instance {low} {high}")


def _contents(files: Sequence[Path]) -> Iterator[bytes]:
    """Of those that can be read."""
    for path in files:
        with suppress(OSError):
            yield read_bytes(path)


def read_ids(path: Path) -> dict[str, int]:
    """Image ids of a COCO annotation file, by file name.

    Raises:
        ValueError: it is no such file, or two of its images share a name or an id.
    """
    try:
        rows = json.loads(read_text(path))["images"]
        ids = {str(row["file_name"]): _integer_id(row["id"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a COCO annotation file with images of file_name and id ({error!r})") from error
    if len(ids) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(ids)} file names are used by more than one image")
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"{path}: {len(ids) - len(set(ids.values()))} ids are used by more than one image")
    return ids


def _integer_id(value: Any) -> int:
    number = integer(value)
    if number is None:
        raise ValueError(f"id {value!r} is no integer")
    return number


def predict(
    task: Task,
    files: Sequence[Path],
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    ids: dict[str, int] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    pictures: bool = True,
    reading: Reading = PHOTOS,
    channels: Sequence[int] | None = None,
    tiling: Tiling | None = None,
) -> list[tuple[Path, str]]:
    """Predict `files` into the folder `out`; (file, reason) of those that cannot be decoded or have no id in `ids`.

    Args:
        record: of the release: its precision is that of the evaluation.
        reading: of the files; predictions refer to the photo as it is read, upright or stored.
        channels: those of the pictures, see `Example.as_picture`.
        tiling: images are predicted in tiles, `batch_size` of them at once.
    """
    from finetune.predictor import Predictor

    predictor, failed = Predictor(task, record or {}, device=device), []
    names = _names(files)
    rows: list[Any] = []
    images: list[dict[str, Any]] = []
    given: list[str | int | None] = list(names)
    if ids is not None:
        given = list(_chosen_ids(list(names), ids))
    elif task.config.name == "detection":  # COCO's ids are numbers
        given = list(range(1, len(names) + 1))
    for examples in _batches(files, names, batch_size if tiling is None else 1, given, reading, failed):
        if tiling is None:
            predicted = predictor.predict_examples(examples)
        else:
            predicted = [predictor.predict_tiled(example, tiling, batch_size=batch_size) for example in examples]
        for example, prediction in zip(examples, predicted, strict=True):
            found = prediction.as_json(example.id, task.classes)
            rows += found if isinstance(prediction, Detected) else [found]
            height, width = example.image.shape[:2]
            images.append({"id": example.id, "file_name": example.name, "width": width, "height": height})
            stem = Path(names[example.name])
            _save_map(out / "maps" / stem.with_suffix(".png"), prediction)
            if pictures:
                _save(
                    out / "pictures" / stem.with_suffix(".png"), task.picture(example.as_picture(channels), prediction)
                )
    if images:
        write_json(out / "predictions.json", rows)
        if task.config.name == "detection":
            write_json(
                out / "images.json", {"images": images, "annotations": [], "categories": _categories(task.classes)}
            )
    return failed


def _batches(
    files: Sequence[Path],
    names: dict[str, str],
    size: int,
    ids: Sequence[str | int | None],
    reading: Reading,
    failed: list[tuple[Path, str]],
) -> Iterator[list[Example]]:
    waiting: list[Example] = []
    for path, name, id in zip(files, names, ids, strict=True):
        if id is None:
            failed.append((path, "--ids has no image of this name, or several files have it"))
            continue
        try:
            image = reading.photo(read_bytes(path))
        except (OSError, DecodeError) as error:
            failed.append((path, f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)))
            continue
        waiting.append(Example(id, name, image, None))
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _chosen_ids(names: Sequence[str], ids: dict[str, int]) -> list[str | int | None]:
    """The id of each file: that of the name which means it, where it is one name (see `pretrain.data.names`)."""
    files = Names(names).match(list(ids))
    claims = Counter(files)
    of_file = {file: id for file, id in zip(files, ids.values(), strict=True) if claims[file] == 1}
    return [of_file.get(name) for name in names]


def _names(files: Sequence[Path]) -> dict[str, str]:
    """The name of each image -> the path of its picture; names are relative to the common folder of all files."""
    parents = [_absolute(file).parent for file in files]
    top = parents[0]
    while any(top != parent and top not in parent.parents for parent in parents):
        top = top.parent
    names: dict[str, str] = {}
    taken: set[str] = set()
    for file in files:
        name = _absolute(file).relative_to(top).as_posix()
        # a.jpg and a.png are two images: the second keeps its suffix in the name of its picture
        stem = name.rpartition(".")[0]
        stem = name.replace(".", "_") if stem in taken else stem
        while stem in taken:
            stem += "_"
        taken.add(stem)
        names[name] = f"{stem}.png"
    return names


def _absolute(path: Path) -> Path:
    """Its absolute path, without following links: the name is that of the link."""
    return Path(os.path.normpath(path.absolute()))


def _categories(classes: Classes) -> list[dict[str, Any]]:
    return [{"id": id, "name": name} for id, name in zip(classes.category_ids, classes, strict=True)]


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _save_map(path: Path, prediction: Prediction) -> None:
    """Save the values of a prediction that is a map."""
    if isinstance(prediction, ClassMap):
        from PIL import Image

        from pretrain.core.page.colours import colour

        image = Image.fromarray(prediction.classes)
        image.putpalette([value for index in range(256) for value in colour(index)])
        path.parent.mkdir(parents=True, exist_ok=True)
        return image.save(path)
    if isinstance(prediction, DepthMap):
        _save(path, (prediction.depth.clip(0, _MAX_DEPTH) * MILLIMETRES).round().astype(np.uint16))
    return None


if __name__ == "__main__":
    sys.exit(run_command("fovea predict", main))
