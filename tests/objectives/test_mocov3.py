from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm
from pretrain.models.losses.contrastive import contrastive_loss
from pretrain.objectives import build
from pretrain.objectives.configs.mocov3 import MoCoV3Config
from tests.engine.ranks import launch
from tests.objectives.mocov3_ranks import IMAGES, outcome, share_of_a_batch
from tests.objectives.tiny import HORIZON, Shape, batch, objective


def moco(**changes: Any) -> Any:
    return objective("mocov3", **changes)


def state_of(of: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


@pytest.mark.processes
def test_two_processes_compute_loss_and_gradients_of_one_with_the_whole_batch(tmp_path: Path):
    launch(share_of_a_batch, world=2, out=tmp_path)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    whole = outcome(slice(0, IMAGES))
    for name, expected in whole.items():
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, expected, atol=1e-9, rtol=1e-9, msg=name)
        if "running" in name:
            assert torch.equal(ranks[0][name], ranks[1][name]), name
    assert not torch.equal(ranks[0]["loss"], ranks[1]["loss"]), "each rank has queries of its own"


def test_the_loss_is_symmetric_in_the_views_and_sums_both_directions():
    of, swapped = moco(), moco()
    given = batch(of)
    other = given | {"views": given["views"].flip(1)}
    torch.testing.assert_close(of(given, 0)["loss"], swapped(other, 0)["loss"])
    first, second = of.views(given)
    queries = [of.predictor(of.base(images)[1]) for images in (first, second)]
    keys = [of.momentum_encoder(images)[1] for images in (first, second)]
    parts = [contrastive_loss(queries[i], keys[1 - i], temperature=0.2)[0] for i in (0, 1)]
    torch.testing.assert_close(of(given, 0)["loss"], parts[0] + parts[1])


def test_each_view_is_normalized_by_its_own_batch():
    of = moco(projector_layers=1)
    first, _ = of.views(batch(of))
    projected = of.base(first)[1]
    torch.testing.assert_close(projected.mean(0), torch.zeros(8), atol=1e-5, rtol=0)


def test_the_momentum_encoder_is_where_the_next_keys_need_it():
    of = moco(momentum=0.5)
    weight = of.momentum_encoder.average.backbone.norm.weight
    with torch.no_grad():
        of.base.backbone.norm.weight.add_(1.0)
    of.after_step(4)
    # Of 8 steps, 4 are done: the cosine from 0.5 to 1 is half way.
    assert of.momentum(4) == pytest.approx(0.75)
    torch.testing.assert_close(weight, torch.full_like(weight, 1.25))
    assert moco(momentum_cosine=False, momentum=0.9).momentum(7) == 0.9


def test_at_the_start_a_move_changes_nothing():
    of = moco()
    before = state_of(of)
    of.move_momentum_encoder(0)
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


def test_averages_follow_backbone_and_projector_but_not_the_statistics():
    of = moco(momentum=0.0)
    of(batch(of), 0)
    norm = of.momentum_encoder.average.projector[1]
    assert norm.num_batches_tracked == 2, "its own forward passes, one per view"
    before = norm.running_mean.clone()
    of.base.projector[1].running_mean.fill_(9.0)
    of.after_step(1)
    assert torch.equal(norm.running_mean, before)


def test_a_skipped_step_leaves_the_statistics_as_they_were():
    of = moco()
    before = state_of(of)
    given = batch(of)
    of(given, 0)
    of({"views": given["views"] * float("nan")}, 0)
    of.discard_pending()
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    of(given, 0)
    of.after_step(1)
    of.discard_pending()
    assert of.predictor[1].num_batches_tracked == 2


def test_evaluation_reads_the_statistics_and_leaves_them():
    of = moco().eval()
    before = state_of(of)
    of(batch(of), 0)
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_patch_embedding_is_never_trained(frozen: bool):
    of = moco(freeze_patch_embed=frozen)
    trained = {name for name, parameter in of.named_parameters() if parameter.requires_grad}
    assert ("base.backbone.patch_embed.proj.weight" in trained) != frozen
    assert ("base.backbone.patch_embed.proj.bias" in trained) != frozen
    names = {name for group in of.param_groups() for name in group["names"]}
    assert names == trained


def test_everything_that_is_trained_decays():
    assert {group["weight_decay_scale"] for group in moco().param_groups()} == {1.0}


