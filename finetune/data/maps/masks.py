"""Images with class maps for semantic segmentation, in all common formats.

masks          label maps (PNG, GIF, TIFF, BMP, npy; of ids, or of colours) with the names of the images or by a
               pattern, in a folder or tar; "train.tar/masks" is a folder inside a tar
ade20k         images: ADEChallengeData2016/images/training; masks and class names are found next to them, 0 is void
cityscapes     images: leftImg8bit/train; the masks are found in gtFine/train, train ids or label ids
voc            images: VOC2012/ImageSets/Segmentation/train.txt; the masks are found in SegmentationClass
coco           masks of instances, smaller ones on top; the rest is `background`, or void without one
coco_panoptic  json and folder or tar of segment PNGs
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.class_names import FILE, read_classes
from finetune.data.coco.coco_semantic import open_instances, open_panoptic
from finetune.data.convert.formats import pointer
from finetune.data.examples import DataProblems, Examples
from finetune.data.files import Files
from finetune.data.maps import mask_layouts
from finetune.data.maps.colours import FILE as COLOURS_FILE
from finetune.data.maps.colours import SUFFIXES as COLOURS
from finetune.data.maps.colours import ColourClasses, DecodeColours, read_colours
from finetune.data.maps.label_maps import VOID, Labels, decode_ids
from finetune.data.maps.mask_pairs import MAP_SUFFIXES, Pairs, StemBelow, match, named, of_one_kind, split_container
from finetune.data.reading import PHOTOS, Reading
from finetune.predictions import Classes
from pretrain.core.files import read_bytes
from pretrain.core.text import shown
from pretrain.data.shards.image_files import SUFFIXES

LOOKED_AT = 16  # number of masks that are checked when a set is opened
_PNG = frozenset({".png"})


def open_examples(section: Any, source: Any, *, classes: Classes | None = None, reading: Reading = PHOTOS) -> Examples:
    """The images of a `finetune.config.DataSource` with their class maps, uint8 [H, W], 255 void.

    Args:
        section: a `SegmentationConfig`.
        classes: of the training set; this one must have the same.
        reading: of the images.

    Raises:
        ValueError: the source has none of the formats, no image has a map, or its classes differ.
    """
    form = _format(source) if source.format == "auto" else source.format
    unread = [
        key
        for key in ("masks", "mask_names", "image_names", "annotations", "classes")
        if getattr(source, key) and key not in _READS[form]
    ]
    if unread:
        what = f"{', '.join(unread)} given, which format {form} does not read"
        raise ValueError(f"{source.images}: {what}; remove it, or set `format`")
    found = _FORMATS[form](section, source, classes, reading)
    if len(found.classes) > VOID:
        raise ValueError(f"{source.images}: {len(found.classes)} classes; at most {VOID} labels fit in a byte")
    if classes is not None and (tuple(found.classes), found.classes.category_ids) != (
        tuple(classes),
        classes.category_ids,
    ):
        raise ValueError(
            f"{source.images}: its classes {_listed(found.classes)} are not those of the training set "
            f"{_listed(classes)}"
        )
    return found


class DecodeLabels:
    """A PNG of ids to labels; picklable."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def __call__(self, data: bytes) -> np.ndarray:
        return self.labels.of(decode_ids(data))


def _open_masks(section: Any, source: Any, classes: Classes | None, reading: Reading) -> Pairs:
    if source.masks is None:
        raise ValueError(f"masks: missing for {source.images}; give the folder or .tar of label maps")
    (where, prefix), (masks_where, masks_prefix) = split_container(_one(source.images)), split_container(source.masks)
    images = Files.open(where)
    targets = images if masks_where == where else Files.open(masks_where)
    names = source.classes or _beside(source.masks) or _beside(_one(source.images))
    if names is None and classes is None:
        raise ValueError(
            f"classes: missing for {source.masks}; give a json of the class names, or labelmap.txt of colours"
        )
    colours = read_colours(Path(names)) if names is not None and Path(names).suffix in COLOURS else None
    if colours is not None:
        known = colours.without(set(section.void_ids))
    else:
        known = classes if names is None else _as_ids(read_classes(names), section)
    assert known is not None
    findings = DataProblems()
    mask_key = named(source.mask_names, masks_prefix, frozenset().union(*MAP_SUFFIXES))
    image_key = named(source.image_names, prefix, SUFFIXES)
    pairs = match(images, targets, image_key, of_one_kind(targets, mask_key), findings)
    found = _pairs(section, images, targets, pairs, known, findings, reading, colours=colours)
    _look_for_both_classes(found, source.masks)
    return found


def _look_for_both_classes(found: Pairs, where: str) -> None:
    """Report masks of two classes that hold only one of them and void: probably the ids are 0 and 255."""
    if len(found.classes) != 2:
        return
    met: set[int] = set()
    for place in np.linspace(0, len(found) - 1, min(LOOKED_AT, len(found))).astype(int).tolist():
        with contextlib.suppress(ValueError):  # an unreadable map is reported when it is read
            met |= set(np.unique(found.decode(found.targets.read(found.pairs[place].target))).tolist())
    if VOID in met and len(met) == 2:
        (label,) = met - {VOID}
        missing = f"{found.classes[1 - label]!r} (id {found.classes.category_ids[1 - label]})"
        text = f"no pixel of {missing} in {min(LOOKED_AT, len(found))} masks, only {found.classes[label]!r} and void"
        way_out = "if its id is 255, give that id in the classes and set task.void_ids=[]"
        found.findings.add("class never seen", where, missing, f"{text}; {way_out}")


