"""Clips: samples whose images are numbered frames (`dog1.0000.jpg`, `dog1.0001.jpg`), and the frames that a view shows.

A view reads only the frames that it shows; they are found in the index by their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain.data.sampling import keyed
from pretrain.data.views.specs import ViewSpec

_STARTS = 1  # part of a view's random numbers; part 0 is its crops and colours


def shown_frames(total: int, index: int, view: ViewSpec, *, seed: int, position: int) -> list[list[int]]:
    """For each of the view's `count` clips the numbers of its frames, of a sample of `total` frames.

    Its start is uniform among those where the last frame exists; a sample that is too short starts at its first frame,
    and its last one is repeated. An image is a clip of one frame.

    Args:
        index: of the view in the objective's list.
    """
    numbers = keyed.uniforms(seed, position, keyed.view_purpose(index), _STARTS, count=view.count)
    starts = (int(number * max(1, total - (view.frames - 1) * view.stride)) for number in numbers.tolist())
    return [[min(start + i * view.stride, total - 1) for i in range(view.frames)] for start in starts]


def middle_frames(total: int, frames: int, stride: int) -> list[int]:
    """The numbers of the frames in the middle of a sample of `total`; of a short one as in `shown_frames`."""
    start = max(0, total - (frames - 1) * stride - 1) // 2
    return [min(start + i * stride, total - 1) for i in range(frames)]


def needed_members(
    names: Sequence[str], views: Iterable[tuple[int, ViewSpec]], *, seed: int, position: int
) -> list[str]:
    """Those of the frames `names` that any of the views shows, in their order."""
    if not names:
        return []
    clips = (shown_frames(len(names), index, view, seed=seed, position=position) for index, view in views)
    return [names[number] for number in sorted({number for of in clips for frames in of for number in frames})]
