from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.views.masks import MultiBlockMask
from pretrain.data.views.specs import ViewSpec
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_strict
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import IJEPAConfig
from pretrain.objectives.ijepa import IJEPA
from tests.objectives.tiny import Shape, batch

SHAPE = Shape(size=(48, 48), class_token=False)
SMALL = {"predictor_embed_dim": 8, "predictor_depth": 2, "min_keep": 1, "target_scale": (0.15, 0.25)}


def ijepa(*, total_steps: int = 8, drop_path_rate: float = 0.0, **changes: Any) -> IJEPA:
    torch.manual_seed(0)
    vit = ViT((48, 48), 8, 3, 16, 2, 2, 2.0, class_token=False, drop_path_rate=drop_path_rate)
    return IJEPA(IJEPAConfig.model_validate(SMALL | changes), vit, Horizon(total_steps, 2))


def repaint(images: torch.Tensor, patches: torch.Tensor, value: float) -> torch.Tensor:
    """The images with the pixels of `patches` [b, k] at one value."""
    images = images.clone()
    for image, chosen in zip(images, patches.tolist(), strict=True):
        for patch in chosen:
            row, column = divmod(patch, 6)
            image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = value
    return images


def others(keep: torch.Tensor) -> torch.Tensor:
    """The patches of 36 that are not in keep [b, k]."""
    return torch.stack([torch.tensor(sorted(set(range(36)) - set(row))) for row in keep.tolist()])


def test_only_the_context_reaches_the_predictions_and_all_of_the_image_the_targets():
    of = ijepa()
    sample = batch(of, SHAPE)
    images, keep, blocks = sample["image"][:, 0], sample["mask_context"], sample["mask_targets"]
    changed = repaint(images, others(keep[:, 0]), 3.0)
    assert torch.equal(of.predict(changed, keep, blocks)[1], of.predict(images, keep, blocks)[1])
    assert not torch.allclose(of.targets(changed, blocks), of.targets(images, blocks))


def test_a_run_on_larger_pictures_takes_the_predictor_with_its_positions_resized():
    of = ijepa()
    larger = IJEPA(of.config, ViT((64, 64), 8, 3, 16, 2, 2, 2.0, class_token=False), Horizon(8, 2))
    report = load_strict(larger, of.state_dict(), grid=(6, 6))
    assert "predictor.pos_embed 6x6 -> 8x8" in report.resized and not report.missing


def test_target_blocks_are_predicted_one_by_one():
    of = ijepa(num_targets=3)
    sample = batch(of, SHAPE)
    images, keep, blocks = sample["image"][:, 0], sample["mask_context"], sample["mask_targets"]
    together = of.predict(images, keep, blocks)[1]
    alone = torch.cat([of.predict(images, keep, blocks[:, i : i + 1])[1] for i in range(3)], dim=1)
    torch.testing.assert_close(together, alone)


