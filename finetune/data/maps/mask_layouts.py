"""Where ADE20K, Cityscapes and PASCAL VOC keep their images and class maps, and what their ids mean.

Zhou et al. 2017 (the scene parsing benchmark, 150 classes); Cordts et al. 2016 (19 classes); Everingham et al. 2010.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.data.files import Files
from finetune.predictions import Classes
from pretrain.core.files import read_text

CITYSCAPES_IMAGE = "_leftImg8bit"
_TRAIN_IDS, _LABEL_IDS = "_gtFine_labelTrainIds", "_gtFine_labelIds"
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_CITYSCAPES_IDS = range(34)
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SIGNS: dict[str, Callable[[Path], bool]] = {
    "ade20k": lambda path: path.parent.name == "images" and (path.parent.parent / "annotations" / path.name).is_dir(),
    "cityscapes": lambda path: path.parent.name == "leftImg8bit",
    "voc": lambda path: path.suffix == ".txt" and path.parent.parent.name == "ImageSets",
}


def ade20k(images: str) -> tuple[Files, Files, Classes]:
    """Images, masks and classes (ids 1 to 150, named by objectInfo150.txt) of ADEChallengeData2016/images/SPLIT.

    Raises:
        ValueError: the folders next to it do not exist.
    """
    path = Path(images)
    masks, names = path.parent.parent / "annotations" / path.name, path.parent.parent / "objectInfo150.txt"
    _need(masks, "ade20k", "ADEChallengeData2016/images/training")
    if not names.is_file():
        return Files.open(images), Files.open(str(masks)), Classes([str(i) for i in range(1, 151)], range(1, 151))
    rows = [line.split("\t") for line in names.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    known = Classes([row[-1].strip().split(",")[0] for row in rows], [int(row[0]) for row in rows])
    return Files.open(images), Files.open(str(masks)), _unique(known)


def cityscapes(images: str) -> tuple[Files, Files, Classes, str, set[int]]:
    """Images, masks, classes, the ending of the masks' names and their void ids, of leftImg8bit/SPLIT.

    Raises:
        ValueError: gtFine is not next to it, or has no masks of either kind.
    """
    path = Path(images)
    masks = path.parent.parent / "gtFine" / path.name
    _need(masks, "cityscapes", "leftImg8bit/train")
    targets = Files.open(str(masks))
    for ending in (_TRAIN_IDS, _LABEL_IDS):
        if any(name.endswith(ending + ".png") for name in targets.names):
            break
    else:
        raise ValueError(f"{masks}: no file ends with {_TRAIN_IDS}.png or {_LABEL_IDS}.png")
    if ending == _TRAIN_IDS:
        return Files.open(images), targets, Classes(tuple(CITYSCAPES)), ending, set()
    known = Classes(tuple(CITYSCAPES), tuple(CITYSCAPES.values()))
    return Files.open(images), targets, known, ending, set(_CITYSCAPES_IDS) - set(CITYSCAPES.values())


def voc(listed: str) -> tuple[Files, Files, list[str], Classes]:
    """Images, masks, the names listed and the classes, of VOC2012/ImageSets/Segmentation/SPLIT.txt.

    Raises:
        ValueError: the list or the folders do not exist.
    """
    path = Path(listed)
    root = path.parent.parent.parent
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    for folder in (images, masks):
        _need(folder, "voc", "VOC2012/ImageSets/Segmentation/train.txt")
    try:
        only = read_text(path).split()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return Files.open(str(images)), Files.open(str(masks)), only, Classes(VOC)


def _need(folder: Path, form: str, example: str) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; format {form} expects images: .../{example}")


def _unique(classes: Classes) -> Classes:
    """Names that occur twice (ADE20K has "screen" twice) with their id."""
    names = [
        name if classes.count(name) == 1 else f"{name} {i}"
        for i, name in zip(classes.category_ids, classes, strict=True)
    ]
    return Classes(names, classes.category_ids)
