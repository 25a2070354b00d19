from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pretrain.data.views.specs import Noise
from pretrain.models.backbones.vit import ViT
from pretrain.objectives import build
from pretrain.objectives.configs.capi import CAPIConfig
from tests.engine.ranks import launch
from tests.engine.scenarios import ENGINES
from tests.golden.ranks import ALONE
from tests.objectives.capi_ranks import outcome, steps
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch, objective


@pytest.mark.processes
def test_ranks_micro_batches_and_engines_do_not_change_losses_and_weights(tmp_path: Path):
    whole = outcome("ddp", 1, ALONE)
    found = {f"alone, {accumulation}": outcome("ddp", accumulation, ALONE) for accumulation in (2, 4)}
    cases = [("ddp", 1), *((name, 2) for name in ENGINES if name != "zero3")]
    launch(steps, world=2, out=tmp_path, cases=cases)
    found |= {f"{name}, {times}": load_file(tmp_path / f"{name}-{times}.safetensors") for name, times in cases}
    for case, values in found.items():
        assert values.keys() == whole.keys(), case
        for name, expected in whole.items():
            torch.testing.assert_close(
                values[name], expected, atol=1e-5, rtol=1e-4, msg=lambda text, at=(case, name): f"{at}: {text}"
            )


def test_the_loss_is_the_cross_entropy_of_hidden_patches_and_of_the_clustering():
    of: Any = objective("capi")
    given = batch(of)
    losses = of(given, 0)
    features = F.normalize(of.teacher(given["image"][:, 0])[:, 1:], dim=-1)  # [b, N, D]
    logits = features @ of.clustering.weight.T + of.clustering.bias
    shares = (logits / 0.06).exp()
    for _ in range(3):  # of each position over the images, then of each patch over the clusters
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=2, keepdim=True)
    clustering = -(shares * (logits / 0.12).log_softmax(-1)).sum(-1).mean()
    _, pred = of.predict(given["image"][:, 0], given["mask_visible"], given["mask_predicted"])
    rows = torch.arange(len(features))[:, None]
    student = of.head(F.normalize(pred, dim=-1)) / 0.12
    prediction = -(shares[rows, given["mask_predicted"]] * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses["loss_clustering"], clustering.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_prediction"], prediction.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["loss_clustering"] + losses["loss_prediction"])


def test_what_is_predicted_depends_on_visible_patches_and_its_own_place_only():
    of: Any = objective("capi").eval()
    given = batch(of)
    images, keep, asked = given["image"][:, 0], given["mask_visible"], given["mask_predicted"]
    _, pred = of.predict(images, keep, asked)
    _, alone = of.predict(images, keep, asked[:, :1])
    torch.testing.assert_close(alone, pred[:, :1])
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # a view: [b, C, N, 8, 8] is a copy
    hidden = torch.ones(len(images), patches.shape[2], dtype=torch.bool).scatter(1, keep, False)
    blank = torch.where(hidden[:, None, :, None, None], 0.0, patches)
    changed = blank.unflatten(2, (3, 4)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    assert not torch.equal(changed, images)
    torch.testing.assert_close(of.predict(changed, keep, asked)[1], pred)


def test_no_gradient_reaches_the_teacher_and_the_student_does_not_train_the_clustering():
    of: Any = objective("capi")
    losses = of(batch(of), 0)
    losses["loss"].backward()
    before = of.clustering.weight.grad.clone()
    of.zero_grad()
    images = batch(of)["image"][:, 0]
    features = of.features(images)
    assert not features.requires_grad
    of.clustering.loss(features, of.masses(features)).loss.backward()
    torch.testing.assert_close(of.clustering.weight.grad, before)
    assert of.encoder.blocks[0].attn.qkv.weight.grad is None


def test_a_survey_leaves_nothing_behind():
    of: Any = objective("capi")
    given = batch(of)
    alone = of(given, 0)["loss"]
    with of.surveying(), torch.no_grad():
        assert of(given, 0) == {}
        of(batch(of, seed=1), 0)
    together = of(given, 0)["loss"]
    assert not torch.equal(together, alone)
    of.discard_pending()
    assert torch.equal(of(given, 0)["loss"], alone)


def test_the_momentum_falls_from_1_and_rises_towards_the_end():
    of: Any = objective("capi", momentum_teacher=0.5, momentum_warmup=0.375)  # 3 of 8 steps
    values = [of.momentum(step) for step in range(8)]
    assert values[:4] == [1.0, 0.75, 0.5, 0.5] and values == [*values[:4], *sorted(values[4:])]
    assert values[-1] < 1 and objective("capi", momentum_teacher=1.0).momentum(5) == 1.0  # pyright: ignore


def test_learning_rates_and_weight_decays_are_multiples_by_name():
    config = CAPIConfig(**SMALL["capi"] | {"frequencies_lr_mult": 0.5})
    vit = ViT(
        (24, 32), 8, 3, 16, 2, 2, 2.0, class_token=False, num_registers=2, pos_embed="rope",
        rope={"frequencies": (7e-4, 7.0)}, norm_layer="rms",
    )  # fmt: skip
    of = build("capi")(config, vit, HORIZON)
    found = {n: (g["lr_scale"], g["weight_decay_scale"]) for g in of.param_groups() for n in g["names"]}
    expected = {
        "encoder.patch_embed.proj.weight": (0.2, 1.0),
        "encoder.patch_embed.proj.bias": (0.2, 0.0),
        "encoder.reg_token": (1.0, 1.0),
        "encoder.blocks.0.norm1.weight": (1.0, 0.1),
        "encoder.blocks.0.attn.rope.freqs": (0.5, 1.0),
        "predictor.blocks.1.attn.rope.freqs": (0.5, 1.0),
        "predictor.mask_token": (1.0, 1.0),
        "head.weight_g": (1.0, 1.0),
        "clustering.weight": (0.5, 0.1),
        "clustering.bias": (0.5, 0.1),
    }
    assert {name: found[name] for name in expected} == expected
    assert "encoder.norm.weight" not in found and "predictor.norm.weight" not in found


def test_the_batch_has_drop_path_numbers_of_encoder_and_predictor():
    assert CAPIConfig(predictor_depth=3).views(Shape(size=(64, 64)))[-1] == Noise("drop_path", (5, 2))


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({}, Shape(), "mask 'mask': mask_ratio 0.65 and predicted 0.05 hide 7 of 12 patches and predict 0"),
        ({"predicted_ratio": 0.5}, Shape(drop_path_rate=0.1), "the student uses objective.drop_path_rate"),
        ({"predicted_ratio": 0.5, "predictor_num_heads": 3}, Shape(), "3 heads of 16 channels"),
        ({"predicted_ratio": 0.5}, Shape(provides=frozenset({"patches", "keep"})), "drop_path_subset: true needs"),
        ({"predicted_ratio": 0.5, "crop_scale": (0.9, 0.5)}, Shape(), "objective.crop_scale: 0.9 is larger than 0.5"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in CAPIConfig(**config).problems(shape))
