"""Annotations that lie."""

from __future__ import annotations

import json
from typing import Any

from launch.lab.bench import SIDE, photo
from launch.lab.trial import Command, Trial
from launch.lab.verdicts import SILENT, BrokenPromiseError

_IMAGES = 8
_CONFIG = """
run_dir: tuned
task: {name: detection, size: 64, head: {name: faster_rcnn}}
model: {release: RELEASE}
data:
  train: {images: photos, annotations: boxes.json}
  val: {images: photos, annotations: boxes.json}
  num_workers: 0
optim: {lr: 1e-3, total_steps: 1, global_batch_size: 2, warmup_steps: 0}
engine: {device: cpu}
"""


def _coco(trial: Trial) -> dict[str, Any]:
    """A COCO file of photos that are written too, one box in each."""
    for number in range(_IMAGES):
        trial.write(f"photos/{number}.jpg", photo(number))
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE} for i in range(_IMAGES)]
    box = {"category_id": 1, "bbox": [4, 4, 20, 16], "area": 320, "iscrowd": 0}
    return {
        "images": images,
        "annotations": [{"id": i + 1, "image_id": i + 1, **box} for i in range(_IMAGES)],
        "categories": [{"id": 1, "name": "thing"}],
    }


def _check(trial: Trial, coco: dict[str, Any]) -> Command:
    trial.write("boxes.json", json.dumps(coco))
    config = trial.write("finetune.yaml", _CONFIG.replace("RELEASE", str(trial.bench.release)))
    return trial.start("finetune", config, "--check")


def _is_named(trial: Trial, coco: dict[str, Any], *named: str) -> None:
    """The check refuses the annotations, or passes and names what was found."""
    command = _check(trial, coco)
    if command.wait() != 0:
        trial.refused(command)
    if not any(name in command.said for name in named):
        raise BrokenPromiseError(f"none of {named} is named: {command.last}", SILENT)


def boxes_outside(trial: Trial) -> None:
    """Boxes outside their image, without area, or of NaN: named with file and id, never trained on."""
    coco = _coco(trial)
    wrong = trial.rng.choice(
        (
            [SIDE + 5, 0, 10, 10],
            [4, 4, 0, 10],
            [4, 4, -5, 10],
            [4, 4, float("nan"), 5],
            [-50, -50, 5, 5],
            ["a", 1, 2, 3],
            [1, 2],
        )
    )
    coco["annotations"][trial.rng.randrange(_IMAGES)]["bbox"] = wrong
    _is_named(trial, coco, "boxes.json")


def unknown_ids(trial: Trial) -> None:
    """Objects of a class or an image that the file does not list."""
    coco = _coco(trial)
    one = coco["annotations"][trial.rng.randrange(_IMAGES)]
    one[trial.rng.choice(("category_id", "image_id"))] = trial.rng.choice((99, -1, "cat", None))
    _is_named(trial, coco, "boxes.json")


def exchanged_sides(trial: Trial) -> None:
    """Width and height that are not those of the photos."""
    coco = _coco(trial)
    for image in coco["images"]:
        image["width"], image["height"] = SIDE * 2, SIDE + trial.rng.randint(1, 9)
    _is_named(trial, coco, "boxes.json", "photos", "0.jpg")


def missing_photo(trial: Trial) -> None:
    """A photo that the annotations list and the folder lacks."""
    coco = _coco(trial)
    gone = f"{trial.rng.randrange(_IMAGES)}.jpg"
    (trial.folder / "photos" / gone).unlink()
    _is_named(trial, coco, gone)


def ids_as_text(trial: Trial) -> None:
    """Ids as text, annotation ids that repeat or are missing: understood, or refused by name."""
    coco = _coco(trial)
    what = trial.rng.choice(("text", "repeat", "missing"))
    for one in coco["annotations"]:
        if what == "text":
            one["image_id"], one["category_id"] = str(one["image_id"]), "1"
        elif what == "repeat":
            one["id"] = 0
        else:
            del one["id"]
    command = _check(trial, coco)
    if command.wait() != 0:
        trial.refused(command, "boxes.json")


def wrong_labels(trial: Trial) -> None:
    """A list with labels that are no classes: refused with the file."""
    rows = ["filename,label"]
    for number in range(_IMAGES):
        trial.write(f"photos/{number}.jpg", photo(number))
        rows.append(f"photos/{number}.jpg,{number % 2}")
    rows[trial.rng.randint(1, _IMAGES)] = f"photos/0.jpg,{trial.rng.choice(('-1', '1.5', 'nan', '', '9' * 30))}"
    trial.write("list.csv", "\n".join(rows) + "\n")
    text = trial.bench.finetuning().replace(str(trial.bench.shards), "list.csv")
    trial.refused(trial.start("finetune", trial.write("finetune.yaml", text), "--check"), "list.csv")


def not_json(trial: Trial) -> None:
    """An annotation file with a part cut off, or of other types."""
    text = json.dumps(_coco(trial))
    wrong = trial.rng.choice((text[: trial.rng.randrange(len(text))], "[]", "null", "", '{"images": 3}', "[" * 100000))
    trial.write("boxes.json", wrong)
    config = trial.write("finetune.yaml", _CONFIG.replace("RELEASE", str(trial.bench.release)))
    trial.refused(trial.start("finetune", config, "--check"), "boxes.json")
