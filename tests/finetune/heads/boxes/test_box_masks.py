from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.heads.boxes.box_masks import mask_loss, masks_in_boxes, paste_mask


def disc(height: int, width: int, y: float, x: float, radius: float) -> torch.Tensor:
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    return ((rows - y) ** 2 + (columns - x) ** 2 < radius**2).to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(y=st.floats(20, 40), x=st.floats(20, 60), radius=st.floats(8, 18), grow=st.tuples(*[st.floats(-3, 3)] * 4))
def test_a_mask_cropped_to_its_box_and_pasted_is_unchanged(
    y: float, x: float, radius: float, grow: tuple[float, float, float, float]
):
    mask = disc(64, 80, y, x, radius)
    box = torch.tensor([x - radius, y - radius, x + radius, y + radius]) + torch.tensor(grow)
    small = masks_in_boxes(mask[None], box[None], torch.tensor([0]), 28)
    pasted = paste_mask(small[0], box, (64, 80))
    inside = torch.zeros(64, 80, dtype=torch.bool)
    inside[max(int(box[1] + 1), 0) : int(box[3]), max(int(box[0] + 1), 0) : int(box[2])] = True
    wanted, got = mask.bool() & inside, pasted & inside
    assert (wanted & got).sum() / (wanted | got).sum() > 0.93
    shift = torch.stack(torch.where(got)).float().mean(1) - torch.stack(torch.where(wanted)).float().mean(1)
    assert shift.abs().max() < 0.4, "no half pixel is lost on the way"


def test_a_cell_is_1_from_half_coverage_on():
    mask, box = torch.zeros(2, 10, 10, dtype=torch.uint8), torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 2)
    mask[0, :4], mask[1, :6] = 1, 1
    assert masks_in_boxes(mask, box, torch.tensor([0, 1]), 1).flatten().tolist() == [0, 1]


def test_cells_are_aligned_with_pixels():
    masks = torch.zeros(2, 12, 12, dtype=torch.uint8)
    masks[1, 4:8, 2:6] = 1
    boxes = torch.tensor([[2.0, 4.0, 6.0, 8.0], [0.0, 4.0, 4.0, 8.0], [2.0, 4.0, 6.0, 8.0]])
    cells = masks_in_boxes(masks, boxes, torch.tensor([1, 1, 0]), 4)
    assert cells[0].min() == 1
    assert cells[1].tolist() == [[0, 0, 1, 1]] * 4
    assert cells[2].max() == 0
    assert masks_in_boxes(masks[:0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4, 4)


@pytest.mark.parametrize("box", [(-5.0, -3.0, 4.0, 6.0), (6.0, 7.0, 30.0, 30.0), (20.0, 0.0, 30.0, 4.0)])
def test_a_box_beyond_the_edge_is_pasted_within_the_image(box: tuple[float, float, float, float]):
    pasted = paste_mask(torch.ones(28, 28), torch.tensor(box), (10, 12))
    rows, columns = torch.arange(10)[:, None] + 0.5, torch.arange(12) + 0.5
    inside = (columns > box[0]) & (columns < box[2]) & (rows > box[1]) & (rows < box[3])
    assert (pasted & ~inside).sum() == 0
    assert (inside & ~pasted).sum() == 0


def test_an_empty_box_is_an_empty_mask():
    assert not paste_mask(torch.ones(28, 28), torch.tensor([3.0, 3.0, 3.0, 8.0]), (10, 12)).any()


def test_the_loss_uses_the_mask_of_the_true_class_and_is_zero_without_objects():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask_loss(logits, torch.ones(2, 4, 4), torch.tensor([2, 1])).backward()
    assert logits.grad is not None
    assert [bool(logits.grad[0, i].any()) for i in range(3)] == [False, False, True]
    assert [bool(logits.grad[1, i].any()) for i in range(3)] == [False, True, False]
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    assert mask_loss(empty, torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64)).item() == 0