def test_drop_path_is_the_base_encoders_alone():
    of = build("mocov3")(MoCoV3Config(hidden_dim=16, projection_dim=8), moco().backbone, HORIZON)
    of.base.backbone.set_drop_path(0.5)  # pyright: ignore[reportAttributeAccessIssue]
    given = batch(of, Shape(drop_path_rate=0.5))
    assert given["drop_path"].shape == (4, 2, 2, 2)
    losses = [of(given | {"drop_path": torch.full((4, 2, 2, 2), value)}, 0)["loss"] for value in (0.0, 1.0)]
    assert losses[0] != losses[1]
    of.after_step(1)
    images = given["views"][:, 0]
    encoder: Any = of.momentum_encoder
    dropped, kept = (encoder.average.backbone.forward_cls(images, torch.full((4, 2, 2), v)) for v in (0.0, 1.0))
    assert torch.equal(dropped, kept)


def test_collapsed_features_show_in_what_is_logged():
    of = moco()
    given = batch(of)
    healthy = of(given, 0)
    same = of({"views": given["views"][:1].expand(4, -1, -1, -1, -1)}, 0)
    assert same["feature_std"] < 1e-6 < healthy["feature_std"]
    assert healthy["student_teacher_cosine"].item() == pytest.approx(1.0), "they start equal"


def test_a_batch_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"batch\['views'\] must be \[b, 2, C, H, W\], got \[4, 1, 3, 24, 32\]"):
        moco()({"views": torch.zeros(4, 1, 3, 24, 32)}, 0)


def test_views_are_those_of_the_paper():
    first, second, drop_path = MoCoV3Config().views(Shape(size=(224, 224), num_blocks=12, drop_path_rate=0.1))
    assert isinstance(first, ViewSpec) and isinstance(second, ViewSpec) and first.blur and second.blur
    assert (first.name, second.name, first.scale, first.hflip) == ("views", "views", (0.08, 1.0), 0.5)
    assert (first.blur.prob, second.blur.prob, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert (first.grayscale, second.grayscale) == (0.2, 0.2)
    assert first.interpolation == second.interpolation == "bilinear"  # torchvision's default
    assert first.jitter == second.jitter and first.jitter and first.jitter.prob == 0.8
    assert drop_path == Noise("drop_path", (2, 12, 2))


@pytest.mark.parametrize(
    ("config", "micro_batch", "world_size", "fine"),
    [
        ({}, 2, 1, True),
        ({}, 1, 2, True),
        ({}, 1, 1, False),
        ({"sync_bn": False}, 1, 8, False),
        ({"sync_bn": False}, 2, 8, True),
    ],
)
def test_a_batch_norm_over_one_image_is_refused_before_training(
    config: dict, micro_batch: int, world_size: int, fine: bool
):
    found = MoCoV3Config(**config).batch_problems(micro_batch, world_size)
    assert (found == []) == fine
    assert fine or "leaves 1 image per batch norm" in found[0]


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({"crop_scale": (0.4, 0.05)}, Shape(), "objective.crop_scale: 0.4 is larger than 0.05"),
        ({}, Shape(in_chans=1), "objective.color_jitter: needs RGB"),
        ({"color_jitter": (0.4, 0.4, 0, 0)}, Shape(in_chans=1), "objective.grayscale_prob: needs RGB"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in MoCoV3Config(**config).problems(shape))


def test_a_cnn_of_timms_is_trained_with_the_batch_norms_of_its_own_over_all_ranks():
    torch.manual_seed(0)
    config = MoCoV3Config(hidden_dim=16, projection_dim=8, projector_layers=2, predictor_last_norm=False)
    of: Any = build("mocov3")(config, TimmBackbone("resnet10t", (32, 32), 3), HORIZON)  # pyright: ignore[reportArgumentType]
    given = batch(of, Shape(size=(32, 32)))
    norms = [norm for norm in of.modules() if isinstance(norm, _BatchNorm)]
    assert norms and all(isinstance(norm, SyncBatchNorm) for norm in norms)
    before = state_of(of)
    of(given, 0)["loss"].backward()
    assert not [name for name, p in of.named_parameters() if p.requires_grad and p.grad is None]
    of.discard_pending()
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    assert of.place_backbone(of.backbone.state_dict()).keys() <= before.keys()
    assert before.keys() == of.heads_state().keys() | {f"base.backbone.{name}" for name in of.backbone.state_dict()}
