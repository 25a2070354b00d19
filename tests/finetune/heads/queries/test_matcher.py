"""The assignment has the least cost there is; the costs are those of plain loops."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from finetune.heads.queries import matcher


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 2**31))
def test_no_other_assignment_costs_less(queries: int, objects: int, seed: int):
    cost = torch.randn(queries, objects, generator=torch.Generator().manual_seed(seed))
    rows, columns = matcher.match(cost)
    assert len(rows) == len(columns) == min(queries, objects)
    assert rows.tolist() == sorted(set(rows.tolist())) and len(set(columns.tolist())) == len(columns)
    small, large = sorted((queries, objects))
    table = cost if queries >= objects else cost.T
    least = min(
        sum(float(table[chosen[i], i]) for i in range(small)) for chosen in itertools.permutations(range(large), small)
    )
    assert abs(float(cost[rows, columns].sum()) - least) < 1e-5


def test_non_finite_costs_still_give_pairs():
    cost = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0]])
    rows, columns = matcher.match(cost)
    assert rows.tolist() == [0, 1] and sorted(columns.tolist()) == [0, 1]


def test_mask_costs_are_the_losses_of_each_pair():
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(3, 40), (torch.rand(2, 40) > 0.5).float(), (torch.rand(40) > 0.3).float()
    by_entropy = matcher.mask_cost(logits, targets, weights)
    by_dice = matcher.dice_cost(logits, targets, weights)
    for query, wanted in itertools.product(range(3), range(2)):
        known = weights > 0
        one, other = logits[query, known], targets[wanted, known]
        entropy = F.binary_cross_entropy_with_logits(one, other)
        dice = 1 - (2 * (one.sigmoid() * other).sum() + 1) / (one.sigmoid().sum() + other.sum() + 1)
        torch.testing.assert_close(by_entropy[query, wanted], entropy)
        torch.testing.assert_close(by_dice[query, wanted], dice)


def test_the_focal_cost_is_the_loss_difference_of_the_class():
    logits, labels = torch.tensor([[0.3, -2.0], [4.0, 1.0]]), torch.tensor([1, 0, 1])
    cost = matcher.focal_class_cost(logits, labels)
    positive = sigmoid_focal_loss(logits, torch.ones_like(logits))
    negative = sigmoid_focal_loss(logits, torch.zeros_like(logits))
    torch.testing.assert_close(cost, (positive - negative)[:, labels])


def test_box_costs_are_the_distances_of_each_pair():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.1, 0.1]])
    targets = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.6, 0.4, 0.3, 0.3], [0.2, 0.8, 0.1, 0.3]])
    distance, overlap = matcher.box_costs(boxes, targets)
    assert distance[0, 0] == 0 and overlap[0, 0] == -1
    one, other = box_convert(boxes[1:], "cxcywh", "xyxy"), box_convert(targets[2:], "cxcywh", "xyxy")
    torch.testing.assert_close(distance[1, 2], torch.tensor(0.1 + 0.1 + 0.2))
    torch.testing.assert_close(overlap[1, 2], generalized_box_iou_loss(one, other)[0] - 1)
