from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou, roi_align
from torchvision.ops.poolers import initLevelMapper

from finetune.dense.build import dense_backbone
from finetune.heads.boxes.anchors import Anchors
from finetune.heads.boxes.box_masks import paste_mask
from finetune.heads.boxes.cascade import THRESHOLDS, WEIGHTS, CascadeRoIHeads
from finetune.heads.boxes.ignored import beyond_borders, inside
from finetune.heads.boxes.rcnn import RCNN, RCNNSizes
from finetune.heads.boxes.roi_heads import BoxHead, RoIHeads, RoISizes, box_losses
from finetune.heads.boxes.roi_pool import RoIPool
from pretrain.models.backbones.vit import ViT

SMALL = RoISizes(batch=32, box_convs=0, box_dim=64, mask_convs=1, score_threshold=0.3)
SIZES = RCNNSizes(channels=32, scales=(2, 1, 0.5), rpn_convs=1, before_nms=(100, 50), proposals=(50, 25), roi=SMALL)


def boxes(count: int, side: float = 200.0, *, smallest: float = 2.0) -> Tensor:
    corners, sizes = torch.rand(count, 2) * side, torch.rand(count, 2) * side + smallest
    return torch.cat([corners, corners + sizes], dim=1)


def test_anchors_equal_torchvisions_for_whole_strides_and_are_exact_for_others():
    images = ImageList(torch.zeros(2, 3, 128, 96), [(128, 96), (100, 90)])
    maps = [torch.zeros(2, 8, 32, 24), torch.zeros(2, 8, 16, 12)]
    theirs = AnchorGenerator(((16,), (64,)), ((0.5, 1.0, 2.0),) * 2)(images, maps)
    ours = Anchors((16, 64), (0.5, 1.0, 2.0), (4, 8))(images, maps)
    assert len(ours) == 2
    torch.testing.assert_close(ours[1], theirs[1])
    of_bf16 = Anchors((16, 64), (0.5, 1.0, 2.0), (4, 8))(images, [level.bfloat16() for level in maps])
    torch.testing.assert_close(of_bf16[0], ours[0])
    of_patch_14 = ImageList(torch.zeros(1, 3, 98, 98), [(98, 98)])
    (one,) = Anchors((16,), (1.0,), (3.5,))(of_patch_14, [torch.zeros(1, 8, 28, 28)])
    centres = (one[:, :2] + one[:, 2:]) / 2
    assert centres.max() == 27 * 3.5
    with pytest.raises(ValueError, match="2 anchor sizes for 1 levels"):
        Anchors((16, 32), (1.0,), (4,))


def test_boxes_are_read_from_the_levels_that_torchvision_chooses():
    torch.manual_seed(0)
    some = boxes(300, 600)
    ours = RoIPool((4, 8, 16, 32), 7).levels(some)
    assert ours.tolist() == initLevelMapper(2, 5)([some]).tolist()
    assert set(ours.tolist()) == {0, 1, 2, 3}
    fine = RoIPool((2, 4, 8), 7).levels(torch.tensor([[0.0, 0, 20, 20], [0, 0, 60, 60], [0, 0, 200, 200]]))
    assert fine.tolist() == [0, 1, 2]


def test_pooled_features_are_those_of_each_box_at_its_level_in_the_order_of_the_boxes():
    torch.manual_seed(0)
    pool = RoIPool((3.5, 7), 5)
    features = {"0": torch.randn(2, 4, 40, 40), "1": torch.randn(2, 4, 20, 20), "2": torch.randn(2, 4, 10, 10)}
    some = [boxes(6, 60), torch.cat([boxes(3, 10), boxes(3, 120)])]
    got = pool(features, some, [(140, 140)] * 2)
    assert got.shape == (12, 4, 5, 5)
    of_images = [(image, box) for image in (0, 1) for box in some[image]]
    for i, (image, box) in enumerate(of_images):
        level = int(pool.levels(box[None]))
        stride = (3.5, 7)[level]
        roi = torch.cat([torch.tensor([float(image)]), box])[None]
        expected = roi_align(features[str(level)], roi, 5, 1 / stride, sampling_ratio=2, aligned=True)
        torch.testing.assert_close(got[i], expected[0])
    assert pool(features, [boxes(0), boxes(0)], [(140, 140)] * 2).shape == (0, 4, 5, 5)


