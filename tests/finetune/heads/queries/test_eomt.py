"""Queries in the last blocks of a plain ViT: what they attend to, what they give up, and that they learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.data.coco import rle
from finetune.dense.build import dense_backbone
from finetune.dense.plain import PlainDense
from finetune.heads.queries import mask_instances
from finetune.heads.queries.eomt import EoMT, masked_share
from finetune.heads.queries.mask_instances import instances
from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT


def small(*, classes: int = 2, num_blocks: int = 2, masked: bool = True, **options: object) -> tuple[PlainDense, EoMT]:
    torch.manual_seed(0)
    given: dict[str, Any] = {"num_registers": 1} | options
    vit = ViT((32, 32), 8, embed_dim=32, depth=3, num_heads=2, **given)
    dense = PlainDense(vit)
    loss = MaskSetLoss(classes, num_points=128)
    return dense, EoMT(dense, loss, num_queries=6, num_blocks=num_blocks, masked_attention=masked)


def uniforms(head: EoMT, batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, head.noise, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"pos_embed": "rope"}, {"pos_embed": "none", "rel_pos_bias": "shared"}])
def test_masks_have_a_quarter_of_the_image_size_and_classes_include_no_object(options):
    dense, head = small(**options)
    for height, width in ((32, 32), (48, 24)):
        masks, classes = head.predict(dense, torch.randn(2, 3, height, width))
        assert masks.shape == (2, 6, height // 4, width // 4) and classes.shape == (2, 6, 3)
    masks, _ = head.predict(dense, torch.randn(1, 3, 30, 45))
    assert masks.shape == (1, 6, 30, 45)
    assert head.class_scores(dense, torch.randn(1, 3, 30, 45)).shape == (1, 2, 30, 45)


def test_masked_attention_is_annealed_block_by_block():
    assert masked_share(0.0, 4) == [1.0] * 4
    assert masked_share(1 / 6, 4) == pytest.approx([1, 1, 1, 1])
    assert masked_share(1.5 / 6, 4) == pytest.approx([0.5**0.9, 1, 1, 1])
    assert masked_share(3 / 6, 4) == pytest.approx([0, 0, 1, 1])
    assert masked_share(5 / 6, 4) == pytest.approx([0] * 4)
    assert masked_share(1.0, 4) == [0.0] * 4
    assert masked_share(3 / 6, 3) == pytest.approx([0, 0.5**0.9, 1])
    assert masked_share(0.9, 1) == [0.0]


def test_a_query_with_an_empty_mask_attends_to_no_patch():
    dense, head = small(num_blocks=1, class_token=False, num_registers=0)
    for parameter in head.mask_mlp[-1].parameters():
        torch.nn.init.zeros_(parameter)  # logits of 0: no patch is above
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        blind = head.eval()(dense, images)[-1][1]
        head.mask_probability.zero_()
        seeing = head.eval()(dense, images)[-1][1]
    torch.testing.assert_close(blind[0], blind[1])
    assert (seeing[0] - seeing[1]).abs().max() > 1e-3


def test_queries_are_masked_where_their_random_number_is_below_the_share():
    dense, head = small(num_blocks=1, class_token=False, num_registers=0)
    for parameter in head.mask_mlp[-1].parameters():
        torch.nn.init.zeros_(parameter)
    head.mask_probability.fill_(0.5)
    drawn = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.6, 0.0]).expand(2, 1, 6)
    x, grid = dense.prepare(torch.randn(2, 3, 32, 32))
    mask = head._attention_mask(torch.zeros(2, 6, 8, 8), grid, 6 + x.shape[1], 0, drawn)[0, 0]
    assert mask[:6, 6:].any(1).tolist() == [False, True, False, True, True, False]
    assert mask[:6, :6].all() and mask[6:].all()


def test_without_masked_attention_only_the_result_is_supervised():
    dense, head = small(masked=False)
    assert len(head.train()(dense, torch.randn(1, 3, 32, 32))) == 1
    dense, head = small()
    assert len(head.train()(dense, torch.randn(1, 3, 32, 32))) == 3
    head.mask_probability.zero_()
    assert len(head.train()(dense, torch.randn(1, 3, 32, 32))) == 3
    assert len(head.eval()(dense, torch.randn(1, 3, 32, 32))) == 1


def test_every_parameter_gets_a_gradient_also_of_images_without_objects():
    dense, head = small()
    empty = MaskTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    head.losses(dense, images, [empty, empty], fraction=0.4, uniforms=uniforms(head, 2))["loss"].backward()
    for name, parameter in [*dense.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None or not parameter.requires_grad, name


def test_the_loss_of_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    dense, head = small()
    images, target = torch.randn(2, 3, 32, 32), _scene([(4, 4, 20, 12, 0), (10, 16, 30, 30, 1)])[1]
    noise, targets = uniforms(head, 2), [_targets(target)] * 2
    both = head.losses(dense, images, targets, fraction=0.5, uniforms=noise)["loss"]
    alone = [
        head.losses(dense, images[i : i + 1], targets[:1], fraction=0.5, uniforms=noise[i : i + 1])["loss"]
        for i in (0, 1)
    ]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_the_last_blocks_read_their_own_numbers_of_the_drop_path(monkeypatch: pytest.MonkeyPatch):
    dense, head = small(drop_path_rate=0.1)
    drop, read, block = torch.rand(2, 3, 2), [], dense.block
    monkeypatch.setattr(
        dense,
        "block",
        lambda index, *given, **more: (read.append((index, more["drop"])), block(index, *given, **more))[1],
    )
    head.train()(dense.train(), torch.randn(2, 3, 32, 32), drop=drop, uniforms=torch.rand(2, 2, 6))
    assert [index for index, _ in read] == [1, 2] and all(given.equal(drop[:, index]) for index, given in read)


def test_backbones_that_cannot_take_queries_are_refused_by_name():
    vit = ViT((32, 32), 8, embed_dim=32, depth=3, num_heads=2)
    with pytest.raises(ValueError, match="num_blocks 4, but the backbone has 3 blocks"):
        EoMT(PlainDense(vit), MaskSetLoss(2))
    with pytest.raises(ValueError, match="last block"):
        EoMT(PlainDense(vit, indices=(1,)), MaskSetLoss(2), num_blocks=1)
    with pytest.raises(ValueError, match=r"blocks \[1\] attend within windows"):
        EoMT(PlainDense(vit, window=2, global_blocks=(0, 2)), MaskSetLoss(2), num_blocks=2)
    convnext = dense_backbone(TimmBackbone("test_convnext", (64, 64)))
    with pytest.raises(ValueError, match="a TimmDense cannot be computed block by block: a plain ViT is needed"):
        EoMT(convnext.blockwise(), MaskSetLoss(2))


def test_instances_are_returned_in_the_original_image():
    """A mask on the left half of what is not padding is the left half of the original."""
    masks = torch.full((1, 2, 16, 16), -20.0)
    masks[0, 1, :, :4] = 20.0  # what is not padding is 8 wide
    classes = torch.tensor([[[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]]])
    found = instances(masks, classes, canvas=(64, 64), contents=[(32, 32)], sizes=[(100, 200)], max_detections=2)[0]
    assert found.labels[0] == 2 and found.scores[0] > 0.99 and found.masks is not None
    mask = rle.decode(found.masks[:1], (100, 200))[0]
    assert mask[:, :98].all() and not mask[:, 102:].any()
    np.testing.assert_allclose(found.boxes[0], [0, 0, 100, 100], atol=2)
    assert all(mask["size"] == [100, 200] for mask in found.masks)
    nothing = instances(masks[:, :1], classes[:, :1], canvas=(64, 64), contents=[(32, 32)], sizes=[(10, 10)])[0]
    assert nothing.boxes.shape == (0, 4) and nothing.masks == []


def test_masks_are_resized_to_a_large_image_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    masks, classes = torch.randn(1, 7, 8, 8), torch.randn(1, 7, 3)
    frame: Any = {"canvas": (32, 32), "contents": [(32, 24)], "sizes": [(40, 30)]}
    (expected,) = instances(masks, classes, **frame)
    made: list[int] = []
    encode = rle.encode
    monkeypatch.setattr(mask_instances, "PIXELS_AT_ONCE", 2 * 40 * 30 + 1)
    monkeypatch.setattr(rle, "encode", lambda some: (made.append(len(some)), encode(some))[1])
    (found,) = instances(masks, classes, **frame)
    assert max(made) == 2 and sum(made) == 7
    assert found.masks == expected.masks
    for name in ("boxes", "labels", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def _scene(objects: list[tuple[int, int, int, int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image [3, 32, 32] of rectangles (x1, y1, x2, y2, class), and what torchvision's detectors take."""
    image, masks = torch.zeros(3, 32, 32), torch.zeros(len(objects), 32, 32, dtype=torch.bool)
    for mask, (left, top, right, bottom, label) in zip(masks, objects, strict=True):
        mask[top:bottom, left:right] = True
        image[:, top:bottom, left:right] = torch.tensor([[1.0, -1, 0], [-1, 1, 0.5]])[label][:, None, None]
    labels = torch.tensor([label + 1 for *_, label in objects])
    boxes = torch.tensor([box for *box, _ in objects], dtype=torch.float32)
    return image, {"labels": labels, "boxes": boxes, "masks": masks}


