from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.losses.sigreg import sigreg
from pretrain.objectives import build
from pretrain.objectives.configs.lejepa import LeJEPAConfig
from tests.engine.ranks import launch
from tests.engine.scenarios import ENGINES
from tests.golden.ranks import ALONE
from tests.objectives.lejepa_ranks import outcome, steps, under_engines
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch, objective

FORMS = ("multicrop", "minimal")


@pytest.mark.processes
def test_ranks_and_micro_batches_do_not_change_losses_and_gradients(tmp_path: Path):
    whole = {form: outcome(form, 1, ALONE) for form in FORMS}
    for world in (1, 2, 4):
        if world > 1:
            launch(steps, world=world, out=tmp_path / str(world))
        for form in FORMS:
            for accumulation in (1, 2, 4):
                if world > 1:
                    found = load_file(tmp_path / str(world) / f"{form}-{accumulation}-rank0.safetensors")
                else:
                    found = outcome(form, accumulation, ALONE)
                assert found.keys() == whole[form].keys()
                for name, expected in whole[form].items():
                    of_a_rank = name in ("feature_std", "projection_std") and world > 1
                    if of_a_rank or ("running_" in name and accumulation > 1):  # these move once per micro-batch
                        continue
                    case = f"{form}, {world} ranks, {accumulation} micro-batches: {name}"
                    torch.testing.assert_close(
                        found[name], expected, atol=1e-6, rtol=1e-5, msg=lambda text, case=case: f"{case}: {text}"
                    )


@pytest.mark.processes
def test_micro_batches_are_one_batch_under_every_engine(tmp_path: Path):
    cases = [("ddp", 1), *((name, 2) for name in ENGINES)]
    launch(under_engines, world=2, out=tmp_path, cases=cases)
    expected = load_file(tmp_path / "ddp-1.safetensors")
    for name, accumulation in cases:
        found = load_file(tmp_path / f"{name}-{accumulation}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-6, msg=f"{name}: {key}")


def test_a_survey_leaves_nothing_behind():
    of: Any = objective("lejepa")
    given = batch(of)
    alone = of(given, 0)["loss"]
    of.after_step(1)
    state = {name: value.clone() for name, value in of.state_dict().items()}
    with of.surveying(), torch.no_grad():
        assert of(given, 0) == {}
        of(batch(of, seed=1), 0)
    assert all(torch.equal(value, state[name]) for name, value in of.state_dict().items())
    together = of(given, 0)["loss"]
    assert not torch.equal(together, alone)
    of.discard_pending()
    of.load_state_dict(state)
    assert torch.equal(of(given, 0)["loss"], alone)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_agreement_and_the_statistic_as_the_form_weighs_them(form: str):
    of: Any = objective("lejepa", form=form, sigreg_weight=0.3)
    given = batch(of)
    losses = of(given, 5)
    z = of.projector(of.encode(given).flatten(0, 1)).unflatten(0, (4, 4))
    directions = of.directions(5, z.device)
    if form == "minimal":
        agreement = (z - z.mean(0)).square().mean()
        statistic = torch.stack([sigreg(view, directions).mean() for view in z]).mean()
        expected = 0.7 * agreement + 0.3 * statistic
    else:
        agreement = (z - (z[0] + z[1]) / 2).square().mean()
        statistic = sigreg(z.flatten(0, 1), directions).mean()
        expected = agreement + 0.3 * statistic
    torch.testing.assert_close(losses["invariance"], agreement.detach())
    torch.testing.assert_close(losses["sigreg"], statistic.detach())
    torch.testing.assert_close(losses["loss"], expected)


def test_a_convolutional_network_trains():
    config = LeJEPAConfig(**SMALL["lejepa"] | {"local_crops_size": 32})
    of: Any = build("lejepa")(config, TimmBackbone("resnet10t", (32, 32), 3), HORIZON)  # pyright: ignore[reportArgumentType]
    shape = Shape(size=(32, 32))
    losses = of(batch(of, shape), 0)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in of.parameters())


def test_all_crops_have_the_same_colours():
    *crops, local, drop_path = LeJEPAConfig(global_crops_number=3).views(Shape(size=(224, 224), drop_path_rate=0.1))
    assert len(set(crops)) == 1 and len(crops) == 3 and isinstance(local, ViewSpec)
    assert (local.jitter, local.blur, local.solarize) == (crops[0].jitter, crops[0].blur, crops[0].solarize)
    assert local.solarize == 0.2 and local.count == 6 and drop_path == Noise("drop_path", (9, 2, 2))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"global_crops_number": 1, "local_crops_number": 0}, "1 crop in all agrees with itself"),
        ({"num_points": 16}, "objective.num_points: 16 is even; give 17"),
        ({"local_crops_scale": (0.4, 0.1)}, "objective.local_crops_scale: 0.4 is larger than 0.1"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, problem: str):
    assert any(problem in found for found in LeJEPAConfig(**config).problems(Shape(size=(224, 224))))


def test_the_defaults_have_no_problem():
    assert LeJEPAConfig().problems(Shape(size=(224, 224), patch_size=16)) == []
