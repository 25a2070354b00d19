"""Images with depth maps: 16-bit PNGs in a folder or tar, named as the images."""

from __future__ import annotations

from functools import partial
from typing import Any

from finetune.data.examples import DataProblems
from finetune.data.files import Files
from finetune.data.maps.label_maps import decode_depth
from finetune.data.maps.mask_pairs import Pairs, StemBelow, match, split_container
from finetune.data.reading import PHOTOS, Reading
from finetune.predictions import Classes


def open_examples(section: Any, source: Any, *, classes: Classes | None = None, reading: Reading = PHOTOS) -> Pairs:
    """The images of a `finetune.config.DataSource` with their depth, float32 [H, W] metres, 0 where unknown.

    Args:
        section: a `DepthConfig`. classes: not used. reading: of the images.

    Raises:
        ValueError: the source cannot be read, or no image has a map.
    """
    if not isinstance(source.images, str):
        raise ValueError(f"images: {len(source.images)} paths; depth needs one folder or .tar of images")
    (where, prefix), (maps_where, maps_prefix) = split_container(source.images), split_container(source.depth)
    images = Files.open(where)
    targets = images if maps_where == where else Files.open(maps_where)
    findings = DataProblems()
    pairs = match(images, targets, StemBelow(prefix), StemBelow(maps_prefix, suffixes=frozenset({".png"})), findings)
    decode = partial(decode_depth, units_per_metre=section.units_per_metre)
    settings = f"{section.units_per_metre} units per metre"
    return Pairs(
        images,
        targets,
        pairs,
        decode,
        classes=Classes(),
        findings=findings,
        settings=settings,
        reading=reading,
    )