def _open_ade20k(section: Any, source: Any, classes: Classes | None, reading: Reading) -> Pairs:
    images, targets, known = mask_layouts.ade20k(_one(source.images))
    if source.classes:
        known = read_classes(source.classes)
    findings = DataProblems()
    pairs = match(images, targets, StemBelow(""), StemBelow("", suffixes=_PNG), findings)
    return _pairs(section, images, targets, pairs, known, findings, reading, void={0})


def _open_cityscapes(section: Any, source: Any, classes: Classes | None, reading: Reading) -> Pairs:
    images, targets, known, ending, void = mask_layouts.cityscapes(_one(source.images))
    findings = DataProblems()
    image_key = StemBelow("", ending=mask_layouts.CITYSCAPES_IMAGE)
    pairs = match(images, targets, image_key, StemBelow("", ending=ending, suffixes=_PNG), findings)
    found = _pairs(section, images, targets, pairs, known, findings, reading, void=void)
    found.classes = Classes(tuple(known))  # one set of classes, whichever ids the masks hold
    return found


def _open_voc(section: Any, source: Any, classes: Classes | None, reading: Reading) -> Pairs:
    images, targets, only, known = mask_layouts.voc(_one(source.images))
    if source.classes:
        known = read_classes(source.classes)
    findings = DataProblems()
    pairs = match(images, targets, StemBelow(""), StemBelow("", suffixes=_PNG), findings, only=only)
    return _pairs(section, images, targets, pairs, known, findings, reading)


def _pairs(
    section: Any,
    images: Files,
    targets: Files,
    pairs: Any,
    known: Classes,
    findings: DataProblems,
    reading: Reading,
    *,
    void: set[int] | None = None,
    colours: ColourClasses | None = None,
) -> Pairs:
    ids = set(section.void_ids) | (void or set()) | ({0} if section.reduce_zero_label else set())
    labels = Labels(known, ids)
    decode = DecodeLabels(labels) if colours is None else DecodeColours(labels, colours)
    settings = f"{tuple(known)} {known.category_ids} {sorted(ids)}{'' if colours is None else colours.colours}"
    return Pairs(
        images,
        targets,
        pairs,
        decode,
        classes=known,
        findings=findings,
        settings=settings,
        reading=reading,
    )


_FORMATS: dict[str, Callable[[Any, Any, Classes | None, Reading], Any]] = {
    "masks": _open_masks,
    "ade20k": _open_ade20k,
    "cityscapes": _open_cityscapes,
    "voc": _open_voc,
    "coco": open_instances,
    "coco_panoptic": open_panoptic,
}
# The keys of a source, in addition to `images`, that each format reads.
_READS = {
    "masks": ("masks", "mask_names", "image_names", "classes"),
    "ade20k": ("classes",),
    "cityscapes": (),
    "voc": ("classes",),
    "coco": ("annotations",),
    "coco_panoptic": ("annotations", "masks"),
}


def _format(source: Any) -> str:
    """The format of a source with `format: auto`."""
    if source.annotations is not None:
        try:
            rows = json.loads(read_bytes(source.annotations)).get("annotations") or [{}]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            why = f"cannot be read as COCO json: {error}{pointer(source.annotations)}"
            raise ValueError(f"{source.annotations}: {why}") from error
        return "coco_panoptic" if "segments_info" in rows[0] else "coco"
    if source.masks is not None:
        return "masks"
    if isinstance(source.images, str):
        for name, found in mask_layouts.SIGNS.items():
            if found(Path(source.images)):
                return name
    raise ValueError(
        f"{source.images}: no class maps found; give masks (folder or .tar of label maps), annotations (COCO json), or "
        f"the images of ADE20K, Cityscapes or VOC in their own folders"
    )


def _as_ids(classes: Classes, section: Any) -> Classes:
    """A plain list of names counts from 1 where 0 is void."""
    if section.reduce_zero_label and classes.category_ids == tuple(range(len(classes))):
        return Classes(tuple(classes), [number + 1 for number in classes.category_ids])
    return classes


def _beside(where: str) -> str | None:
    """classes.json, or labelmap.txt, in the same folder or one above."""
    home = Path(split_container(where)[0])
    for folder in (home, home.parent):
        for name in (FILE, COLOURS_FILE):
            if (folder / name).is_file():
                return str(folder / name)
    return None


def _one(images: str | list[str]) -> str:
    if not isinstance(images, str):
        raise ValueError(f"images: {len(images)} paths; class maps need one folder or .tar of images")
    return images


def _listed(classes: Classes) -> str:
    names = ", ".join(f"{i} {shown(name)}" for i, name in zip(classes.category_ids[:4], classes[:4], strict=True))
    return f"({len(classes)}: {names} ...)"
