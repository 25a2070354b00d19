"""DINOv3's form of `dinov2`: moved coordinates, a norm of local crops, linear prototypes, schedules, Gram teachers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.core.schedule import PhasesConfig
from pretrain.data.views.specs import Noise
from pretrain.models.teachers.gram_teacher import gram_loss
from pretrain.objectives.configs import DINOv2Config
from pretrain.objectives.configs.gram import GramConfig
from pretrain.objectives.dinov2 import DINOv2
from tests.objectives.tiny import Shape, batch, objective

PHASES = {"start": 0.0, "peak": 1.0, "end": 0.5, "warmup_epochs": 1, "cosine_epochs": 2}  # 2 steps, then 4
ONE_TEMP = {"start": 0.07, "peak": 0.07, "end": 0.07}


def dinov3(**changes) -> DINOv2:
    """Its parts together: `tiny.objective` gives it a backbone with rotary positions."""
    of = objective("dinov2", **{"rope_rescale": 2.0, "prototypes": "linear", "drop_path_rate": 0.0} | changes)
    assert isinstance(of, DINOv2)
    with torch.no_grad():  # from a class token near 0 all features are nearly one
        for parameter in of.student.backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return of


def test_coordinates_move_in_the_student_alone_by_the_numbers_of_the_batch():
    of = dinov3()
    assert Noise("rope", (2, 2, 5), of_step=True) in of.config.views(Shape())
    given = batch(of)
    middle = given | {"rope": torch.full_like(given["rope"], 0.5)}
    still = {key: value for key, value in given.items() if key != "rope"}
    torch.testing.assert_close(of(middle, 0)["loss"], of(still, 0)["loss"])
    loss, changed = of(given, 0)["loss"], []
    for entry in range(2):
        for block in range(2):
            other = given["rope"].clone()
            other[:, entry, block, 4] = 0.99
            changed.append(of(given | {"rope": other}, 0)["loss"])
    assert len({value.item() for value in [loss, *changed]}) == 5, "each block and each resolution has its own"
    assert of(given, 0)["teacher_entropy"] == of(still, 0)["teacher_entropy"]


def test_local_crops_have_a_last_norm_of_their_own():
    of = dinov3(local_norm=True, rope_rescale=None)
    norm, given = of.student.local_norm, batch(of)
    assert norm is not None
    features, patches = of.student.encode_crops(
        of.crops(given), drop=None, mask=None, mask_token=None, own=of.student.resolutions(None)
    )
    with torch.no_grad():
        norm.weight.mul_(2.0)  # pyright: ignore
    after, same = of.student.encode_crops(
        of.crops(given), drop=None, mask=None, mask_token=None, own=of.student.resolutions(None)
    )
    assert torch.equal(patches, same) and torch.equal(features[:8], after[:8])
    torch.testing.assert_close(after[8:], 2 * features[8:])
    found = {n: g for g in of.param_groups() for n in g["names"] if "local_norm" in n}
    assert len(found) == 2
    for group in found.values():
        assert (group["lr_scale"], group["weight_decay_scale"]) == (1.0, 0.0)
        assert group.get("clip_group") == "student.backbone."
    of.after_step(1)
    assert not torch.equal(of.teacher.average.local_norm.weight, norm.weight)  # pyright: ignore
    assert "local_norm" not in " ".join(of.backbone.state_dict())


def test_the_loss_of_local_crops_is_weighted_by_its_schedule():
    of = dinov3(local_weight_schedule=PHASES, epoch_steps=2, teacher_temp_schedule=ONE_TEMP)
    plain, given = dinov3(teacher_temp_schedule=ONE_TEMP), batch(of)
    for step, weight in ((0, 0.0), (1, 0.5), (2, 1.0), (5, 0.5)):
        losses, whole = of(given, step), plain(given, step)
        for name in ("loss_cls_local", "loss_cls_global", "loss_patch"):
            torch.testing.assert_close(losses[name], whole[name])
        expected = whole["loss"] + (weight - 1) * whole["loss_cls_local"]
        torch.testing.assert_close(losses["loss"], expected)
    for step, weight in ((0, 0.0), (1, 0.5)):
        of.zero_grad(), plain.zero_grad()
        of(given, step)["loss"].backward()
        other = plain(given, step)
        (other["loss"] + (weight - 1) * local_loss(plain, given)).backward()
        for got, expected in zip(of.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)


def local_loss(of: DINOv2, given: dict[str, Tensor]) -> Tensor:
    """The differentiable share of local crops, from every logit."""
    teacher, student, images = of.teacher.average, of.student, len(given["global"])
    with torch.no_grad():
        logits = teacher.dino_head(teacher.encode(of.crops(given)[0])[0])
        targets = (logits / of.teacher_temp(0)).softmax(-1).unflatten(0, (2, images))
    local = student.backbone.forward_cls(of.crops(given)[1], **student.resolutions(of._axes(given))[1])
    logs = (student.dino_head(local) / of.config.student_temp).log_softmax(-1).unflatten(0, (-1, images))
    pairs = [-(target * log).sum(-1).mean() for target in targets for log in logs]
    return torch.stack(pairs).sum() / (2 + 2 * of.config.local_crops_number)


def test_schedules_take_the_place_of_single_values():
    of = dinov3(momentum_schedule=PHASES, teacher_temp_schedule=PHASES | {"start": 0.1, "end": 0.2}, epoch_steps=2)
    assert [of.momentum(step) for step in range(3)] == [0.0, 0.5, 1.0]
    assert of.momentum(5) == of.momentum(7) == pytest.approx(0.5)
    assert of.teacher_temp(0) == pytest.approx(0.1) and of.teacher_temp(6) == pytest.approx(0.2)


def test_phases_meet_both_ends_of_the_cosine_and_hold_the_last():
    phases = PhasesConfig(start=0, peak=2, end=1, warmup_epochs=2, cosine_epochs=3)
    values = [phases.at(step, epoch_steps=2, total_steps=40) for step in range(14)]
    assert values[:5] == [0.0, 0.5, 1.0, 1.5, 2.0] and values[9:] == [1.0] * 5
    assert values[4:9] == sorted(values[4:9], reverse=True)
    whole = PhasesConfig(start=0, peak=2, end=1)
    assert [whole.at(step, epoch_steps=2, total_steps=5) for step in (0, 2, 4, 9)] == pytest.approx([2, 1.5, 1, 1])


def test_prototypes_are_a_linear_layer_in_both_heads_and_start_small():
    of = dinov3()
    for branch in (of.student, of.teacher.average):
        for head in (branch.dino_head, branch.patch_head):
            assert head.last_layer.weight_g is None and 0.01 < head.last_layer.weight_v.std() < 0.03
    of(batch(of), 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in of.student.parameters())


def test_the_runs_teacher_can_be_the_gram_teacher_of_every_step():
    of = dinov3(
        gram={"teacher": "current", "weight": 0.0, "weight_schedule": PHASES},
        epoch_steps=2,
        teacher_temp_schedule=ONE_TEMP,
    )
    of.begin()
    assert of.gram_teacher is None and not any(name.startswith("gram_teacher") for name in of.state_dict())
    given = batch(of)
    with torch.no_grad():
        for parameter in of.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    mask = given["mask"].transpose(0, 1).flatten(0, 1)
    axes = of.student.resolutions(of._axes(given))[0]
    seen = of.student.backbone(of.crops(given)[0], mask=mask, mask_token=of.mask_token, **axes)
    expected = gram_loss(seen[:, 1:], of.backbone(of.crops(given)[0])[:, 1:])
    losses = of(given, 1)
    torch.testing.assert_close(losses["loss_gram"], expected.detach())
    torch.testing.assert_close(losses["loss"] - of(given, 0)["loss"], 0.5 * expected, atol=1e-4, rtol=1e-3)


def test_refreshes_can_begin_later_and_are_counted_from_there():
    gram = GramConfig(refresh_steps=10, first_refresh_step=25, max_refreshes=2, release="r")
    assert [step for step in range(100) if gram.refreshes(step)] == [30, 40]
    run = GramConfig(start_step=5, refresh_steps=10, first_refresh_step=25, max_refreshes=1)
    assert [step for step in range(100) if run.refreshes(step)] == [5, 25]


def test_tokens_start_at_the_given_size():
    of = objective("dinov2", registers=2, token_std=0.5)
    for token in (of.backbone.cls_token, of.backbone.reg_token):  # pyright: ignore
        assert 0.2 < token.std() < 1.0  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"rope_shift": 0.1},
            "objective.rope_shift: 0.1 needs model.pos_embed=rope without frequencies; set it to null",
        ),
        ({"local_norm": True, "local_crops_number": 0}, "objective.local_norm: true needs local crops"),
        (
            {"prototypes": "linear", "norm_last_layer": True},
            "objective.norm_last_layer: true, but prototypes are linear",
        ),
        ({"momentum_schedule": PHASES | {"peak": 1.5}}, "objective.momentum_schedule: its values must be from 0 to 1"),
        ({"teacher_temp_schedule": PHASES}, "objective.teacher_temp_schedule: its values must be from 1e-06 to inf"),
        ({"gram": {"teacher": "current", "release": "r"}}, "objective.gram.release: the run's current teacher"),
    ],
)
def test_settings_without_an_effect_are_named(config: dict, problem: str):
    assert any(problem in found for found in DINOv2Config(**config).problems(Shape()))
