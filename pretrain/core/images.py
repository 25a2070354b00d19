"""How images become pixels, as configurations and records state it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

# Per channel of ImageNet's training images, pixels in [0, 1]; the default of most models.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# exif: photos are turned upright by their EXIF orientation. stored: it is ignored.
Orientation = Literal["exif", "stored"]
# auto: the pixels that have the annotated width and height; exif where both have (`finetune.data.orientation`).
DataOrientation = Literal["auto", "exif", "stored"]

# The default of `data.max_pixels`: 150 MB per decoded RGB image in each worker, and several times that while it is
# resized.
MAX_PIXELS = 50_000_000

# (low, high): the stored values that become black and white; or one such pair per channel.
ValueRange = tuple[float, float] | tuple[tuple[float, float], ...]

# How the first layer of weights becomes that of another number of channels (`pretrain.models.importers.channels`).
ChannelRule = Literal["mean", "repeat", "zero"]


def range_problems(given: ValueRange | None, channels: int, *, model: str = "model.in_chans") -> list[str]:
    """Problems of a `data.range` for images of `channels`, which `model` names."""
    if given is None:
        return []
    pairs = [pair for pair in given if isinstance(pair, tuple)] or [given]
    if any(len(pair) != 2 or not pair[0] < pair[1] for pair in pairs):  # pyright: ignore[reportOperatorIssue]
        return [f"data.range: expected low < high, got {list(given)}"]
    if len(pairs) not in (1, channels):
        return [f"data.range: {len(pairs)} pairs for {model} {channels}"]
    return []


def name_problems(given: Sequence[str] | None, channels: int, *, model: str) -> list[str]:
    """Problems of `data.channels` for images of `channels`, which `model` names."""
    if given is None:
        return []
    twice = sorted({name for name in given if given.count(name) > 1})
    found = [f"data.channels: {', '.join(twice)} twice"] if twice else []
    if len(given) != channels:
        found.append(f"data.channels: {len(given)} names for {model} {channels}")
    return found


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along a side: every `stride`, the last one moved back to end with the side.

    Raises:
        ValueError: the stride is not within 1 to the window, so that pixels would be skipped.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"a stride of {stride} with windows of {window} pixels; it must be within 1 to {window}")
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]
