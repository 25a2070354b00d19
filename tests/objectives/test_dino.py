from __future__ import annotations

import math

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.configs import DINOConfig
from pretrain.objectives.dino import DINO
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch, objective, part


def test_the_teacher_starts_as_the_student_and_is_never_trained():
    of = objective("dino")
    student = of.student.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in of.teacher.average.state_dict().items())
    assert isinstance(of.teacher, EMA)
    of(batch(of), 0)["loss"].backward()
    assert not any(name.startswith("teacher") for name, _ in of.named_parameters())


def test_drop_path_is_the_students_alone():
    of = objective("dino", drop_path_rate=0.5).train()
    images = batch(of)["global"][:, 0]
    dropped, kept = torch.zeros(len(images), 2, 2), torch.ones(len(images), 2, 2)
    teacher, student = of.teacher.average, of.student
    assert torch.equal(teacher.project(images, drop=dropped)[0], teacher.project(images, drop=kept)[0])
    assert not torch.equal(student.project(images, drop=dropped)[0], student.project(images, drop=kept)[0])


def test_the_average_follows_with_the_momentum_of_the_step_before():
    of = objective("dino", momentum_teacher=0.5)
    before = of.backbone.norm.weight.clone()
    with torch.no_grad():
        of.student.backbone.norm.weight.add_(1.0)
    of.after_step(1)
    assert of.momentum(0) == 0.5 and of.momentum(8) == 1.0
    torch.testing.assert_close(of.backbone.norm.weight, before + 0.5)


def test_the_loss_uses_the_old_centre_and_after_step_moves_it():
    of = objective("dino", center_momentum=0.8).eval()
    given = batch(of)
    first = of(given, 0)["loss"]
    of.train()
    of.student.backbone.set_drop_path(0.0)
    assert torch.equal(of(given, 0)["loss"], first) and not of.center.any()
    logits = of.teacher(of.crops(given)[0])
    of.after_step(1)
    torch.testing.assert_close(of.center, 0.2 * logits.mean(0, keepdim=True))


def test_micro_batches_move_the_centre_as_the_whole_batch_does():
    centers = []
    for pieces in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        of = objective("dino").train()
        for piece in pieces:
            of(part(batch(of), piece), 0)
        of.after_step(1)
        centers.append(of.center)
    torch.testing.assert_close(*centers)
    assert centers[0].any()


def test_a_skipped_step_leaves_no_trace_in_the_centre():
    of = objective("dino").train()
    of({name: value * float("nan") for name, value in batch(of).items()}, 0)
    of.discard_pending()
    of.after_step(1)
    assert not of.center.any()
    assert "pending" not in " ".join(of.state_dict())


def test_evaluation_does_not_move_the_centre():
    of = objective("dino").eval()
    of(batch(of), 0)
    of.after_step(1)
    assert not of.center.any()


def test_the_teacher_temperature_is_a_table_of_epochs():
    of = objective("dino", warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3)
    assert [of.teacher_temp(step) for step in range(8)] == pytest.approx([0.04, 0.04, 0.055, 0.055] + [0.07] * 4)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_prototypes_stand_still_at_first_and_keep_their_weight_decay(norm_last_layer: bool):
    of = objective("dino", norm_last_layer=norm_last_layer, freeze_last_layer_epochs=2)
    frozen = {name: group for group in of.param_groups() for name in group["names"] if group["frozen_steps"]}
    expected = {f"student.head.last_layer.weight_{kind}" for kind in ("v" if norm_last_layer else "vg")}
    assert frozen.keys() == expected
    assert all((group["frozen_steps"], group["weight_decay_scale"]) == (4, 1.0) for group in frozen.values())


