"""The words of the command line as `data.train` and `data.val`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.convert.formats import pointer
from finetune.data.maps.mask_layouts import SIGNS
from finetune.data.maps.mask_pairs import split_container
from pretrain.data.shards.image_files import SUFFIXES

TASKS = ("detection", "segmentation", "classification", "depth")


def source(task: str, data: str, images: str | None, classes: str | None) -> dict[str, Any]:
    """The keys of a `DataSource`.

    Args:
        data: what holds the labels: a COCO json, a folder or tar of maps, labelled shards, class folders, a csv.
        images: of labels that are not with their images; None: looked for next to a COCO json.

    Raises:
        ValueError: `data` cannot be of this task, or the images are not found.
    """
    named = {} if classes is None else {"classes": classes}
    coco = data.lower().endswith(".json")
    if not Path(split_container(data)[0]).exists() and not any(letter in data for letter in "{*?"):
        raise ValueError(f"{data}: no such file or folder")
    if task == "classification":
        if images is not None:
            raise ValueError(f"--images {images}: classes are read from the images themselves; leave it out")
        return {"images": data, **named}
    if task == "detection" and not coco:
        raise ValueError(f"{data}: detection needs a COCO json of the objects{pointer(data, 'train.json')}")
    if task in ("detection", "segmentation") and coco:
        return {"images": images or images_of(Path(data)), "annotations": data, **named}
    if task == "segmentation" and images is None and any(found(Path(data)) for found in SIGNS.values()):
        return {"images": data, **named}
    if images is None:
        raise ValueError(f"{data}: give the images of these maps: --images FOLDER_OR_TAR")
    return {"images": images, "masks" if task == "segmentation" else "depth": data, **named}


def images_of(annotations: Path) -> str:
    """The images of a COCO json by the usual places: the folder or tar of its name, `images`, or its own folder.

    Raises:
        ValueError: there is none.
    """
    stem = annotations.stem.removeprefix("instances_")
    home = annotations.parent
    named = [folder / name for folder in (home, home.parent) for name in (stem, f"{stem}.tar")]
    for place in (*named, home / "images", home.parent / "images"):
        if place.exists() and place != annotations:
            return str(place)
    if any(path.suffix.lower() in SUFFIXES for path in home.iterdir()):
        return str(home)
    places = ", ".join(str(place) for place in named[:2])
    raise ValueError(f"{annotations}: its images are not in {places} or next to it; give --images FOLDER_OR_TAR")