def test_a_ramp_is_read_without_an_offset():
    ramp = (torch.arange(32.0) + 0.5) * 4
    features = {"0": ramp.expand(1, 1, 32, 32)}
    pooled = RoIPool((4,), 4)(features, [torch.tensor([[20.0, 20, 60, 60]])], [(128, 128)])
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([25.0, 35, 45, 55]))


def test_box_losses_are_torchvisions():
    torch.manual_seed(0)
    logits, deltas = torch.randn(20, 4), torch.randn(20, 4, 4)
    labels, targets = torch.randint(0, 4, (20,)), torch.randn(20, 4)
    expected = fastrcnn_loss(logits, deltas.flatten(1), [labels], [targets])
    torch.testing.assert_close(box_losses(logits, deltas, labels, targets), expected)
    agnostic = deltas[:, :1].expand(-1, 4, -1).flatten(1)
    _, by_box = box_losses(logits, deltas[:, :1], labels, targets)
    torch.testing.assert_close(by_box, fastrcnn_loss(logits, agnostic, [labels], [targets])[1])
    nothing = box_losses(logits[:0], deltas[:0], labels[:0], targets[:0])
    assert [float(loss) for loss in nothing] == [0.0, 0.0]


def test_detections_are_those_that_torchvision_selects():
    torch.manual_seed(0)
    ours = RoIHeads(8, (4,), 3, RoISizes(box_convs=0, score_threshold=0.2, detections=7), masks=False)
    proposals, shapes = [boxes(30, 60), boxes(20, 60)], [(100, 90), (80, 110)]
    logits, deltas = torch.randn(50, 4) * 2, torch.randn(50, 16) * 0.3
    expected = TorchvisionRoIHeads.postprocess_detections(ours, logits, deltas, proposals, shapes)
    decoded = ours.box_coder.decode(deltas, proposals)
    found = ours.select(decoded, logits.softmax(-1), [30, 20], shapes)
    for i, one in enumerate(found):
        assert len(one["boxes"]) == 7
        for name, theirs in zip(("boxes", "scores", "labels"), expected, strict=True):
            torch.testing.assert_close(one[name], theirs[i])


def test_cascade_assigns_by_the_overlap_of_its_stage():
    heads = CascadeRoIHeads(8, (4,), 2, SMALL, masks=False)
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    widths = torch.tensor([5.5, 6.5, 7.5, 10.0])
    some = torch.stack([torch.zeros(4), torch.zeros(4), widths, torch.full((4,), 10.0)], dim=1)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for stage, expected in ((0, [2, 2, 2, 2]), (1, [0, 2, 2, 2]), (2, [0, 0, 2, 2])):
        labels, deltas = heads._assign(stage, [some, some], [truth, empty])
        assert labels[0].tolist() == expected and labels[1].tolist() == [0] * 4
        back = BoxCoder(WEIGHTS[stage]).decode(deltas[0], [some])[:, 0]
        torch.testing.assert_close(back, truth["boxes"].expand(4, -1), atol=1e-4, rtol=1e-4)
        assert deltas[1].abs().max() < 1e-5


def test_cascade_refines_boxes_stage_by_stage_and_averages_the_scores():
    heads = CascadeRoIHeads(8, (4,), 2, RoISizes(box_convs=0, box_dim=4, score_threshold=0.0, nms=1.0), masks=False)
    for stage, head in enumerate(cast(list[BoxHead], list(heads.box_heads))):
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
            head.classes.bias.copy_(torch.tensor([0.0, stage, -stage]))
            head.deltas.bias.copy_(torch.tensor([WEIGHTS[stage][0] * 0.1, 0, 0, 0]))
    heads.eval()
    (found,), _ = heads({"0": torch.zeros(1, 8, 32, 32)}, [torch.tensor([[10.0, 20, 30, 40]])], [(128, 128)])
    scores = torch.stack([torch.tensor([0.0, s, -s]).softmax(0) for s in range(3)]).mean(0)
    torch.testing.assert_close(found["scores"], scores[1:])
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["boxes"], torch.tensor([[16.0, 20, 36, 40]] * 2))
    assert len(THRESHOLDS) == len(heads.box_heads) == 3


