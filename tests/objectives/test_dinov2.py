from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.data.views.specs import ViewSpec, stacks
from pretrain.models.backbones.vit import ViT
from pretrain.models.losses.koleo import koleo_loss
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.teachers.gram_teacher import gram_patches
from pretrain.objectives.configs import DINOv2Config
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.multi_crop import crop_after_crop
from tests.engine.ranks import launch
from tests.objectives.distill_ranks import IMAGES, outcome, share_of_a_batch
from tests.objectives.tiny import HORIZON, Shape, batch, objective, part


def hide(of, share: float = 0.4, **changes) -> dict:
    """A batch with single patches hidden at random, and with one crop that hides nothing."""
    given = batch(of)
    mask = torch.rand(given["mask"].shape, generator=torch.Generator().manual_seed(3)) < share
    mask[0, 1] = False
    return given | {"mask": mask} | changes


def sinkhorn(logits: torch.Tensor, temp: float) -> torch.Tensor:
    q = (logits / temp).exp().T
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate", [True, False])
def test_all_losses_are_those_of_the_definition_on_every_logit(centering: str, separate: bool):
    weights = {"dino_weight": 0.7, "ibot_weight": 1.3, "koleo_weight": 0.2}
    of = objective("dinov2", centering=centering, separate_patch_head=separate, **weights).eval()
    with torch.no_grad():
        of.center.normal_(std=0.1), of.patch_center.normal_(std=0.1), of.mask_token.normal_()
    given = hide(of)
    crops, mask, student, teacher = of.crops(given), crop_after_crop(given["mask"]), of.student, of.teacher.average
    temp = of.teacher_temp(0)

    def targets(logits: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        return sinkhorn(logits, temp) if centering == "sinkhorn_knopp" else ((logits - center) / temp).softmax(-1)

    features, patches = student.encode(crops[0], mask=mask, mask_token=of.mask_token)
    local = student.backbone.forward_cls(crops[1])
    cls = student.dino_head(torch.cat([features, local])).div(0.1).log_softmax(-1).chunk(4)
    seen = student.patch_head(patches[mask]).div(0.1).log_softmax(-1)
    t_features, t_patches = teacher.encode(crops[0])
    q_cls = targets(teacher.dino_head(t_features), of.center).chunk(2)
    q_patches = targets(teacher.patch_head(t_patches[mask]), of.patch_center)
    per_patch = torch.zeros(mask.shape).masked_scatter(mask, -(q_patches * seen).sum(-1))
    got = of(given, 0)
    close = {"atol": 1e-5, "rtol": 1e-5}
    pairs = {(q, v): -(q_cls[q] * cls[v]).sum(-1).mean() / 6 for q in range(2) for v in range(4) if v != q}
    torch.testing.assert_close(got["loss_cls_global"], pairs[0, 1] + pairs[1, 0], **close)
    torch.testing.assert_close(got["loss_cls_local"], sum(pairs[q, v] for q in range(2) for v in (2, 3)), **close)
    per_crop = (per_patch.sum(1) / mask.sum(1).clamp(min=1)).mean()
    torch.testing.assert_close(got["loss_patch"], per_crop / 2, **close)
    koleo = sum(koleo_loss(crop) for crop in features.chunk(2))
    torch.testing.assert_close(got["loss_koleo"], 0.2 * koleo / 2, **close)
    total = 0.7 * sum(pairs.values()) + 1.3 * per_crop + 0.2 * koleo
    torch.testing.assert_close(got["loss"], total, **close)


def test_without_local_crops_the_sum_over_two_pairs_is_divided_by_three():
    """The official divisor is 2 + max(2 n, 1)."""
    of = objective("dinov2", local_crops_number=0).eval()
    alone = objective("dino", local_crops_number=0).eval()
    alone.student.load_state_dict({n.replace("dino_head", "head"): v for n, v in part_of(of.student).items()})
    alone.teacher.load_state_dict({n.replace("dino_head", "head"): v for n, v in part_of(of.teacher).items()})
    given = batch(of)
    given["mask"] = torch.zeros_like(given["mask"])
    expected = alone({"global": given["global"]}, 0)["loss"] * 2 / 3
    losses = of(given, 0)
    torch.testing.assert_close(losses["loss_cls_global"], expected.detach())
    assert "loss_cls_local" not in losses


def part_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if "ibot_head" not in name}


