"""Points at which masks are compared: a loss on points costs a fraction of one on every pixel (Kirillov et al. 2020).

Points are (x, y) in [0, 1] of the image. They come from a shifted low-discrepancy sequence instead of a generator:
one pair of random numbers per image gives any number of evenly spread points, the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Steps along x and y that leave the smallest gaps for any number of points (Roberts 2018, the R2 sequence).
_STEPS = (0.7548776662466927, 0.5698402909980532)
# Steps between the shifts of one image's masks; not multiples of those above, or two masks would share their points.
_SHIFT_STEPS = (0.41421356237309515, 0.7320508075688772)


def spread(shifts: Tensor, count: int, *, start: int = 0) -> Tensor:
    """Points `start` to `start + count` of the sequence moved by `shifts` [..., 2] in [0, 1): fp32 [..., count, 2]."""
    index = torch.arange(start, start + count, device=shifts.device, dtype=torch.float64)
    steps = torch.tensor(_STEPS, device=shifts.device, dtype=torch.float64)
    return ((shifts.double()[..., None, :] + index[:, None] * steps) % 1.0).float()


def shifts_of_masks(shift: Tensor, count: int) -> Tensor:
    """A shift for each of `count` masks of an image from its own `shift` [2]: [count, 2] in [0, 1)."""
    index = torch.arange(count, device=shift.device, dtype=torch.float64)
    steps = torch.tensor(_SHIFT_STEPS, device=shift.device, dtype=torch.float64)
    return ((shift.double() + index[:, None] * steps) % 1.0).float()


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps [n, H, W] of any dtype at points [n, p, 2], bilinear between the centers of pixels: [n, p].

    A point within half a pixel of the border takes the border's value.
    """
    flat = maps.flatten(1)
    return _blend([(flat.gather(1, index), weight) for index, weight in _corners(points, maps)])


def sample_together(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps [n, H, W] at the same points [p, 2] for all of them: [n, p], as `sample`."""
    flat = maps.flatten(1)
    return _blend([(flat.index_select(1, index), weight) for index, weight in _corners(points, maps)])


def _corners(points: Tensor, maps: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The four pixels around each point [..., 2], as indices into the flat map, with their weights, [...] each.

    Written out because torch's `grid_sample` has no deterministic gradient on a GPU, and needs float maps.
    """
    height, width = maps.shape[1:]
    x = (points[..., 0] * width - 0.5).clamp(0, width - 1)
    y = (points[..., 1] * height - 0.5).clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    across, down = x - left, y - top
    columns = [(left.long(), 1 - across), ((left.long() + 1).clamp(max=width - 1), across)]
    rows = [(top.long(), 1 - down), ((top.long() + 1).clamp(max=height - 1), down)]
    return [(row * width + column, share * part) for row, share in rows for column, part in columns]


def _blend(corners: list[tuple[Tensor, Tensor]]) -> Tensor:
    (values, weight), *others = corners
    total = values * weight
    for values, weight in others:
        total = total + values * weight
    return total


def uncertain_points(
    logits: Tensor, shifts: Tensor, count: int, *, oversample: float = 3.0, important: float = 0.75
) -> Tensor:
    """Points for a loss on mask logits [n, h, w], most of them where the mask is least certain: [n, count, 2].

    Of `oversample * count` candidates the `important * count` with logits nearest to 0, and evenly spread ones for the
    rest (PointRend, section 3.2; the shares are those of Mask2Former, Cheng et al. 2022).

    Args:
        shifts: of every mask, [n, 2].
    """
    candidates, chosen = int(count * oversample), int(count * important)
    points = spread(shifts, candidates)
    certainty = sample(logits.detach().float(), points).abs()
    nearest = certainty.topk(chosen, dim=1, largest=False).indices
    nearest = points.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([nearest, spread(shifts, count - chosen, start=candidates)], dim=1)
