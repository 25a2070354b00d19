"""The loss of a set of boxes, on planted cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from finetune.heads.boxes.box_loss import BoxSetLoss, BoxTargets

BOXES = torch.tensor([[0.2, 0.3, 0.2, 0.4], [0.7, 0.6, 0.3, 0.3]])
TARGET = BoxTargets(torch.tensor([1, 0]), BOXES)


def said(loss: BoxSetLoss, *, certainty: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three queries of one image: the second object, nothing, the first."""
    boxes = torch.stack([BOXES[1], torch.full((4,), 0.5), BOXES[0]])[None]
    logits = torch.full((1, 3, loss.num_logits), -certainty)
    logits[0, 0, 0] = logits[0, 2, 1] = certainty
    if loss.classes == "ce":
        logits[0, 1, -1] = certainty
    return boxes, logits


@pytest.mark.parametrize("classes", ["focal", "ce"])
def test_the_loss_is_zero_where_every_object_is_found_whatever_the_order_of_queries(classes):
    loss = BoxSetLoss(2, classes=classes)
    assert loss([said(loss)], [TARGET])["loss"] < 1e-5


@pytest.mark.parametrize("classes", ["focal", "ce"])
def test_the_terms_are_those_of_plain_sums_over_the_pairs(classes):
    loss = BoxSetLoss(2, classes=classes)
    boxes, logits = said(loss, certainty=0.5)
    boxes = boxes + torch.tensor([0.01, -0.02, 0.0, 0.03])
    found = loss([(boxes, logits)], [TARGET])
    torch.testing.assert_close(found["l1"], torch.tensor(0.06))
    if classes == "focal":
        expected = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        torch.testing.assert_close(found["class"], sigmoid_focal_loss(logits[0], expected, reduction="sum") / 2)
    else:
        weights = torch.tensor([1.0, 1.0, 0.1])
        torch.testing.assert_close(found["class"], F.cross_entropy(logits[0], torch.tensor([0, 2, 1]), weights))
    total = 2 * found["class"] + 5 * found["l1"] + 2 * found["giou"]
    torch.testing.assert_close(found["loss"], total)


@pytest.mark.parametrize("classes", ["focal", "ce"])
def test_a_query_without_an_object_has_no_loss_in_an_ignored_region(classes):
    loss = BoxSetLoss(2, classes=classes)
    boxes, logits = said(loss, certainty=0.5)
    regions = {"at the query": [[0.5, 0.5, 0.6, 0.6]], "elsewhere": [[0.1, 0.9, 0.1, 0.1]], "nowhere": []}
    found = {name: loss([(boxes, logits)], [BoxTargets(TARGET.labels, BOXES, torch.tensor(region).reshape(-1, 4))])
             for name, region in regions.items()}  # fmt: skip
    plain = loss([(boxes, logits)], [TARGET])
    assert all(torch.equal(found[name]["loss"], plain["loss"]) for name in ("elsewhere", "nowhere"))
    louder = logits.clone()
    louder[0, 1] += 3
    region = BoxTargets(TARGET.labels, BOXES, torch.tensor(regions["at the query"]))
    assert torch.equal(loss([(boxes, louder)], [region])["loss"], found["at the query"]["loss"])
    assert loss([(boxes, louder)], [TARGET])["loss"] != plain["loss"] or classes == "ce"
    assert found["at the query"]["class"] < plain["class"]


def test_the_cost_of_a_box_grows_with_its_distance():
    loss = BoxSetLoss(1, classes="ce")
    target = BoxTargets(torch.tensor([0]), torch.tensor([[0.2, 0.5, 0.1, 0.1]]))
    costs = [
        float(loss([(torch.tensor([[[x, 0.5, 0.1, 0.1]]]), torch.zeros(1, 1, 2))], [target])["giou"])
        for x in (0.2, 0.25, 0.5, 0.9)
    ]
    assert costs == sorted(costs) and costs[0] == pytest.approx(0, abs=1e-5) and costs[-1] > 1.5


def test_images_without_objects_give_every_output_a_gradient():
    loss = BoxSetLoss(2)
    boxes, logits = (x.clone().requires_grad_() for x in said(loss, certainty=0.5))
    empty = BoxTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    found = loss([(boxes, logits)], [empty])
    found["loss"].backward()
    assert found["l1"] == found["giou"] == 0 and found["class"] > 0
    assert boxes.grad is not None and not boxes.grad.any()
    assert logits.grad is not None and logits.grad.all()


def test_objects_without_a_query_are_counted():
    loss = BoxSetLoss(2)
    boxes, logits = said(loss)
    assert loss([(boxes[:, :1], logits[:, :1])], [TARGET])["without_query"] == 1
    assert loss([(boxes, logits)], [TARGET])["without_query"] == 0


@pytest.mark.parametrize("classes", ["focal", "ce"])
def test_the_mean_over_ranks_is_the_loss_of_one_rank_whatever_each_of_them_has(classes, monkeypatch):
    """The ranks' sums are put in for them: each computes its own images with the counts of both."""
    torch.manual_seed(0)
    loss = BoxSetLoss(2, classes=classes)
    boxes, logits = torch.rand(3, 4, 4) * 0.3 + 0.2, torch.randn(3, 4, loss.num_logits)
    empty = BoxTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    targets = [TARGET, empty, BoxTargets(TARGET.labels[:1], TARGET.boxes[:1])]
    whole = loss([(boxes, logits)], targets)["loss"]
    parts, counts = (slice(0, 1), slice(1, 3)), []

    def of_ranks() -> list[torch.Tensor]:
        return [loss([(boxes[part], logits[part])], targets[part])["loss"] for part in parts]

    monkeypatch.setattr(
        "finetune.heads.boxes.box_loss.distributed.all_reduce_sum", lambda t: counts.append(t.clone()) or t
    )
    of_ranks()
    total = torch.stack(counts).sum(0)
    monkeypatch.setattr("finetune.heads.boxes.box_loss.distributed.all_reduce_sum", lambda _: total.clone())
    monkeypatch.setattr("finetune.heads.boxes.box_loss.distributed.world_size", lambda: 2)
    torch.testing.assert_close(torch.stack(of_ranks()).mean(), whole)


def test_boxes_in_pixels_become_parts_of_the_image():
    target = BoxTargets.of_pixels(torch.tensor([0]), torch.tensor([[10.0, 20.0, 30.0, 60.0]]), (80, 40))
    torch.testing.assert_close(target.boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))


def test_a_label_that_is_no_class_is_named():
    loss, target = BoxSetLoss(2), BoxTargets(torch.tensor([0, 2]), BOXES)
    with pytest.raises(ValueError, match=r"image 0 .*labels \[0, 2\].* 2 classes"):
        loss([said(loss)], [target])
