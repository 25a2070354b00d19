from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.views.masks import InverseBlockMask
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import Data2Vec2Config
from pretrain.objectives.data2vec2 import Data2Vec2
from tests.objectives.tiny import SMALL, Shape, batch

SHAPE = Shape()


def data2vec2(*, class_token: bool = True, drop_path_rate: float = 0.0, **changes: Any) -> Data2Vec2:
    torch.manual_seed(0)
    vit = ViT((24, 32), 8, 3, 16, 2, 2, 2.0, class_token=class_token, drop_path_rate=drop_path_rate)
    return Data2Vec2(Data2Vec2Config.model_validate(SMALL["data2vec2"] | changes), vit, Horizon(8, 2))


def test_hidden_pixels_reach_the_targets_and_not_the_student():
    of = data2vec2(clone_batch=1)
    sample = batch(of, SHAPE)
    images, mask = sample["image"][:, 0], sample["mask"]
    pixels = mask[:, 0].unflatten(1, (3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    changed = images.masked_fill(pixels[:, None], 3.0)
    keep, hidden = of.split(mask)
    noise = sample["decoder_noise"]
    assert torch.equal(of.predict(changed, keep, hidden, noise)[1], of.predict(images, keep, hidden, noise)[1])
    assert not torch.allclose(of.targets(changed), of.targets(images))


def test_the_split_gives_every_patch_once_and_hides_what_the_mask_hides():
    of = data2vec2(clone_batch=3)
    mask = batch(of, SHAPE)["mask"]
    keep, hidden = of.split(mask)
    assert keep.shape == (12, 4) and hidden.shape == (12, 8)
    assert torch.equal(torch.zeros(12, 12, dtype=torch.bool).scatter(1, hidden, True), mask.flatten(0, 1))
    assert not mask.flatten(0, 1).gather(1, keep).any()


@settings(max_examples=6, deadline=None)
@given(clones=st.integers(1, 4), seed=st.integers(0, 99))
def test_several_masks_of_one_teacher_pass_are_the_mean_of_as_many_single_ones(clones: int, seed: int):
    of = data2vec2(clone_batch=clones)
    sample = batch(of, SHAPE, images=2, seed=seed)
    calls = []
    handle = of.teacher.average.norm.register_forward_pre_hook(lambda *_: calls.append(1))
    block = of.teacher.average.blocks[0].register_forward_pre_hook(lambda _, given_: calls.append(len(given_[0])))
    together = of(sample, 0)["loss"]
    handle.remove(), block.remove()
    assert calls == [2], "one pass over the two images, and no norm after it"
    single = data2vec2(clone_batch=1)
    one_by_one = [
        single(sample | {key: sample[key][:, i : i + 1] for key in ("mask", "decoder_noise")}, 0)["loss"]
        for i in range(clones)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one).mean())


def test_the_losses_are_sums_of_squares_by_the_root_of_the_width():
    of = data2vec2(clone_batch=2, cls_weight=3.0)
    sample = batch(of, SHAPE)
    keep, hidden = of.split(sample["mask"])
    images = sample["image"][:, 0]
    tokens, pred = of.predict(images, keep, hidden, sample["decoder_noise"])
    whole = of.targets(images)
    patch, cls = [], []
    for view in range(8):
        patch.append((pred[view] - whole[view // 2][hidden[view]]).square().sum(-1).mean() / 4)
        cls.append((tokens[view, 0] - whole[view // 2].mean(0)).square().sum() / 4)
    losses = of(sample, 0)
    torch.testing.assert_close(losses["loss_patch"], torch.stack(patch).mean())
    torch.testing.assert_close(losses["loss_cls"], 3.0 * torch.stack(cls).mean())
    torch.testing.assert_close(losses["loss"], losses["loss_patch"] + losses["loss_cls"])


def test_a_smooth_l1_loss_and_another_scale_can_be_asked_for():
    of = data2vec2(loss_beta=0.5, loss_scale=2.0)
    pred, target = torch.tensor([[0.1, 3.0]]), torch.zeros(1, 2)
    expected = 2.0 * (0.1**2 / 2 / 0.5 + 3.0 - 0.25)
    torch.testing.assert_close(of.distance(pred, target), torch.tensor(expected))


def test_targets_have_mean_zero_in_every_token_and_come_from_the_feed_forward_branches():
    of = data2vec2(average_top_k_layers=1)
    images = batch(of, SHAPE)["image"][:, 0]
    target = of.targets(images)
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 12), atol=1e-5, rtol=0)
    last = of.teacher.average.blocks[-1]
    with torch.no_grad():
        last.attn.proj.weight.zero_(), last.attn.proj.bias.zero_()
    (before,) = of.teacher.average.layers(images, [0])
    branch = last.mlp(last.norm2(before))[:, 1:]
    over_image = (branch - branch.mean(1, keepdim=True)) / (branch.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = over_image - over_image.mean(-1, keepdim=True)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(of.targets(images), expected, atol=1e-4, rtol=1e-4)


def test_without_a_class_token_its_loss_can_be_left_out():
    of = data2vec2(class_token=False, cls_weight=0.0)
    losses = of(batch(of, SHAPE), 0)
    assert "loss_cls" not in losses and torch.equal(losses["loss"], losses["loss_patch"])


def test_the_momentum_of_an_update_is_that_of_the_step_it_completes():
    of = data2vec2(ema_start=0.9, ema_end=0.99, ema_anneal_steps=3)
    assert [of.momentum(step) for step in (1, 2, 3, 9)] == pytest.approx([0.93, 0.96, 0.99, 0.99])
    before = of.teacher.average.norm.weight.clone()
    with torch.no_grad():
        of.encoder.norm.weight.add_(1.0)
    of.after_step(1)
    torch.testing.assert_close(of.teacher.average.norm.weight, before + 0.07)


def test_each_view_drops_its_own_branches():
    of = data2vec2(drop_path_rate=0.5, clone_batch=2).train()
    shape = Shape(drop_path_rate=0.5)
    sample = batch(of, shape, images=2)
    assert sample["drop_path"].shape == (2, 2, 2, 2)
    sample["mask"][:, 1], sample["decoder_noise"][:, 1] = sample["mask"][:, 0], sample["decoder_noise"][:, 0]
    sample["drop_path"][:, 0], sample["drop_path"][:, 1] = 0.0, 1.0
    keep, hidden = of.split(sample["mask"])
    drop = sample["drop_path"].flatten(0, 1)
    tokens, _ = of.predict(sample["image"][:, 0], keep, hidden, sample["decoder_noise"], drop=drop)
    assert not torch.allclose(tokens[0], tokens[1])


def test_the_release_holds_the_student_and_its_heads_the_rest():
    of = data2vec2()
    assert of.backbone is of.encoder
    assert set(of.heads_state()) | {f"encoder.{name}" for name in of.encoder.state_dict()} == set(of.state_dict())
    assert not any("noise" in name for name in of.state_dict()), "the table of noise is the same everywhere"


def test_views_are_those_of_the_authors():
    image, mask, noise = Data2Vec2Config().views(Shape(size=(224, 224), patch_size=16, num_blocks=12))
    assert isinstance(image, ViewSpec) and isinstance(mask, InverseBlockMask) and isinstance(noise, Noise)
    assert (image.scale, image.hflip, image.jitter) == ((0.2, 1.0), 0.5, None)
    assert (mask.mask_ratio, mask.block, mask.adjust, mask.count) == (0.8, 3, 0.07, 16)
    assert noise.shape == (16, 196) and Data2Vec2Config().num_visible(196) == mask.num_visible == 39


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({}, Shape(num_blocks=8), "objective.average_top_k_layers: 10 of a backbone with 8 blocks"),
        ({}, Shape(class_token=False), "objective.cls_weight: 2.56, but model.class_token is false"),
        ({"mask_ratio": 0.99}, Shape(), "objective.mask_ratio: mask 'mask': mask_ratio 0.99 of 12 patches"),
        ({"decoder_groups": 5}, Shape(), "objective.decoder_groups: 5 does not divide decoder_dim 768"),
        ({"decoder_groups": 32}, Shape(), "objective.decoder_groups: 32 does not divide embed_dim 16"),
        ({"decoder_kernel": 4}, Shape(), "objective.decoder_kernel: 4 is even"),
        ({"crop_scale": (1.0, 0.2)}, Shape(), "objective.crop_scale: 1.0 is larger than 0.2"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in Data2Vec2Config.model_validate(config).problems(shape))


def test_the_defaults_have_no_problem():
    assert Data2Vec2Config().problems(Shape(size=(224, 224), patch_size=16, num_blocks=12, embed_dim=768)) == []