def _targets(target: dict[str, Tensor]) -> MaskTargets:
    return MaskTargets(target["labels"] - 1, target["masks"])


@pytest.mark.slow
def test_two_images_are_overfitted():
    dense, head = small()
    scenes = [_scene([(4, 4, 14, 20, 0), (18, 8, 30, 18, 1)]), _scene([(2, 16, 16, 30, 1)])]
    images = torch.stack([image for image, _ in scenes])
    targets = [_targets(target) for _, target in scenes]
    optimizer = torch.optim.AdamW([p for m in (dense, head) for p in m.parameters() if p.requires_grad], 2e-3)
    for step in range(80):
        found = head.train().losses(dense, images, targets, fraction=step / 80, uniforms=uniforms(head, 2, step))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert head.mask_probability.tolist() == [0.0, 0.0]
    with torch.no_grad():
        masks, classes = head.eval().predict(dense.eval(), images)
        detected = instances(masks, classes, canvas=(32, 32), contents=[(32, 32)] * 2, sizes=[(32, 32)] * 2)
        scores = head.class_scores(dense, images)
    for i, (one, (_, target)) in enumerate(zip(detected, scenes, strict=True)):
        count = len(target["labels"])
        assert (one.scores[:count] > 0.7).all() and (one.scores[count:] < 0.3).all()
        assert one.masks is not None
        found_masks = rle.decode(one.masks[:count], (32, 32)).astype(bool)
        for label, mask in zip(target["labels"].tolist(), target["masks"].numpy(), strict=True):
            same = [found_masks[j] for j in range(count) if one.labels[j] == label]
            assert max((mask & other).sum() / (mask | other).sum() for other in same) > 0.7
            assert (scores[i].argmax(0) == label - 1).numpy()[mask].mean() > 0.9
