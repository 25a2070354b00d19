"""What is written in the optimizer's section arrives in the optimizer, and contradictions are named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, load_config
from pretrain.engine import build
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim.optimizer import OptimSettings

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "mae.yaml"
BASE: dict[str, Any] = {"global_batch_size": 512, "epochs": 10, "lr": 1.0}


@given(st.integers(1, 1 << 16), st.integers(1, 4096), st.floats(1e-6, 10.0))
def test_the_rules_of_the_base_learning_rate_agree_at_the_reference_batch(batch, reference, blr):
    def peak(rule: str, size: int) -> float:
        config = {"global_batch_size": size, "epochs": 1, "blr": blr, "blr_rule": rule, "blr_batch": reference}
        return OptimConfig(**config).peak_lr

    assert peak("linear", reference) == peak("sqrt", reference) == pytest.approx(blr)
    assert peak("linear", batch) == pytest.approx(blr * batch / reference)
    assert peak("sqrt", batch) ** 2 == pytest.approx(blr**2 * batch / reference)


def test_the_official_rules():
    assert OptimConfig(global_batch_size=4096, epochs=1, blr=1.5e-4).peak_lr == pytest.approx(2.4e-3)  # MAE
    dinov2 = OptimConfig(global_batch_size=2048, epochs=1, blr=0.004, blr_rule="sqrt", blr_batch=1024)
    assert dinov2.peak_lr == pytest.approx(0.004 * 2**0.5)
    assert OptimConfig(global_batch_size=2048, epochs=1, blr=1e-4, blr_batch=512).peak_lr == pytest.approx(4e-4)


def test_milestones_are_epochs_and_become_steps():
    config = OptimConfig(**BASE, schedule="multistep", milestone_epochs=(7, 8.5))
    assert config.milestones(100) == (700, 850)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "multistep"}, "multistep needs them"),
        ({"milestone_epochs": (3,)}, r"milestone_epochs: \[3.0\] with schedule cosine"),
        ({"schedule": "multistep", "milestone_epochs": (5, 3)}, "not positive and ascending"),
        ({"schedule": "constant", "min_lr": 0.1}, "min_lr: 0.1, but schedule constant does not end there"),
        ({"power": 0.9}, "power: 0.9 with schedule cosine"),
        ({"warmup_lr": 0.1}, "warmup_lr: 0.1 without a warm-up"),
        ({"blr": 1.0}, "give one of lr and blr, not both"),
    ],
)
def test_contradictions_are_named(wrong: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**BASE | wrong)


def test_clipping_by_module_is_for_objectives_that_name_them():
    with pytest.raises(ConfigError, match="per_module is for objectives that name their modules, mae does not"):
        load_config(PretrainConfig, CONFIG, ["optim.clip_grad=3", "optim.clip_mode=per_module"])
    recipes = sorted(CONFIG.parents[1].glob("pretrain/dinov2*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(PretrainConfig, recipe).optim.clip_mode == "per_module"


def test_every_key_reaches_the_engine(monkeypatch: pytest.MonkeyPatch):
    """Each is set to a value that no default has."""
    changes = [
        *("name=lars", "schedule=multistep", "milestone_epochs=[1]", "gamma=0.3", "warmup_lr=0.01", "momentum=0.7"),
        *("warmup_form=closed", "first_step=1", "weight_decay=0.3", "weight_decay_end=0.4", "betas=[0.5,0.6]"),
        *("eps=0.1", "trust_coefficient=0.02", "clip_grad=2", "clip_mode=per_tensor", "warmup_steps=1", "min_lr=0"),
    ]
    config = load_config(PretrainConfig, CONFIG, [f"optim.{change}" for change in changes])
    steps = plan(config, num_samples=1000, world_size=1)
    given: dict[str, OptimSettings] = {}
    monkeypatch.setattr(build, "build_engine", lambda trainable, *, optim, **others: given.update(optim=optim))
    world: Any = None
    build.engine_of(
        None,
        optim=config.optim,
        engine=config.engine,
        steps=steps,
        world=world,
        seed=0,
        head_prefixes=("decoder.",),
    )
    settings = given["optim"]
    assert settings.milestones == (steps.steps_per_epoch,)
    assert (settings.lr, settings.total_steps, settings.warmup_steps) == (steps.lr, steps.total_steps, 1)
    same = {field.name for field in fields(OptimSettings)} & set(OptimConfig.model_fields) - {"lr", "total_steps"}
    assert {name: getattr(settings, name) for name in same} == {name: getattr(config.optim, name) for name in same}
    with_default = {f.name for f in fields(OptimSettings) if getattr(settings, f.name) == f.default}
    with_default -= {"min_lr", "power", "head_warmup_steps"}  # not of this schedule, and not of this section
    assert not with_default, f"these were not set here: {with_default}"