def test_the_patches_centre_is_that_of_the_hidden_ones():
    of = objective("dinov2", center_momentum=0.8).train()
    given = hide(of)
    of(given, 0)
    teacher, mask = of.teacher.average, crop_after_crop(given["mask"])
    expected = teacher.patch_head(teacher.encode(of.crops(given)[0])[1][mask]).mean(0)
    of.after_step(1)
    torch.testing.assert_close(of.patch_center, 0.2 * expected[None])
    assert of.center.any()


def test_a_step_that_hides_nothing_leaves_the_patches_centre():
    of = objective("dinov2").train()
    given = batch(of)
    with torch.no_grad():
        of.patch_center.fill_(0.5)
    assert of(given | {"mask": torch.zeros_like(given["mask"])}, 0)["loss_patch"] == 0
    of.after_step(1)
    assert torch.equal(of.patch_center, torch.full_like(of.patch_center, 0.5))


def test_sinkhorn_knopp_leaves_the_centres_still_and_does_not_speak_of_them():
    of = objective("dinov2", centering="sinkhorn_knopp").train()
    assert "center_norm" not in of(hide(of), 0)
    of.after_step(1)
    assert not of.center.any() and not of.patch_center.any()


def test_micro_batches_together_have_the_gradient_of_the_batch_where_no_images_meet():
    gradients = []
    for pieces in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        of = objective("dinov2", koleo_weight=0, drop_path_subset=False)
        for piece in pieces:
            (of(part(hide(of), piece), 0)["loss"] / len(pieces)).backward()
        gradients.append({n: p.grad for n, p in of.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.processes
def test_two_ranks_with_sinkhorn_knopp_and_koleo_over_all_have_the_gradient_of_one(tmp_path: Path):
    """One rank hides nothing, and the nearest neighbour of an image can be on the other."""
    launch(share_of_a_batch, world=2, out=tmp_path)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    for name, expected in outcome(slice(0, IMAGES)).items():
        mean = (ranks[0][name] + ranks[1][name]) / 2
        torch.testing.assert_close(mean, expected, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert ranks[1]["loss_patch"] == 0


def test_the_temperature_rises_with_every_step():
    of = objective("dinov2", warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=2)
    assert [of.teacher_temp(step) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_parameter_groups_are_those_of_the_official_code():
    of = objective("dinov2", layerwise_decay=0.5, patch_embed_lr_mult=0.2, freeze_last_layer_epochs=3)
    found = {
        n: (g["lr_scale"], g["weight_decay_scale"], g["frozen_steps"], g["clip_group"])
        for g in of.param_groups()
        for n in g["names"]
    }
    backbone, cls, patch = "student.backbone.", "student.dino_head.", "student.ibot_head."
    assert found["mask_token"] == (0.125, 1.0, 0, backbone)
    assert found[f"{backbone}cls_token"] == (0.125, 1.0, 0, backbone)
    assert found[f"{backbone}patch_embed.proj.weight"] == (0.025, 1.0, 0, backbone)
    assert found[f"{backbone}patch_embed.proj.bias"] == (0.025, 0.0, 0, backbone)
    assert found[f"{backbone}blocks.1.attn.qkv.weight"] == (0.5, 1.0, 0, backbone)
    assert found[f"{backbone}norm.weight"] == (1.0, 0.0, 0, backbone)
    assert found[f"{cls}mlp.0.weight"] == (1.0, 1.0, 0, cls)
    assert found[f"{cls}last_layer.weight_g"] == (1.0, 1.0, 6, cls)
    assert found[f"{patch}last_layer.weight_v"] == (1.0, 1.0, 6, patch)
    follow = {n for g in of.param_groups() if g.get("keeps_moments") for n in g["names"]}  # learning rate 0, gradients
    assert follow == {f"{head}last_layer.{part}" for head in (cls, patch) for part in ("weight_g", "weight_v")}


def test_epochs_can_have_a_length_of_their_own():
    of = objective("dinov2", epoch_steps=5, freeze_last_layer_epochs=3, warmup_teacher_temp_epochs=2)
    assert {group["frozen_steps"] for group in of.param_groups()} == {0, 15}  # passes over the data have 2 steps
    assert of.teacher_temp(0) == pytest.approx(0.04)
    assert of.teacher_temp(8) < of.teacher_temp(9) == pytest.approx(0.07)


def test_the_drop_path_is_uniform_and_the_students_alone():
    of = objective("dinov2", drop_path_rate=0.4)
    assert [block.drop_rate for block in of.student.backbone.blocks] == [0.4, 0.4]
    assert [block.drop_rate for block in of.teacher.average.backbone.blocks] == [0.0, 0.0]


def test_koleo_refuses_a_micro_batch_of_one_image_before_training_and_in_it():
    config = DINOv2Config()
    (problem,) = config.batch_problems(1, 8)
    assert problem.startswith("objective.koleo_weight") and "koleo_scope=all" in problem
    assert config.batch_problems(2, 1) == [] and DINOv2Config(koleo_weight=0).batch_problems(1, 1) == []
    assert DINOv2Config(koleo_scope="all").batch_problems(1, 2) == []
    several = DINOv2Config(koleo_scope="all", koleo_neighbours=2, koleo_group=4)
    assert several.batch_problems(2, 4) == [] and several.batch_problems(4, 1) == []
    (problem,) = several.batch_problems(2, 3)
    assert "objective.koleo_group: 4 images are not those of complete ranks; give a multiple of the" in problem
    (problem,) = DINOv2Config(koleo_neighbours=2).batch_problems(2, 1)
    assert "2 neighbours in the same micro-batch, but its size is 2" in problem
    of = objective("dinov2")
    with pytest.raises(ValueError, match="KoLeo needs at least 2 images"):
        of(part(batch(of), slice(0, 1)), 0)


def test_identical_images_give_finite_losses_and_gradients():
    of = objective("dinov2")
    given = {name: value[:1].expand_as(value) for name, value in batch(of).items()}
    losses = of(given, 0)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in of.parameters() if parameter.requires_grad)


def gram(of) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in of.state_dict().items() if n.startswith("gram_teacher.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def test_gram_anchoring_begins_at_its_step_with_the_teacher_of_that_step_and_renews_it_at_times():
    of = objective("dinov2", gram={"start_step": 2, "refresh_steps": 2, "max_refreshes": 1}, momentum_teacher=0.5)
    given, changed = hide(of), []
    for step in range(7):
        assert ("loss_gram" in of(given, step)) == (step >= 2)
        before = gram(of)
        with torch.no_grad():
            for parameter in of.student.parameters():
                parameter.add_(0.01)
        of.after_step(step + 1)
        if not same(before, gram(of)):
            changed.append(step + 1)
            assert same(gram(of), dict(of.backbone.state_dict()))
    assert changed == [2, 4]


def test_the_gram_loss_vanishes_when_student_and_gram_teacher_see_the_same():
    of = objective("dinov2", gram={"weight": 3.0}, drop_path_rate=0.0)
    of.begin()
    given = batch(of)
    whole = given | {"mask": torch.zeros_like(given["mask"])}
    assert of(whole, 0)["loss_gram"] < 1e-10
    losses = of(hide(of), 0)
    without = objective("dinov2", drop_path_rate=0.0)
    assert losses["loss_gram"] > 1e-8
    torch.testing.assert_close(losses["loss"], without(hide(of), 0)["loss"] + 3.0 * losses["loss_gram"])


def test_options_of_the_gram_loss_reach_it():
    options = {"level": "batch", "tokens": "masked", "normalize": False, "negatives": "zero"}
    of = objective("dinov2", gram={"weight": 3.0, **options}, drop_path_rate=0.0)
    of.begin()
    given = hide(of)
    mask = crop_after_crop(given["mask"])
    crops = of.crops(given)
    student = of.student.encode(crops[0], mask=mask, mask_token=of.mask_token)[1][mask]
    teacher = gram_patches(of.gram_teacher.network.average, crops[0], grid=(3, 4))[mask]
    pair = [(x @ x.T).clamp(min=0) for x in (student, teacher)]
    torch.testing.assert_close(of(given, 0)["loss_gram"], (pair[0] - pair[1]).square().mean())
    (problem,) = DINOv2Config(gram={"tokens": "masked"}).problems(Shape(num_blocks=12))
    assert problem == "objective.gram.tokens: masked are not equally many in all images; set gram.level=batch"


def test_in_the_high_resolution_stage_the_gram_teacher_sees_the_same_crops_larger_and_without_colours():
    shape = Shape(size=(16, 16))
    of = objective("dinov2", shape, gram={"img_size": 32})
    views = of.config.views(shape)
    assert ViewSpec("gram", (32, 32), same_as="global", colours=False) in views
    assert [index for index, _ in stacks(views)["gram"]] == [index for index, _ in stacks(views)["global"]]
    given = batch(of, shape)
    assert given["gram"].shape == (4, 2, 3, 32, 32)
    losses = of(given, 0)
    losses["loss"].backward()
    other = of(given | {"gram": torch.randn_like(given["gram"])}, 0)
    assert losses["loss_gram"] != other["loss_gram"]
    assert torch.equal(losses["loss_cls_global"], other["loss_cls_global"])


def test_the_gram_teacher_of_a_release_is_taken_when_the_run_begins_and_held(tmp_path: Path):
    earlier = objective("mae")
    write_release(tmp_path / "r", earlier.backbone, objective="mae", extra_state={}, record={})
    of = objective("dinov2", gram={"release": str(tmp_path / "r"), "refresh_steps": 0})
    of.begin()
    assert same(gram(of), dict(earlier.backbone.state_dict()))
    of.after_step(1)
    assert same(gram(of), dict(earlier.backbone.state_dict()))
    missing = objective("dinov2", gram={"release": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="none: not a release"):
        missing.begin()


def test_the_next_stage_takes_heads_and_weights_of_one_without_gram_and_its_teacher_as_gram_teacher(tmp_path: Path):
    earlier = objective("dinov2")
    with torch.no_grad():
        for parameter in earlier.student.parameters():
            parameter.add_(0.1)
    earlier.after_step(1)
    write_release(tmp_path / "r", earlier.backbone, objective="dinov2", extra_state=earlier.heads_state(), record={})
    of = objective("dinov2", gram={})
    report = of.load_weights(read_release(tmp_path / "r"))
    assert report.missing and all(name.startswith("gram_teacher.") for name in report.missing)
    of.begin()
    assert same(gram(of), dict(earlier.backbone.state_dict()))
    assert not any(name.startswith("gram_teacher.") for name in of.heads_state())


def test_the_gram_teacher_is_in_the_checkpoint_as_fp32_buffers():
    of = objective("dinov2", gram={})
    assert gram(of) and not any("gram" in name for name, _ in of.named_parameters())
    assert {value.dtype for value in gram(of).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"gram": {"img_size": 50}},
            "objective.gram.img_size: 50 x 50 is not a multiple of model.patch_size 8; try 48",
        ),
        ({"mask_ratio": (0.5, 1.0)}, "objective.mask_ratio: mask 'mask': ratio must be"),
        ({"local_crops_scale": (0.4, 0.05)}, "objective.local_crops_scale: 0.4 is larger than 0.05"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, problem: str):
    assert any(problem in found for found in DINOv2Config(**config).problems(Shape()))


def test_the_class_token_starts_near_nothing_in_student_and_teacher_unlike_dinos():
    vit = ViT((24, 32), 8, 3, 16, 2, 2, 2.0, pos_embed="learned")
    assert vit.cls_token is not None and vit.cls_token.std() > 0.01
    of = DINOv2(objective("dinov2").config, vit, HORIZON)
    assert 0 < of.student.backbone.cls_token.abs().max() < 1e-5
    assert torch.equal(of.teacher.average.backbone.cls_token, of.student.backbone.cls_token)


def test_the_defaults_have_no_problem():
    assert DINOv2Config().problems(Shape(size=(224, 224), patch_size=16)) == []
