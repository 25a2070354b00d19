"""Large images in tiles: each is predicted as an image of its own, and their predictions become one of the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from finetune.data.examples import Example
from finetune.predictions import Detected, Prediction
from finetune.tasks.pixels import PixelTask
from finetune.tiling.maps import averaged_rows
from finetune.tiling.objects import merge_objects
from finetune.tiling.tiles import Tiling


def tiled_objects(
    example: Example, tiling: Tiling, predict: Callable[[list[Example]], Sequence[Prediction]], batch_size: int
) -> Detected:
    """The objects of an image, by `predict` of batches of its tiles."""
    size = (example.image.shape[0], example.image.shape[1])
    found = [part for batch in _batches(tiling.parts(example), batch_size) for part in predict(batch)]
    return merge_objects(size, tiling.tiles(*size), [part for part in found if isinstance(part, Detected)])


def tiled_map(
    example: Example, tiling: Tiling, task: PixelTask, scores: Callable[[list[Example]], list[Tensor]], batch_size: int
) -> Prediction:
    """The map of an image, by the outputs of `scores` for batches of its tiles."""
    height, width = example.image.shape[:2]
    tile = min(tiling.size, height), min(tiling.size, width)
    outputs = (part for batch in _batches(tiling.parts(example), batch_size) for part in scores(batch))
    rows = averaged_rows((height, width), tiling.starts(height), tiling.starts(width), tile, outputs)
    return task.as_prediction(np.concatenate([task.values(some) for some in rows]))


def _batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    waiting: list[Example] = []
    for example in examples:
        waiting.append(example)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
