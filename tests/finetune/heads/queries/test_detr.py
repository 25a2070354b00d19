"""The decoder of boxes: where its queries start and look, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.dense.plain import PlainDense
from finetune.heads.boxes.box_loss import BoxSetLoss
from finetune.heads.queries.detr import DETR, best_pairs
from finetune.heads.queries.query_decoder import BoxBias, QueryDecoder, grid_centers, sine_of
from pretrain.models.backbones.vit import ViT


def small(*, classes: int = 2, depth: int = 2) -> tuple[PlainDense, DETR]:
    torch.manual_seed(0)
    dense = PlainDense(ViT((32, 32), 8, embed_dim=32, depth=2, num_heads=2))
    decoder = QueryDecoder(32, classes, num_queries=12, width=32, depth=depth, num_heads=4)
    return dense, DETR(decoder, BoxSetLoss(classes))


def test_queries_start_from_boxes_all_over_the_image():
    _, head = small()
    boxes, logits = head.decoder(torch.randn(1, 32, 4, 4))[0]
    cells = (boxes[0, :, :2] * 2).long()
    assert set(map(tuple, cells.tolist())) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    torch.testing.assert_close(boxes[0, :, 2:], torch.full((12, 2), 0.2))
    assert (logits.sigmoid() < 0.05).all()


def test_a_layer_starts_from_the_previous_boxes_without_a_gradient_to_them():
    _, head = small(depth=3)
    given: list[torch.Tensor] = []
    for layer in head.decoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[4]))
    torch.nn.init.normal_(head.decoder.correct[-1].weight)  # pyright: ignore
    outputs = head.decoder(torch.randn(1, 32, 4, 4))
    assert [boxes.requires_grad for boxes in given] == [True, False, False]
    assert all(boxes.equal(before) for boxes, (before, _) in zip(given[1:], outputs, strict=False))


def test_boxes_are_parts_of_the_canvas_and_return_in_pixels_of_the_original():
    _, head = small()
    boxes, logits = torch.tensor([[[0.25, 0.5, 0.1, 0.2]]]), torch.tensor([[[5.0, -5.0]]])
    sizes: dict[str, Any] = {"covered": (32, 64), "contents": [(24, 48)], "sizes": [(48, 96)]}
    (found,) = head.detections(boxes, logits, **sizes, max_detections=1)
    torch.testing.assert_close(torch.from_numpy(found.boxes), torch.tensor([[25.6, 25.6, 38.4, 38.4]]))
    assert found.labels.tolist() == [1]


def test_centers_of_a_grid_are_columns_and_rows_in_parts_of_the_image():
    assert grid_centers((1, 2)).tolist() == [[0.25, 0.5], [0.75, 0.5]]


def test_nearby_positions_have_nearby_codes():
    code = sine_of(torch.tensor([[0.5, 0.5], [0.51, 0.5], [0.7, 0.5]]), 32)
    assert code.shape == (3, 64)
    assert (code[0] - code[1]).norm() < (code[0] - code[2]).norm()


def test_the_bias_of_attention_is_a_part_by_column_and_a_part_by_row():
    """Equal to the networks applied to the distances of every single place, one at a time."""
    torch.manual_seed(0)
    bias = BoxBias(3)
    boxes, grid = torch.rand(2, 5, 4), (3, 4)
    found = bias(boxes, grid)
    assert found.shape == (2, 3, 5, 12)
    x, y, width, height = boxes[1, 2].tolist()
    for row, column in ((0, 0), (2, 3), (1, 2)):
        at_x, at_y = (column + 0.5) / 4, (row + 0.5) / 3

        def log(distance: float) -> float:
            value = torch.tensor(distance * 8.0)
            return float(value.sign() * torch.log2(value.abs() + 1) / 3)

        across = bias.columns(torch.tensor([log(x - width / 2 - at_x), log(x + width / 2 - at_x)]))
        down = bias.rows(torch.tensor([log(y - height / 2 - at_y), log(y + height / 2 - at_y)]))
        torch.testing.assert_close(found[1, :, 2, row * 4 + column], across + down)


def test_every_parameter_gets_a_gradient_also_of_images_without_objects():
    dense, head = small()
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    head.losses(dense, torch.randn(2, 3, 32, 32), [empty, empty])["loss"].backward()
    for name, parameter in [*dense.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None or not parameter.requires_grad, name


def test_boxes_are_returned_in_the_original_image():
    """What is not padding is 16 x 32 of 32 x 32 pixels, shown from an original of 80 x 160."""
    _, head = small()
    boxes = torch.tensor([[[0.5, 0.25, 1.0, 0.5], [0.25, 0.125, 0.5, 0.25], [0.9, 0.9, 0.4, 0.4]]])
    logits = torch.tensor([[[-9.0, 3.0], [2.0, -9.0], [-9.0, -9.0]]])
    sizes: dict[str, Any] = {"covered": (32, 32), "contents": [(16, 32)], "sizes": [(80, 160)]}
    (found,) = head.detections(boxes, logits, **sizes, max_detections=3)
    assert found.boxes[:2].tolist() == [[0, 0, 160, 80], [0, 0, 80, 40]]
    assert found.labels[:2].tolist() == [2, 1] and found.scores[0] > found.scores[1] > 0.8 > found.scores[2]
    assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= [160, 80]).all()


def test_boxes_are_parts_of_the_padded_image():
    assert small()[0].covered(torch.randn(1, 3, 30, 20)) == (32, 24)


def test_the_best_pairs_may_contain_a_query_twice():
    scores, queries, classes = best_pairs(torch.tensor([[0.1, 0.9], [0.8, 0.85]]), 3)
    assert scores.tolist() == pytest.approx([0.9, 0.85, 0.8])
    assert queries.tolist() == [0, 1, 1] and classes.tolist() == [1, 1, 0]


def test_an_invalid_width_is_refused():
    with pytest.raises(ValueError, match="width 36"):
        QueryDecoder(32, 2, width=36, num_heads=4)


@pytest.mark.slow
def test_two_images_are_overfitted():
    dense, head = small()
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 4:20, 4:14], images[0, 1, 8:18, 18:30], images[1, 1, 16:30, 2:16] = 1.0, 1.0, 1.0
    scenes = [([1, 2], [[4, 4, 14, 20], [18, 8, 30, 18]]), ([2], [[2, 16, 16, 30]])]
    targets = [{"labels": torch.tensor(labels), "boxes": torch.tensor(boxes).float()} for labels, boxes in scenes]
    optimizer = torch.optim.AdamW([p for m in (dense, head) for p in m.parameters() if p.requires_grad], 2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        head.losses(dense, images, targets)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        whole = [(32, 32)] * 2
        found = head.detections(*head(dense, images)[-1], covered=(32, 32), contents=whole, sizes=whole)
    for one, target in zip(found, targets, strict=True):
        count = len(target["labels"])
        assert sorted(one.labels[:count].tolist()) == target["labels"].tolist()
        assert one.scores[count - 1] > 0.5 > 2 * one.scores[count]
        for label, box in zip(target["labels"].tolist(), target["boxes"].numpy(), strict=True):
            said = one.boxes[:count][one.labels[:count] == label][0]
            assert abs(said - box).max() < 3