def test_each_cascade_stage_gives_a_third_of_its_gradient_and_none_to_boxes(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    heads = CascadeRoIHeads(8, (4,), 2, SMALL, masks=False)
    level, some, shape = torch.randn(1, 8, 32, 32, requires_grad=True), [boxes(4, 60)], [(128, 128)]
    gradients = []
    for training in (True, False):
        logits, deltas = heads.train(training)._read(0, {"0": level}, some, shape)
        gradients.append(torch.autograd.grad(logits.sum() + deltas.sum(), level)[0])
    torch.testing.assert_close(gradients[0] * 3, gradients[1])
    moved, refine = [], heads._refine
    monkeypatch.setattr(heads, "_refine", lambda *given: (moved.append(given[1].requires_grad), refine(*given))[1])
    target = {"boxes": some[0][:1], "labels": torch.tensor([1])}
    labels, deltas = heads.train()._assign(0, some, [target])
    heads._box_losses({"0": level}, some, labels, deltas, shape, [target])
    assert moved == [False, False]


def scene() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One image with a bright and a dark rectangle, one without objects."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 96, 80) * 0.1
    masks = torch.zeros(2, 96, 80, dtype=torch.uint8)
    masks[0, 8:40, 16:60], masks[1, 56:88, 24:52] = 1, 1
    images[0] += 2.0 * masks[0] - 2.0 * masks[1]
    objects = torch.tensor([[16.0, 8, 60, 40], [24, 56, 52, 88]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, [
        {"boxes": objects, "labels": torch.tensor([1, 2]), "masks": masks},
        {**nothing, "masks": torch.zeros(0, 96, 80, dtype=torch.uint8)},
    ]


def model(**options: Any) -> tuple[Any, RCNN]:
    torch.manual_seed(0)
    backbone = dense_backbone(ViT((64, 64), 8, 3, 48, 2, 4, **options.pop("vit", {})), norm=False)
    return backbone, RCNN(backbone, 2, sizes=SIZES, **options)


@pytest.mark.slow
@pytest.mark.parametrize("cascade", [False, True])
def test_masks_and_boxes_of_two_images_are_overfitted(cascade: bool):
    backbone, rcnn = model(cascade=cascade)
    images, targets = scene()
    parameters = [p for p in (*backbone.parameters(), *rcnn.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 2e-3)
    for step in range(75):
        losses = rcnn.losses(backbone, images, targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            assert all(p.grad is not None for p in parameters), "DDP waits for every gradient"
        optimizer.step()
    backbone.eval()
    rcnn.eval()
    with torch.no_grad():
        found, nothing = rcnn.predict(backbone, images)
    assert len(nothing["boxes"]) == 0
    for label in (1, 2):
        (best, *_) = torch.where(found["labels"] == label)[0].tolist()
        assert box_iou(found["boxes"][best][None], targets[0]["boxes"][label - 1][None]) > 0.75
        pasted, truth = paste_mask(found["masks"][best], found["boxes"][best], (96, 80)), targets[0]["masks"][label - 1]
        assert (pasted & truth.bool()).sum() / (pasted | truth.bool()).sum() > 0.7


def test_a_box_is_inside_a_region_by_half_of_its_own_area():
    regions = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    some = torch.tensor(
        [[5.0, 0, 15, 10], [6, 0, 16, 10], [2, 2, 3, 3], [0, 0, 100, 100], [52, 40, 58, 60], [1, 1, 1, 5]]
    )
    assert inside(some, regions).tolist() == [True, False, True, False, True, False]
    assert inside(some, regions[:0]).tolist() == [False] * 6
    anchors = torch.tensor([[-90.0, 0, 10, 10], [0, 0, 10, 90], [55, -90, 56, 60]])
    assert inside(anchors, beyond_borders(regions, (60, 60))).tolist() == [True, False, False]


@pytest.mark.parametrize("cascade", [False, True])
def test_in_ignored_regions_nothing_is_background(cascade: bool):
    backbone, rcnn = model(cascade=cascade)
    images, targets = scene()
    whole = torch.tensor([[0.0, 0, 80, 96]])
    losses = rcnn.losses(backbone, images[1:], [{**targets[1], "ignored": whole}])
    assert losses["loss"] == 0 and all(value == 0 for value in losses.values())
    losses["loss"].backward()
    missing = {n for n, p in rcnn.named_parameters() if p.requires_grad and (p.grad is None or p.grad.any())}
    assert not missing, "every gradient is there, for DDP, and zero"
    known, ignoring = (rcnn.losses(backbone, images[:1], [{**targets[0], **more}]) for more in ({}, {"ignored": whole}))
    boxes = "loss_box_reg_0" if cascade else "loss_box_reg"
    assert ignoring[boxes] > 0 and ignoring["loss_objectness"] > 0, "objects are trained in ignored regions too"
    assert ignoring["loss_objectness"] != known["loss_objectness"]


def test_a_region_that_ignores_nothing_changes_nothing():
    images, targets = scene()
    found = []
    for more in ({}, {"ignored": torch.zeros(0, 4)}, {"ignored": torch.tensor([[200.0, 200, 210, 210]])}):
        backbone, rcnn = model(cascade=True)
        found.append(rcnn.losses(backbone, images, [{**target, **more} for target in targets]))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_images_without_objects_train_every_parameter():
    backbone, rcnn = model()
    images, targets = scene()
    losses = rcnn.losses(backbone, images[1:], targets[1:])
    losses["loss"].backward()
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0
    missing = {n for n, p in rcnn.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert missing == set()


def test_the_seed_of_torch_repeats_the_samples():
    backbone, rcnn = model()
    images, targets = scene()
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        totals.append(float(rcnn.losses(backbone, images, targets)["loss"].detach()))
    assert totals[0] == totals[1] != totals[2]


def test_boxes_stay_within_the_image_not_only_within_its_padding():
    backbone, rcnn = model(masks=False)
    backbone.eval()
    rcnn.eval()
    rcnn.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = rcnn.predict(backbone, scene()[0], sizes=[(50, 40), (96, 80)])
    for one, (height, width) in zip(found, [(50, 40), (96, 80)], strict=True):
        assert len(one["boxes"]) and "masks" not in one
        assert one["boxes"].min() >= 0
        assert one["boxes"][:, 2].max() <= width and one["boxes"][:, 3].max() <= height


def test_coordinates_stay_fp32_under_autocast():
    backbone, rcnn = model()
    images, targets = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = rcnn.losses(backbone, images, targets)
        losses["loss"].backward()
        backbone.eval()
        rcnn.eval()
        rcnn.roi_heads.score_thresh = 0.0
        with torch.no_grad():
            found = rcnn.predict(backbone, images)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert {value.dtype for value in found[0].values()} == {torch.float32, torch.int64}


def test_vitdets_sizes_are_the_defaults():
    with torch.device("meta"):
        rcnn = RCNN(dense_backbone(ViT((64, 64), 16, 3, 768, 1, 12), norm=False), 80)
    assert rcnn.neck.strides == [4, 8, 16, 32]
    assert rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    for part, batch, objects, overlaps in ((rcnn.rpn, 256, 0.5, (0.7, 0.3)), (rcnn.roi_heads, 512, 0.25, (0.5, 0.5))):
        sampler, matcher = part.fg_bg_sampler, part.proposal_matcher
        assert (sampler.batch_size_per_image, sampler.positive_fraction) == (batch, objects)
        assert (matcher.high_threshold, matcher.low_threshold) == overlaps
    count = sum(p.numel() for n, p in rcnn.named_parameters() if n.startswith("roi_heads.box_head."))
    convs, fc = 4 * (256 * 256 * 9 + 512), 256 * 49 * 1024 + 1024
    assert count == convs + fc + 1024 * 81 + 81 + 1024 * 324 + 324
