"""The loss of a set of masks, on planted cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets

SIZE = 16


def halves() -> MaskTargets:
    """Class 0 on the left, class 2 on the right."""
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    masks[0, :, : SIZE // 2] = True
    masks[1, :, SIZE // 2 :] = True
    return MaskTargets(torch.tensor([0, 2]), masks)


def right_answer(
    target: MaskTargets, *, queries: int = 4, certainty: float = 30.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one image that say the objects in reverse order, and nothing in the other queries."""
    masks = torch.full((1, queries, SIZE, SIZE), -certainty)
    classes = torch.zeros(1, queries, 4)
    classes[..., 3] = certainty
    for query, (label, mask) in enumerate(zip(target.labels.flip(0), target.masks.flip(0), strict=True)):
        masks[0, query][mask] = certainty
        classes[0, query] = F.one_hot(label, 4) * certainty
    return masks, classes


def test_the_loss_is_zero_where_every_object_is_found_whatever_the_order_of_queries():
    """One mask is the whole image and one is empty: at edges, logits are interpolated sharper than masks."""
    target = MaskTargets(torch.tensor([0, 2]), torch.stack([torch.ones(SIZE, SIZE), torch.zeros(SIZE, SIZE)]).bool())
    found = MaskSetLoss(3, num_points=64)([right_answer(target)], [target], torch.tensor([[0.2, 0.6]]))
    assert found["loss"] < 1e-5


def test_masks_are_matched_within_one_class():
    target = MaskTargets(torch.tensor([1, 1]), halves().masks)
    loss, shift = MaskSetLoss(3, num_points=256), torch.tensor([[0.2, 0.6]])
    masks, classes = right_answer(target)
    right = loss([(masks, classes)], [target], shift)
    assert right["mask"] < 1 and right["dice"] < 0.2
    assert loss([(-masks[:, [2, 3, 0, 1]], classes)], [target], shift)["loss"] > right["loss"] + 10


def test_a_missed_object_costs():
    loss, target = MaskSetLoss(3, num_points=64), halves()
    masks, classes = right_answer(target)
    classes[0, 1] = F.one_hot(torch.tensor(3), 4) * 30.0
    assert loss([(masks, classes)], [target], torch.zeros(1, 2))["class"] > 1


def test_on_the_centers_of_all_pixels_it_is_the_loss_of_pixels():
    """Equal to plain sums over pixels, where the masks are of one value in each quarter and points meet no edge."""
    torch.manual_seed(0)
    coarse, classes = torch.randn(1, 5, 1, 1), torch.randn(1, 5, 4)
    target = MaskTargets(torch.tensor([1]), torch.ones(1, SIZE, SIZE))
    found = MaskSetLoss(3, num_points=32)([(coarse, classes)], [target], torch.rand(1, 2))
    cost = 5 * F.softplus(-coarse.flatten()) + 2 * -classes[0].softmax(-1)[:, 1]
    cost = cost + 5 * (1 - (2 * 32 * coarse.flatten().sigmoid() + 1) / (32 * coarse.flatten().sigmoid() + 32 + 1))
    chosen = int(cost.argmin())
    torch.testing.assert_close(found["mask"], F.softplus(-coarse[0, chosen, 0, 0]))
    expected = torch.full((5,), 3)
    expected[chosen] = 1
    weights = torch.tensor([1.0, 1.0, 1.0, 0.1])
    torch.testing.assert_close(found["class"], F.cross_entropy(classes[0], expected, weights))


def test_every_supervised_layer_counts_and_the_last_is_logged():
    loss, target, shift = MaskSetLoss(3, num_points=64), halves(), torch.zeros(1, 2)
    torch.manual_seed(0)
    first, last = ((torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4)) for _ in range(2))
    both, one, other = (loss(layers, [target], shift) for layers in ([first, last], [first], [last]))
    torch.testing.assert_close(both["loss"], one["loss"] + other["loss"])
    assert both["dice"] == other["dice"]


def test_predictions_in_unknown_pixels_cost_nothing():
    known = torch.ones(SIZE, SIZE, dtype=torch.bool)
    known[:, 4:8] = False
    loss, shift = MaskSetLoss(3, num_points=256, important=0.0), torch.tensor([[0.3, 0.1]])
    masks, classes = right_answer(halves())
    wrong = masks.clone()
    wrong[0, 1, :, 5:7] *= -1  # further in than interpolation sees from outside
    target = MaskTargets(halves().labels, halves().masks, known)
    right, there = (loss([(said, classes)], [target], shift) for said in (masks, wrong))
    assert right["mask"] == there["mask"] and right["dice"] == there["dice"]
    assert loss([(wrong, classes)], [halves()], shift)["mask"] > right["mask"] + 1