def test_a_collapse_shows_in_what_is_logged():
    of = objective("dino").eval()
    given = batch(of)
    healthy = of(given, 0)
    with torch.no_grad():
        of.teacher.average.head.last_layer.weight_g[0] = 1e3
        of.teacher.average.head.last_layer.weight_v[0] = of.teacher.average.project(of.crops(given)[0])[1].mean(0)
    collapsed = of(given, 0)
    assert collapsed["teacher_entropy"] < 1e-2 < healthy["teacher_entropy"]
    assert collapsed["teacher_kl_uniform"].item() == pytest.approx(math.log(32), abs=1e-2)
    assert healthy["teacher_kl_uniform"] < 3
    same = {name: value[:1].expand_as(value) for name, value in given.items()}
    same["global"] = same["global"][:, :1].expand_as(same["global"])
    assert of(same, 0)["feature_std"] < 1e-6 < healthy["feature_std"]


def test_without_local_crops_the_two_global_ones_remain():
    of = objective("dino", local_crops_number=0)
    assert "local" not in batch(of)
    assert of(batch(of), 0)["loss"].isfinite()


def test_missing_crops_are_named():
    of = objective("dino")
    given = batch(of)
    with pytest.raises(ValueError, match=r"batch\['local'\] holds 1 crops per image, the objective needs 2"):
        of(given | {"local": given["local"][:, :1]}, 0)


def test_batch_norm_heads_see_the_batch_in_the_teacher_too():
    of = objective("dino", use_bn_in_head=True).train()
    bn = of.teacher.average.head.mlp[1]
    of(batch(of), 0)["loss"].backward()
    assert bn.training and bn.num_batches_tracked == 1
    before = bn.running_mean.clone()
    of.after_step(1)
    assert torch.equal(bn.running_mean, before)


def test_views_are_those_of_the_paper():
    g1, g2, local, drop_path = DINOConfig().views(Shape(size=(224, 224), patch_size=16, num_blocks=12))
    assert drop_path == Noise("drop_path", (2 + 8, 12, 2))
    assert (g1.blur.prob, g2.blur.prob, local.blur.prob) == (1.0, 0.1, 0.5)
    assert (g1.solarize, g2.solarize, local.solarize) == (0.0, 0.2, 0.0)
    assert (local.count, local.size, local.scale, g1.scale) == (8, (96, 96), (0.05, 0.4), (0.4, 1.0))
    assert (g1.name, g2.name, local.name) == ("global", "global", "local")


def test_colour_changes_of_other_than_rgb_are_named_and_can_be_set_off():
    shape = Shape(in_chans=6)
    found = "\n".join(DINOConfig().problems(shape))
    assert "objective.color_jitter: needs RGB" in found and "objective.grayscale_prob: needs RGB" in found
    plain = DINOConfig(color_jitter=(0.4, 0.4, 0, 0), grayscale_prob=0)
    assert plain.problems(shape) == []
    assert not any(view.grayscale for view in plain.views(shape) if isinstance(view, ViewSpec))


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({"local_crops_scale": (0.4, 0.05)}, Shape(), "objective.local_crops_scale: 0.4 is larger than 0.05"),
        ({}, Shape(drop_path_rate=0.2), "student uses objective.drop_path_rate"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in DINOConfig(**config).problems(shape))


def resnet() -> DINO:
    torch.manual_seed(0)
    backbone = TimmBackbone("resnet10t", (32, 32), 3)
    return DINO(DINOConfig(**SMALL["dino"] | {"drop_path_rate": 0.0}), backbone, HORIZON)


def test_batch_norms_of_a_cnn_see_the_images_of_all_ranks():
    norms = [module for module in resnet().modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(norm, SyncBatchNorm) for norm in norms)


def test_an_image_that_is_not_finite_leaves_no_trace_in_the_batch_norms_of_a_skipped_step():
    of = resnet()
    given = batch(of, Shape(size=(32, 32)))
    of(given, 0)
    of.after_step(1)
    before = {name: value.clone() for name, value in of.state_dict().items()}
    broken = given | {"global": given["global"].clone().index_fill_(0, torch.tensor([1]), float("nan"))}
    assert not of(broken, 1)["loss"].isfinite()
    of.discard_pending()
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    of(given, 1)
    of.after_step(2)
    of.discard_pending()  # what was kept stays
    assert not torch.equal(
        of.state_dict()["student.backbone.model.bn1.running_mean"], before["student.backbone.model.bn1.running_mean"]
    )
