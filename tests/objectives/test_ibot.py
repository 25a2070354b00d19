from __future__ import annotations

import pytest
import torch

from pretrain.data.views.masks import RatioBlockMask
from pretrain.models.backbones.vit import ViT
from pretrain.objectives import build
from pretrain.objectives.configs import IBOTConfig
from pretrain.objectives.multi_crop import crop_after_crop
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch, objective, part


def with_mask(of, given: dict, share: float = 0.4) -> dict:
    """The batch with single patches hidden at random, and with one crop that hides nothing."""
    mask = torch.rand(given["mask"].shape, generator=torch.Generator().manual_seed(3)) < share
    mask[0, 1] = False
    return given | {"mask": mask}


def test_both_losses_are_those_of_the_definition_on_every_logit():
    of = objective("ibot", lambda1=0.7, lambda2=1.3, shared_head_teacher=False, patch_out_dim=20).eval()
    with torch.no_grad():
        of.center.normal_(std=0.1), of.patch_center.normal_(std=0.1), of.mask_token.normal_()
    given = with_mask(of, batch(of))
    crops, mask, student, teacher = of.crops(given), crop_after_crop(given["mask"]), of.student, of.teacher.average
    features, patches = student.encode(crops[0], mask=mask, mask_token=of.mask_token)
    local = student.backbone.forward_cls(crops[1])
    cls = student.head(torch.cat([features, local])).div(0.1).log_softmax(-1).chunk(4)
    seen = student.head.patch_layer(student.head.bottleneck(patches)).div(0.1).log_softmax(-1)
    t_features, t_patches = teacher.encode(crops[0])
    q_cls = ((teacher.head(t_features) - of.center) / of.teacher_temp(0)).softmax(-1).chunk(2)
    t_logits = teacher.head.patch_layer(teacher.head.bottleneck(t_patches))
    q_patches = ((t_logits - of.patch_center) / of.teacher_patch_temp(0)).softmax(-1)
    pairs = [-(q_cls[q] * cls[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]
    per_patch = -(q_patches * seen).sum(-1)
    per_crop = (per_patch * mask).sum(1) / mask.sum(1).clamp(min=1)
    got = of(given, 0)
    torch.testing.assert_close(got["loss_cls"], 0.7 * torch.stack(pairs).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["loss_patch"], 1.3 * per_crop.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["loss"], got["loss_cls"] + got["loss_patch"])


def test_hidden_pixels_never_reach_the_student_and_always_the_teacher():
    of = objective("ibot").eval()
    given = with_mask(of, batch(of))
    crops, mask = of.crops(given), crop_after_crop(given["mask"])
    pixels = mask.view(-1, 1, 3, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(pixels, torch.full_like(crops[0], 7.0), crops[0])
    hiding = {"drop": None, "mask": mask, "mask_token": of.mask_token}
    before, after = (of.student.encode_crops(seen, **hiding) for seen in (crops, [changed, crops[1]]))
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not torch.equal(of.teacher.average.encode(crops[0])[1], of.teacher.average.encode(changed)[1])


def test_without_masked_image_modeling_the_student_sees_the_patches_whose_loss_it_gets():
    of = objective("ibot", use_masked_im_modeling=False).eval()
    given = with_mask(of, batch(of))
    assert of.mask_token is None and "mask_token" not in of.state_dict()
    crops = of.crops(given)
    features, cls, patches = of._student_bottlenecks(crops, crop_after_crop(given["mask"]), None)
    torch.testing.assert_close(features[: len(crops[0])], of.student.backbone(crops[0])[:, 0])
    assert len(patches) == given["mask"].sum() and len(cls) == sum(map(len, crops))


def test_a_head_with_batch_norm_averages_over_all_tokens_of_the_global_crops():
    of = objective("ibot", head_norm="bn", head_act="relu").train()
    given = with_mask(of, batch(of))
    norm, seen = of.student.head.mlp[1], []
    norm.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    losses = of(given, 0)
    losses["loss"].backward()
    of.eval()
    tokens = [len(crops) * of.student.backbone(crops).shape[1] for crops in of.crops(given)]
    assert seen == [count for count in tokens for _ in range(2)]  # one module after both hidden layers
    assert norm.weight.grad is not None and norm.weight.grad.any()


def test_local_crops_are_seen_whole_by_the_class_tokens_loss_alone():
    of = objective("ibot").eval()
    given = with_mask(of, batch(of))
    other = given | {"local": torch.randn_like(given["local"])}
    first, second = of(given, 0), of(other, 0)
    assert first["loss_cls"] != second["loss_cls"] and torch.equal(first["loss_patch"], second["loss_patch"])


def test_a_batch_that_hides_nothing_has_no_patch_loss():
    of = objective("ibot")
    given = batch(of)
    losses = of(given | {"mask": torch.zeros_like(given["mask"])}, 0)
    losses["loss"].backward()
    assert losses["loss_patch"] == 0 and torch.equal(losses["loss"], losses["loss_cls"])
    assert of.mask_token.grad is not None and not of.mask_token.grad.any()


def test_the_patches_centre_is_that_of_all_patches_hidden_or_not():
    of = objective("ibot", patch_center_momentum=0.8).train()
    given = with_mask(of, batch(of))
    of(given, 0)
    teacher = of.teacher.average
    logits = teacher.head.patch_layer(teacher.head.bottleneck(teacher.encode(of.crops(given)[0])[1]))
    of.after_step(1)
    torch.testing.assert_close(of.patch_center, 0.2 * logits.mean((0, 1))[None])


def test_micro_batches_move_both_centres_as_the_whole_batch_does():
    centers = []
    for pieces in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        of = objective("ibot").train()
        for piece in pieces:
            of(part(batch(of), piece), 0)
        of.after_step(1)
        centers.append((of.center, of.patch_center))
    torch.testing.assert_close(*centers)
    assert centers[0][0].any() and centers[0][1].any()


def test_a_skipped_step_leaves_no_trace_in_the_centres():
    of = objective("ibot").train()
    given = batch(of)
    of({name: value * float("nan") if value.is_floating_point() else value for name, value in given.items()}, 0)
    of.discard_pending()
    of.after_step(1)
    assert not of.center.any() and not of.patch_center.any()


def test_a_teacher_that_shares_its_head_starts_with_the_students_patch_prototypes_and_follows_the_others():
    of = objective("ibot", shared_head=False, shared_head_teacher=True, momentum_teacher=0.5)
    student, teacher = of.student.head, of.teacher.average.head
    assert teacher.patch_layer is teacher.last_layer and student.patch_layer is not student.last_layer
    assert torch.equal(teacher.last_layer.weight_v, student.last_layer2.weight_v)
    expected = (student.last_layer2.weight_v + student.last_layer.weight_v) / 2
    of.after_step(1)
    torch.testing.assert_close(teacher.last_layer.weight_v, expected.detach())


def test_a_shared_head_has_one_set_of_prototypes():
    of = objective("ibot", shared_head=True)
    assert not any("last_layer2" in name for name in of.state_dict())
    assert of.student.head.patch_layer is of.student.head.last_layer


def test_two_separate_heads_may_have_different_sizes_and_are_both_averaged():
    of = objective("ibot", shared_head=False, shared_head_teacher=False, patch_out_dim=20)
    of(batch(of), 0)["loss"].backward()
    with torch.no_grad():
        of.student.head.last_layer2.weight_v.add_(1.0)
    of.after_step(1)
    assert of.patch_center.shape == (1, 20)
    moved = of.teacher.average.head.last_layer2.weight_v - of.student.head.last_layer2.weight_v
    torch.testing.assert_close(moved, torch.full_like(moved, -of.momentum(0)), atol=1e-5, rtol=1e-5)


def test_the_prototypes_of_class_token_and_patches_stand_still_at_first():
    of = objective("ibot", norm_last_layer=False, freeze_last_layer_epochs=2)
    frozen = {name: group["frozen_steps"] for group in of.param_groups() for name in group["names"]}
    still = {name for name, steps in frozen.items() if steps}
    assert still == {f"student.head.last_layer{n}.weight_{kind}" for n in ("", "2") for kind in "vg"}
    assert {frozen[name] for name in still} == {4} and frozen["mask_token"] == 0


def test_the_temperature_of_patches_begins_to_rise_when_they_begin_to_be_hidden():
    config = {"warmup_teacher_patch_temp": 0.04, "teacher_patch_temp": 0.07, "warmup_teacher_temp_epochs": 2}
    of = objective("ibot", **config, pred_start_epoch=1)
    assert [of.teacher_patch_temp(step) for step in range(8)] == pytest.approx([0.04] * 4 + [0.07] * 4)
    assert [of.teacher_temp(step) for step in range(4)] == pytest.approx([0.04, 0.04, 0.07, 0.07])


def test_the_student_of_the_crop_it_saw_whole_agrees_with_a_teacher_equal_to_it():
    of = objective("ibot").eval()
    given = batch(of)
    whole = of(given | {"mask": torch.zeros_like(given["mask"])}, 0)["student_teacher_cosine"]
    torch.testing.assert_close(whole, torch.tensor(1.0))
    assert of(with_mask(of, given, 0.8), 0)["student_teacher_cosine"] < 0.999


def test_a_backbone_without_a_class_token_gives_the_mean_of_its_patches():
    vit = ViT((24, 32), 8, 3, 16, 2, 2, 2.0, class_token=False)
    of = build("ibot")(IBOTConfig(**SMALL["ibot"]), vit, HORIZON).eval()
    given = batch(of)
    features, patches = of.teacher.average.encode(of.crops(given)[0])
    torch.testing.assert_close(features, patches.mean(1))
    assert of(given, 0)["loss"].isfinite()


def test_masks_are_those_of_the_official_loader():
    config = IBOTConfig(pred_ratio=(0.0, 0.3), pred_ratio_var=(0.0, 0.2))
    views = config.views(Shape(size=(224, 224), patch_size=16, num_blocks=12))
    expected = RatioBlockMask("mask", (14, 14), count=2, ratio=(0.0, 0.3), ratio_var=(0.0, 0.2), shape="block")
    assert expected in views


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"patch_out_dim": 100}, "objective.patch_out_dim: 100, but a shared head has 8192 for both"),
        ({"shared_head": True, "shared_head_teacher": False}, "objective.shared_head_teacher: false with shared_head"),
        ({"pred_ratio": (0.9,), "pred_ratio_var": (0.1,)}, "objective.pred_ratio: mask 'mask'"),
        ({"pred_ratio": (0.1, 0.2)}, "objective.pred_ratio: mask 'mask': ratio and ratio_var must be of one length"),
        ({"global_crops_scale": (1.0, 0.2)}, "objective.global_crops_scale: 1.0 is larger than 0.2"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, problem: str):
    assert any(problem in found for found in IBOTConfig(**config).problems(Shape()))


def test_the_defaults_have_no_problem():
    assert IBOTConfig().problems(Shape(size=(224, 224), patch_size=16)) == []


def test_kl_of_the_patches_is_what_is_left_above_their_entropy():
    of = objective("ibot").eval()
    losses = of(with_mask(of, batch(of)), 0)
    assert 0 < losses["patch_entropy"] <= losses["loss_patch"]