def test_images_without_objects_give_every_logit_a_gradient():
    masks, classes = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    empty = MaskTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, SIZE, SIZE))
    found = MaskSetLoss(3, num_points=16)([(masks, classes)], [empty, empty], torch.zeros(2, 2))
    found["loss"].backward()
    assert found["mask"] == found["dice"] == 0 and torch.isfinite(found["loss"])
    assert masks.grad is not None and not masks.grad.any()
    assert classes.grad is not None and classes.grad.any()


def test_objects_without_a_query_are_counted():
    masks, classes = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 4)
    found = MaskSetLoss(3, num_points=16)([(masks, classes)], [halves()], torch.zeros(1, 2))
    assert torch.isfinite(found["loss"]) and found["without_query"] == 1
    assert MaskSetLoss(3, num_points=16)([right_answer(halves())], [halves()], torch.zeros(1, 2))["without_query"] == 0


def test_the_mean_over_ranks_is_the_loss_of_one_rank_whatever_each_of_them_has(monkeypatch):
    """The ranks' sums are put in for them: each computes its own images with the counts of both."""
    torch.manual_seed(0)
    masks, classes, shifts = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 4), torch.rand(3, 2)
    empty = MaskTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, SIZE, SIZE))
    targets, loss = (
        [halves(), empty, MaskTargets(halves().labels[:1], halves().masks[:1])],
        MaskSetLoss(3, num_points=64),
    )
    whole = loss([(masks, classes)], targets, shifts)["loss"]
    parts, counts = (slice(0, 1), slice(1, 3)), []

    def of_ranks() -> list[torch.Tensor]:
        return [loss([(masks[part], classes[part])], targets[part], shifts[part])["loss"] for part in parts]

    monkeypatch.setattr(
        "finetune.heads.queries.mask_loss.distributed.all_reduce_sum", lambda t: counts.append(t.clone()) or t
    )
    of_ranks()
    total = torch.stack(counts).sum(0)
    monkeypatch.setattr("finetune.heads.queries.mask_loss.distributed.all_reduce_sum", lambda _: total.clone())
    monkeypatch.setattr("finetune.heads.queries.mask_loss.distributed.world_size", lambda: 2)
    torch.testing.assert_close(torch.stack(of_ranks()).mean(), whole)


def test_a_label_that_is_no_class_is_named():
    target = MaskTargets(torch.tensor([0, 3]), halves().masks)
    with pytest.raises(ValueError, match=r"image 0 .*labels \[0, 3\].* 3 classes"):
        MaskSetLoss(3)([right_answer(halves())], [target], torch.zeros(1, 2))


def test_masks_in_unknown_pixels_do_not_change_the_loss():
    torch.manual_seed(0)
    valid = torch.ones(16, 16, dtype=torch.bool)
    valid[8:] = False
    one = torch.zeros(1, 16, 16, dtype=torch.bool)
    one[:, 2:6, 2:9] = True
    other = one.clone()
    other[:, 9:] = True
    predicted, labels = [(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 3))], torch.tensor([1])
    loss, shifts = MaskSetLoss(2, num_points=64), torch.rand(1, 2)
    first, second = (loss(predicted, [MaskTargets(labels, masks, valid)], shifts) for masks in (one, other))
    # A point may lie between a known pixel and an unknown one.
    assert first["loss"].item() == pytest.approx(second["loss"].item(), rel=0.02)
    known = loss(predicted, [MaskTargets(labels, other)], shifts)
    assert abs(known["loss"].item() - first["loss"].item()) > 0.1 * first["loss"].item()


def test_a_class_map_is_a_mask_for_every_class_in_it_and_void_is_unknown():
    class_map = torch.tensor([[4, 4, 255], [0, 4, 0]], dtype=torch.uint8)
    target = MaskTargets.of_class_map(class_map)
    assert target.labels.tolist() == [0, 4] and target.valid is not None
    assert target.masks.int().tolist() == [[[0, 0, 0], [1, 0, 1]], [[1, 1, 0], [0, 1, 0]]]
    assert target.valid.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert MaskTargets.of_class_map(torch.full((2, 2), 255)).labels.numel() == 0
