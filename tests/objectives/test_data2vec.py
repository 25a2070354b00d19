from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.views.masks import BlockMask
from pretrain.data.views.specs import ColorJitter, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.losses.latent_targets import last_layers
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import Data2VecConfig
from pretrain.objectives.data2vec import Data2Vec
from tests.objectives.tiny import SMALL, Shape, batch

SHAPE = Shape(num_blocks=3)


def data2vec(*, steps_per_epoch: int = 2, drop_path_rate: float = 0.0, **changes: Any) -> Data2Vec:
    """A BEiT-style network: shared relative positions, no key bias, layer scale."""
    torch.manual_seed(0)
    vit = ViT(
        (24, 32), 8, 3, 16, 3, 2, 2.0, pos_embed="none", rel_pos_bias="shared", qkv_bias="no_key", layer_scale=0.1,
        drop_path_rate=drop_path_rate,
    )  # fmt: skip
    of = Data2Vec(Data2VecConfig.model_validate(SMALL["data2vec"] | changes), vit, Horizon(8, steps_per_epoch))
    with torch.no_grad():
        for parameter in of.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        of.teacher.average.load_state_dict(vit.state_dict())
    return of


def hide(images: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    pixels = mask.unflatten(1, (3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return images.masked_fill(pixels[:, None], value)


def test_masked_pixels_reach_the_targets_and_not_the_student():
    of = data2vec()
    sample = batch(of, SHAPE)
    images, mask = sample["image"][:, 0], sample["mask"]
    changed = hide(images, mask, 3.0)
    assert torch.equal(of.predict(changed, mask)[1], of.predict(images, mask)[1])
    assert not torch.allclose(of.targets(changed), of.targets(images))


def test_targets_are_the_mean_of_the_normalized_last_blocks_normalized_again():
    of = data2vec(num_target_layers=2)
    images = batch(of, SHAPE)["image"][:, 0]
    outputs = []
    average = of.teacher.average
    handles = [block.register_forward_hook(lambda *given: outputs.append(given[2][:, 1:])) for block in average.blocks]
    average(images)
    for handle in handles:
        handle.remove()
    mean = sum(standardized(tokens) for tokens in outputs[1:]) / 2
    torch.testing.assert_close(of.targets(images), standardized(mean))


def standardized(tokens: torch.Tensor, dim: int = -1) -> torch.Tensor:
    tokens = tokens - tokens.mean(dim, keepdim=True)
    return tokens / (tokens.square().mean(dim, keepdim=True) + 1e-5).sqrt()


def test_targets_can_be_what_the_feed_forward_branch_adds_normalized_over_the_image():
    of = data2vec(num_target_layers=1, target_features="ffn", target_norm="instance", final_norm="none")
    images = batch(of, SHAPE)["image"][:, 0]
    average = of.teacher.average
    (raw,) = average.layers(images, [2])
    with torch.no_grad():
        average.blocks[2].ls2.gamma.zero_()
    (without,) = average.layers(images, [2])
    of_branch = data2vec(num_target_layers=1, target_features="ffn", target_norm="instance", final_norm="none")
    torch.testing.assert_close(
        of_branch.targets(images), standardized((raw - without)[:, 1:], dim=1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_loss_is_smooth_l1_of_the_masked_patches_only(beta: float):
    of = data2vec(loss_beta=beta)
    sample = batch(of, SHAPE)
    images, mask = sample["image"][:, 0], sample["mask"]
    tokens = of.encoder(images, mask=mask, mask_token=of.mask_token)
    error = (of.head(tokens[:, 1:]) - of.targets(images)).abs()
    smooth = torch.where(error < beta, error.square() / 2 / beta, error - beta / 2).mean(-1)
    torch.testing.assert_close(of(sample, 0)["loss"], (smooth * mask).sum() / mask.sum())


def test_every_masked_patch_counts_the_same_whatever_image_it_is_in():
    of = data2vec()
    sample = batch(of, SHAPE, images=2)
    sample["mask"] = torch.zeros(2, 12, dtype=torch.bool)
    sample["mask"][0, :1] = True
    sample["mask"][1, :3] = True
    images = sample["image"][:, 0]
    pred, target = of.predict(images, sample["mask"])[1], of.targets(images)[sample["mask"]]
    torch.testing.assert_close(of(sample, 0)["loss"], F.smooth_l1_loss(pred, target, beta=2.0))


def test_the_momentum_climbs_a_ramp_of_epochs_or_stands_at_its_end():
    of = data2vec(ema_start=0.9, ema_end=0.99, ema_anneal_epochs=2, steps_per_epoch=5)
    assert [of.momentum(step) for step in (0, 5, 10, 99)] == pytest.approx([0.9, 0.945, 0.99, 0.99])
    assert Data2VecConfig().ema_anneal_epochs == 0 and data2vec().momentum(0) == 0.9998


def test_the_average_follows_and_the_release_holds_the_student():
    of = data2vec(ema_end=0.5)
    before = of.teacher.average.norm.weight.clone()
    with torch.no_grad():
        of.encoder.norm.weight.add_(1.0)
    of.after_step(1)
    torch.testing.assert_close(of.teacher.average.norm.weight, before + 0.5)
    assert of.backbone is of.encoder
    assert set(of.heads_state()) | {f"encoder.{name}" for name in of.encoder.state_dict()} == set(of.state_dict())


def test_class_token_and_positions_do_not_decay_but_mask_token_and_relative_positions_do():
    decays = {name: group["weight_decay_scale"] for group in data2vec().param_groups() for name in group["names"]}
    assert decays["encoder.cls_token"] == 0 and decays["encoder.blocks.0.attn.q_bias"] == 0
    assert decays["mask_token"] == decays["encoder.rel_pos_bias.relative_position_bias_table"] == 1


def test_class_token_and_positions_of_a_timm_backbone_do_not_decay_either():
    vit = TimmBackbone("vit_tiny_patch16_224", (24, 32), embed_dim=16, depth=3, num_heads=2, patch_size=8)
    of = Data2Vec(data2vec().config, vit, Horizon(8, 2))  # pyright: ignore[reportArgumentType]
    decays = {name: group["weight_decay_scale"] for group in of.param_groups() for name in group["names"]}
    assert decays["encoder.model.cls_token"] == decays["encoder.model.pos_embed"] == 0


def test_drop_path_is_the_students_alone():
    of = data2vec(drop_path_rate=0.5).train()
    sample = batch(of, SHAPE)
    images, mask = sample["image"][:, 0], sample["mask"]
    assert torch.equal(of.targets(images), of.targets(images))
    dropped = of.predict(images, mask, drop=torch.zeros(4, 3, 2))[1]
    assert not torch.allclose(dropped, of.predict(images, mask, drop=torch.ones(4, 3, 2))[1])


def test_a_collapse_shows_in_what_is_logged():
    of = data2vec()
    sample = batch(of, SHAPE)
    healthy = of(sample, 0)
    with torch.no_grad():
        for vit in (of.encoder, of.teacher.average):
            vit.patch_embed.proj.weight.zero_()
            vit.rel_pos_bias.relative_position_bias_table.zero_()
    collapsed = of(sample, 0)
    assert collapsed["target_std"] < 1e-4 < healthy["target_std"]


def test_more_layers_than_blocks_are_refused():
    of = data2vec()
    with pytest.raises(ValueError, match="4 layers are to be averaged, but the backbone has 3"):
        data2vec(num_target_layers=4).targets(batch(of, SHAPE)["image"][:, 0])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_the_feed_forward_branch_of_a_block_of_timms_is_what_its_last_step_adds(name: str):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, (32, 32), embed_dim=24, depth=2, num_heads=2, init_values=0.5)
    images, before = torch.randn(2, 3, 32, 32), []
    backbone.eval().model.blocks[-1].norm2.register_forward_hook(lambda _, given, __: before.append(given[0][:, 1:]))
    (branch,), (after,) = (last_layers(backbone, images, 1, features) for features in ("ffn", "block"))
    torch.testing.assert_close(before[0] + branch, after)


def test_views_are_those_of_the_authors():
    image, mask = Data2VecConfig().views(Shape(size=(224, 224), patch_size=16, num_blocks=12))
    assert isinstance(image, ViewSpec) and isinstance(mask, BlockMask)
    assert (image.scale, image.hflip, image.jitter) == ((0.08, 1.0), 0.5, ColorJitter(0.4, 0.4, 0.4))
    assert (mask.num_masked, mask.min_per_block, mask.max_per_block, mask.exact) == (120, 16, 196, False)


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({}, Shape(num_blocks=12), "objective.num_mask_patches: mask 'mask': 120 of 12 patches hidden"),
        ({"num_mask_patches": 4}, Shape(size=(128, 128)), "of a backbone with 2 blocks; at most that many"),
        ({}, Shape(in_chans=6), "objective.color_jitter: needs RGB, but model.in_chans is 6"),
        ({"crop_scale": (1.0, 0.08)}, Shape(), "objective.crop_scale: 1.0 is larger than 0.08"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in Data2VecConfig.model_validate(config).problems(shape))


def test_the_defaults_have_no_problem():
    assert Data2VecConfig().problems(Shape(size=(224, 224), patch_size=16, num_blocks=12)) == []
