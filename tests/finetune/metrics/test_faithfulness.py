from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from finetune.metrics.faithfulness import area, deletion, insertion

WEIGHTS = torch.tensor([[4.0, 1.0], [2.0, 3.0]])


def counts(images: Tensor) -> Tensor:
    """ "Probabilities" of two classes: the weighted share of pixels that are 1, and a constant."""
    share = (images[:, 0] * WEIGHTS).sum((1, 2)) / WEIGHTS.sum()
    return torch.stack([torch.full_like(share, 0.05), share], dim=1)


def test_the_curve_follows_the_pixels_in_the_order_of_importance():
    image, nothing = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    fall = deletion(counts, image, WEIGHTS[None], nothing, step=1)
    torch.testing.assert_close(fall, torch.tensor([[1.0, 0.6, 0.3, 0.1, 0.0]]))
    rise = insertion(counts, image, WEIGHTS[None], nothing, step=1)
    torch.testing.assert_close(rise, torch.tensor([[0.0, 0.4, 0.7, 0.9, 1.0]]))
    torch.testing.assert_close(area(fall), torch.tensor([0.375]))
    assert image.eq(1).all()
    assert nothing.eq(0).all()


def test_the_true_map_has_the_smallest_deletion_and_the_largest_insertion_of_all():
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.float32).view(-1, 2, 2)
    images, nothing = torch.ones(len(orders), 1, 2, 2), torch.zeros(len(orders), 1, 2, 2)
    best = int((orders.flatten(1).argsort() == WEIGHTS.flatten().argsort()).all(1).nonzero())
    assert area(deletion(counts, images, orders, nothing, step=1)).argmin() == best
    assert area(insertion(counts, images, orders, nothing, step=1)).argmax() == best


@pytest.mark.parametrize(("step", "points"), [(1, 5), (3, 3), (4, 2), (9, 2)])
def test_a_last_step_may_be_shorter(step: int, points: int):
    image, nothing = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    curve = deletion(counts, image, WEIGHTS[None], nothing, step=step)
    assert curve.shape == (1, points)
    assert curve[0, -1] == 0


def test_what_does_not_fit_is_refused():
    image = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        deletion(counts, image, WEIGHTS[None], image, step=0)
    with pytest.raises(ValueError, match=r"need an importance \[1, 2, 2\]"):
        deletion(counts, image, WEIGHTS, image, step=1)
    with pytest.raises(ValueError, match=r"got \[1, 2, 2\] and \[1, 1, 2, 3\]"):
        insertion(counts, image, WEIGHTS[None], torch.ones(1, 1, 2, 3), step=1)