@settings(max_examples=8, deadline=None)
@given(contexts=st.integers(1, 3), targets=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_loss_is_the_mean_over_every_context_and_target_block(contexts: int, targets: int, seed: int):
    of = ijepa(num_contexts=contexts, num_targets=targets)
    sample = batch(of, SHAPE, images=2, seed=seed)
    pairs = []
    for c in range(contexts):
        for t in range(targets):
            one = {
                "mask_context": sample["mask_context"][:, c : c + 1],
                "mask_targets": sample["mask_targets"][:, t : t + 1],
            }
            pairs.append(of(sample | one, 0)["loss"])
    torch.testing.assert_close(of(sample, 0)["loss"], torch.stack(pairs).mean())


def test_targets_are_tokens_of_the_average_without_mean_and_scale():
    of = ijepa()
    with torch.no_grad():
        of.encoder.norm.weight.add_(1.0)  # the student's: nothing of it is in the targets
        of.teacher.average.norm.weight.mul_(5.0)
        of.teacher.average.norm.bias.add_(2.0)
    sample = batch(of, SHAPE)
    target = of.targets(sample["image"][:, 0], sample["mask_targets"])
    tokens = of.teacher.average(sample["image"][:, 0])
    picked = torch.stack([tokens[i, sample["mask_targets"][i]] for i in range(4)])
    picked = picked - picked.mean(-1, keepdim=True)
    expected = picked / (picked.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad


def test_the_loss_is_square_near_zero_and_a_line_beyond_one():
    of = ijepa()
    sample = batch(of, SHAPE)
    images, keep, blocks = sample["image"][:, 0], sample["mask_context"], sample["mask_targets"]
    error = (of.predict(images, keep, blocks)[1][:, :, 0] - of.targets(images, blocks)).abs()
    expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(of(sample, 0)["loss"], expected)


def test_the_momentum_is_a_line_from_start_to_end():
    of = ijepa(total_steps=10, ema_start=0.9, ema_end=1.0)
    assert [of.momentum(step) for step in (0, 5, 10, 20)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    longer = ijepa(total_steps=10, ema_start=0.9, ema_length=2.0)
    assert longer.momentum(10) == pytest.approx(0.95)


def test_the_average_follows_the_encoder_with_the_momentum_of_the_step_before():
    of = ijepa(ema_start=0.5)
    before = of.backbone.norm.weight.clone()
    with torch.no_grad():
        of.encoder.norm.weight.add_(1.0)
    of.after_step(1)
    torch.testing.assert_close(of.backbone.norm.weight, before + 0.5)
    assert [(average is of.teacher, source is of.encoder) for average, source in of.averages()] == [(True, True)]


def test_drop_path_is_the_encoders_alone():
    of = ijepa(drop_path_rate=0.5).train()
    sample = batch(of, SHAPE)
    images, keep, blocks = sample["image"][:, 0], sample["mask_context"], sample["mask_targets"]
    dropped, kept = torch.zeros(4, 2, 2), torch.ones(4, 2, 2)
    target = of.targets(images, blocks)
    assert torch.equal(target, of.eval().targets(images, blocks))
    of.train()
    first = of.predict(images, keep, blocks, drop=dropped)[1]
    assert not torch.allclose(first, of.predict(images, keep, blocks, drop=kept)[1])


def test_a_collapse_shows_in_what_is_logged():
    of = ijepa()
    sample = batch(of, SHAPE)
    healthy = of(sample, 0)
    with torch.no_grad():
        for vit in (of.encoder, of.teacher.average):
            vit.norm.weight.zero_()
            vit.norm.bias.copy_(torch.randn(16))
    collapsed = of(sample, 0)
    assert collapsed["target_std"] < 1e-5 < healthy["target_std"]
    assert collapsed["feature_std"] < 1e-5 < healthy["feature_std"]


def test_a_release_holds_the_target_encoder_and_its_heads_everything_else():
    of = ijepa()
    assert of.backbone is of.teacher.average
    names = set(of.heads_state()) | {f"teacher.average.{name}" for name in of.backbone.state_dict()}
    assert names == set(of.state_dict())


def test_the_picture_shows_predictions_where_they_are():
    of = ijepa(num_targets=1)
    sample = batch(of, SHAPE, images=1)
    (sheet,) = of.pictures(sample, 0, mean=(0.5,) * 3, std=(0.25,) * 3).values()
    panels = [sheet[:, 2:50, 2 + 52 * i : 50 + 52 * i] for i in range(4)]
    context, target = sample["mask_context"][0, 0].tolist(), sample["mask_targets"][0, 0].tolist()
    for patch in range(36):
        row, column = divmod(patch, 6)
        where = (slice(None), slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
        assert torch.equal(panels[1][where], panels[0][where]) if patch in context else (panels[1][where] == 128).all()
        assert (panels[3][where] != 128).any() if patch in target else (panels[3][where] == 128).all()


def test_views_are_those_of_the_paper():
    image, mask = IJEPAConfig().views(Shape(size=(224, 224), patch_size=14, num_blocks=32))
    assert isinstance(image, ViewSpec) and isinstance(mask, MultiBlockMask)
    assert (image.scale, image.hflip, image.jitter, image.interpolation) == ((0.3, 1.0), 0.0, None, "bilinear")
    assert (mask.grid, mask.num_targets, mask.num_contexts, mask.min_keep) == ((16, 16), 4, 1, 10)
    assert (mask.target_scale, mask.aspect, mask.context_scale) == ((0.15, 0.2), (0.75, 1.5), (0.85, 1.0))


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({}, Shape(size=(224, 224), patch_size=14), "model.class_token: true, but I-JEPA"),
        ({}, Shape(size=(32, 32), class_token=False), "objective.min_keep: mask 'mask': a target block can be"),
        ({"min_keep": 0}, Shape(size=(8, 8), class_token=False), "objective.min_keep: mask 'mask'"),
        ({"predictor_embed_dim": 30}, SHAPE, "objective.predictor_embed_dim: 30 is not a multiple of 4"),
        ({"predictor_num_heads": 5}, SHAPE, "384 is not a multiple of 4 and of predictor_num_heads 5"),
        ({"target_scale": (0.2, 0.1)}, SHAPE, "objective.target_scale: 0.2 is larger than 0.1"),
        ({"crop_scale": (1.0, 0.3)}, SHAPE, "objective.crop_scale: 1.0 is larger than 0.3"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in IJEPAConfig.model_validate(config).problems(shape))


def test_the_defaults_have_no_problem():
    assert IJEPAConfig().problems(Shape(size=(224, 224), patch_size=14, class_token=False)) == []


def test_heads_that_do_not_divide_the_predictor_are_named():
    vit = ViT((48, 48), 8, 3, 18, 2, 3, 2.0, class_token=False, pos_embed="learned")
    with pytest.raises(ValueError, match=r"objective\.predictor_embed_dim: 8 is not a multiple of the 3 heads"):
        IJEPA(IJEPAConfig.model_validate(SMALL), vit, Horizon(8, 2))


def test_the_mean_of_the_ranks_means_is_the_mean_over_the_batch():
    of = ijepa()
    sample = batch(of, SHAPE)
    halves = [
        of({name: value[part] for name, value in sample.items()}, 0)["loss"] for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), of(sample, 0)["loss"])
