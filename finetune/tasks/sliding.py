"""Inference on images of any size: means over overlapping windows, scales and mirror images.

The usual protocol for ADE20K: windows of the training size at a fixed stride, the last of each row and column moved
back inside the image; multi-scale testing averages probabilities (Chen et al. 2017, DeepLabv3, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.heads.pixels.dense_parts import resize
from pretrain.core.images import window_starts

WINDOWS_AT_ONCE = 8
CHANNELS_AT_ONCE = 16

Dense = Callable[[Tensor], Tensor]


def slide(dense: Dense, image: Tensor, *, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The mean over windows of `dense`, for one image float [1, C, H, W] -> [K, H, W].

    Args:
        dense: [n, C, h, w] -> [n, K, h', w'], resized here to the window's size.
        window, stride: (height, width) in pixels; an image smaller than the window is its own window on that side.
    """
    height, width = image.shape[2:]
    size = (min(window[0], height), min(window[1], width))
    tops = window_starts(height, window[0], stride[0])
    lefts = window_starts(width, window[1], stride[1])
    corners = [(top, left) for top in tops for left in lefts]
    total: Tensor | None = None
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        some = corners[start : start + WINDOWS_AT_ONCE]
        cut = torch.cat([image[:, :, top : top + size[0], left : left + size[1]] for top, left in some])
        outputs = resize(dense(cut).float(), size)
        if total is None:
            total = outputs.new_zeros((outputs.shape[1], height, width))
        for (top, left), output in zip(some, outputs, strict=True):
            total[:, top : top + size[0], left : left + size[1]] += output
    assert total is not None
    covered = [cover(tops, size[0], height), cover(lefts, size[1], width)]
    return total.div_((covered[0][:, None] * covered[1]).to(total.device))


def over_scales(
    infer: Callable[[Tensor], Tensor], image: Tensor, *, scales: Sequence[float], flip: bool, probabilities: bool
) -> Tensor:
    """The mean [K, H, W] of `infer` on an image float [1, C, H, W] at several scales, each also mirrored if `flip`.

    Args:
        infer: [1, C, h, w] -> [K, h, w].
        probabilities: outputs are logits, and their softmax is averaged; else the outputs are averaged. A single scale
            without a mirror is returned unchanged.
    """
    if len(scales) == 1 and not flip:
        return infer(_scaled(image, scales[0]))
    total: Tensor | None = None
    for scale in scales:
        scaled = _scaled(image, scale)
        for mirrored in (False, True) if flip else (False,):
            output = infer(scaled.flip(3) if mirrored else scaled)
            output = resize((output.flip(2) if mirrored else output)[None], image.shape[2:])
            output = output.softmax(dim=1) if probabilities else output
            total = output if total is None else total + output
    assert total is not None
    return total[0] / (len(scales) * (1 + flip))


def most_likely(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the highest score at each pixel of `size`, int64 [h, w], of scores [K, H, W] resized to it.

    A few classes are resized at a time: 150 of them on a large photo would not fit in memory.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for start in range(0, len(scores), CHANNELS_AT_ONCE):
        values, which = resize(scores[None, start : start + CHANNELS_AT_ONCE], size)[0].max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        classes = torch.where(better, which + start, classes)
    return classes


def cover(starts: Sequence[int], size: int, length: int) -> Tensor:
    """Number of windows that cover each pixel of a side, float32 [length]."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + size] += 1
    return counts


def _scaled(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    size = tuple(max(round(length * scale), 1) for length in image.shape[2:])
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
