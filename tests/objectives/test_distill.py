from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.core.configlib import ConfigError
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.standardize import EPS, Standardize
from pretrain.objectives import build
from pretrain.objectives.configs.distill import DistillConfig
from tests.objectives.released import reads, vit_release
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch, objective, part


def two_teachers() -> list[dict[str, Any]]:
    weights = vit_release((24, 32), 8, 3)
    return [
        {"weights": weights, "class_weight": 0.5, "patch_weight": 1.0, "gram_weight": 2.0},
        {"weights": weights, "class_weight": 0.0, "patch_weight": 0.25, "size": (48, 64)},
    ]


def test_the_loss_is_that_of_the_formulas():
    of: Any = objective("distill", teachers=two_teachers(), cosine_weight=0.7, smooth_l1_weight=0.3)
    for step in (1, 2):  # so that targets have a mean and a spread
        of(batch(of, seed=step), step)
        of.after_step(step)
    given = batch(of, seed=3)
    network = read_release(vit_release((24, 32), 8, 3)).build()

    def tokens(name: str) -> torch.Tensor:
        return network((given[name][:, 0] - 0.5) / 0.25).detach()

    def distance(lesson: int, kind: str, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen = [batch(of, seed=step) for step in (1, 2)]
        every = torch.cat([of.target(other, lesson)[kind].reshape(-1, 16) for other in seen])
        wanted = (target - every.mean(0)) / (every.var(0, correction=0) + EPS).sqrt()
        found = of.lessons[lesson].adaptors[kind](features)
        smooth = torch.where((found - wanted).abs() < 1, (found - wanted) ** 2 / 2, (found - wanted).abs() - 0.5).mean()
        return 0.7 * (1 - F.cosine_similarity(found, wanted, dim=-1)).mean() + 0.3 * smooth

    student, small, large = of.encoder(given["image"][:, 0]), tokens("teacher_24x32"), tokens("teacher_48x64")[:, 1:]
    large = F.interpolate(large.transpose(1, 2).unflatten(2, (6, 8)), size=(3, 4), mode="bicubic")
    similar = [F.normalize(x[:, 1:], dim=-1) @ F.normalize(x[:, 1:], dim=-1).mT for x in (student, small)]
    first = 0.5 * distance(0, "class", student[:, 0], small[:, 0])
    first = first + distance(0, "patch", student[:, 1:], small[:, 1:])
    first = first + 2.0 * (similar[0] - similar[1]).square().mean()
    second = 0.25 * distance(1, "patch", student[:, 1:], large.flatten(2).mT)
    of.eval()
    torch.testing.assert_close(of(given, 3)["loss"], (first + second) / 2, atol=1e-5, rtol=1e-4)


def test_targets_are_standardized_by_all_rows_of_the_first_steps():
    rows = torch.randn(4, 6, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([5.0, 0.0, -2.0])
    of = Standardize(3, steps=2)
    assert torch.equal(of(rows[0]), rows[0] / (1 + EPS) ** 0.5), "as they are in the first step"
    of(rows[1])
    of.after_step(1)
    of(rows[2]), of(rows[3])
    of.after_step(2)
    known = of.state_dict()["mean"].clone()
    seen = of.eval()(rows).flatten(0, 1)
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    of.train()(rows + 100)
    of.after_step(3)
    assert torch.equal(of.mean, known), "two steps count"


def test_a_skipped_step_does_not_count():
    of: Any = objective("distill")
    before = {name: value.clone() for name, value in of.state_dict().items()}
    of(batch(of), 0)
    of.discard_pending()
    of.after_step(1)
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


def test_teachers_and_adaptors_are_not_in_a_release_and_another_teacher_is_refused():
    of = objective("distill")
    assert not any(name.startswith("teachers") for name in of.state_dict())
    assert not any(name.startswith(("lessons", "teachers")) for name in of.backbone.state_dict())
    with pytest.raises(ConfigError, match=r"(?s)objective.teachers.0.* is not what these weights were trained with"):
        of.load_state_dict(of.state_dict() | {"fingerprints.0.sha256": torch.zeros(32)})


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_convolutional_networks_learn_from_a_transformer(name: str):
    shape = Shape(size=(64, 64))
    weights = vit_release((64, 64), 8, 3)
    config = DistillConfig(**SMALL["distill"] | {"teachers": [{"weights": weights}]})
    backbone: Any = TimmBackbone(name, (64, 64), 3)
    of: Any = build("distill")(config, backbone, HORIZON)
    losses = of(batch(of, shape), 0)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in of.parameters())
    assert ("loss_patch" in losses) == (name == "test_convnext")


def test_micro_batches_give_the_statistics_of_the_batch():
    states = []
    for pieces in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        of = objective("distill")
        for piece in pieces:
            of(part(batch(of), piece), 0)
        of.after_step(1)
        states.append(of.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


def test_each_size_of_teachers_is_one_view():
    teachers = [{"weights": "a"}, {"weights": "b", "size": 448}, {"weights": "c", "size": 448}]
    image, same, large, drop = DistillConfig(teachers=teachers).views(Shape(size=(224, 224), drop_path_rate=0.1))
    assert isinstance(image, ViewSpec) and isinstance(same, ViewSpec) and isinstance(large, ViewSpec)
    assert (same.name, large.name) == ("teacher_224x224", "teacher_448x448") and large.same_as == "image"
    assert large.size == (448, 448) and not large.normalize and drop == Noise("drop_path", (2, 2))


@pytest.mark.parametrize(
    ("teacher", "others", "shape", "problem"),
    [
        ({"class_weight": 0, "patch_weight": 0}, {}, Shape(), "so are its other weights; leave the teacher out"),
        ({"patch_weight": 1}, {}, Shape(provides=frozenset({"image"})), "gives one vector per image and no patches"),
        ({}, {"cosine_weight": 0, "smooth_l1_weight": 0}, Shape(), "objective.cosine_weight: 0, and so is"),
        ({}, {}, Shape(in_chans=6), "reads 3 channels, model.in_chans is 6"),
    ],
)
def test_impossible_settings_are_named_before_training(teacher: dict, others: dict, shape: Shape, problem: str):
    weights = reads("distill", (24, 32), 3)["teachers"][0]["weights"]
    config = DistillConfig(teachers=[{"weights": weights, **teacher}], **others)
    assert any(problem in found for found in config.problems(shape))


def test_a_size_that_the_teachers_patches_do_not_divide_is_refused():
    teachers = [{"weights": vit_release((24, 32), 8, 3), "size": 30}]
    with pytest.raises(ConfigError, match=r"patches of 8 px, which do not divide 30 x 30 px; set \[32, 32\]"):
        objective("distill", teachers=teachers)
