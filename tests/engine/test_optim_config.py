"""What is written in the optimizer's section arrives in the optimizer, and contradictions are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig
from pretrain.core.configlib import ConfigError, load_config
from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.optim.table import KINDS
from pretrain.engine.plan import plan_steps
from tests.engine.settings import schedules_of, settings

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
    steps, _ = plan_steps(config, EngineConfig(), num_samples=51_200, world_size=1)
    assert steps.milestones == (700, 850)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "multistep"}, "multistep requires them"),
        ({"milestone_epochs": (3,)}, r"milestone_epochs: \[3.0\] with schedule cosine"),
        ({"schedule": "multistep", "milestone_epochs": (5, 3)}, "must be positive and ascending"),
        ({"schedule": "constant", "min_lr": 0.1}, "min_lr: 0.1, but schedule constant does not end there"),
        ({"power": 0.9}, "power: 0.9 with schedule cosine"),
        ({"warmup_lr": 0.1}, "warmup_lr: 0.1 without a warm-up"),
        ({"blr": 1.0}, "give one of lr and blr, not both"),
    ],
)
def test_contradictions_are_named(wrong: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**BASE | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "lion", "momentum": 0.9}, r"momentum: lion does not have it; .* sgd, lars, muon; lion has betas"),
        ({"name": "sgd", "betas": (0.9, 0.95)}, r"betas: sgd .*optim.betas=null.*; sgd has momentum, nesterov"),
        ({"trust_coefficient": 0.001}, "trust_coefficient: adamw does not have it"),
        ({"name": "lamb", "nesterov": True}, "nesterov: lamb does not have it"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov: needs a momentum above 0"),
        ({"name": "schedule_free_adamw"}, "schedule: cosine with schedule_free_adamw, .*optim.schedule=constant"),
        ({"name": "schedule_free_adamw", "schedule": "constant", "betas": (0, 0.9)}, "needs a first value above 0"),
    ],
)
def test_options_of_another_optimizer_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**BASE | wrong)


def test_an_optimizer_has_its_own_defaults_and_is_written_whole():
    muon = OptimConfig(**BASE, name="muon")
    assert (muon.momentum, muon.nesterov, muon.betas, muon.trust_coefficient) == (0.95, True, (0.9, 0.999), None)
    lion = OptimConfig(**BASE, name="lion")
    assert (lion.betas, lion.eps, lion.momentum) == ((0.9, 0.99), None, None)
    assert OptimConfig(**lion.model_dump(mode="json")) == lion
    assert OptimConfig(**BASE, name="sgd", betas=None).betas is None


def test_a_run_of_before_lists_the_options_of_all_optimizers_and_stays_valid():
    listed = {"betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.9, "trust_coefficient": 0.001}
    for name in ("adamw", "sgd", "lars"):
        assert OptimConfig(**BASE, name=name, **listed) == OptimConfig(**BASE, name=name)
    assert OptimConfig(**BASE | listed | {"betas": (0.9, 0.95), "momentum": 0.8}).betas == (0.9, 0.95)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stage", range(4))
def test_an_optimizer_runs_in_the_engines_of_the_table_and_is_refused_in_others(name: str, stage: int):
    overrides = [f"optim.name={name}", "optim.betas=null", "optim.eps=null", "probe=null", "optim.min_lr=0"]
    overrides += ["optim.schedule=constant", "engine.name=deepspeed", f"engine.zero_stage={stage}"]
    if stage <= KINDS[name].max_zero_stage:
        load_config(PretrainConfig, CONFIG, overrides)
    else:
        with pytest.raises(ConfigError, match=rf"optim.name: {name} is not possible with ZeRO-{stage}, where no rank"):
            load_config(PretrainConfig, CONFIG, overrides)
    load_config(PretrainConfig, CONFIG, [*overrides, "engine.name=accelerate"])


def test_one_average_of_the_weights_is_evaluated():
    overrides = ["optim.name=schedule_free_adamw", "optim.schedule=constant", "optim.min_lr=0"]
    with pytest.raises(ConfigError, match=r"schedule_free_adamw evaluates its own average .* the teacher of dino"):
        load_config(PretrainConfig, CONFIG.with_name("dino.yaml"), overrides)
    recipe = CONFIG.parents[1] / "finetune" / "grocery_small.yaml"
    with pytest.raises(ConfigError, match=r"schedule_free_adamw evaluates its own average .* optim.ema_decay"):
        load_config(FinetuneConfig, recipe, [*overrides, "optim.ema_decay=0.9"])


def test_clipping_by_module_is_for_objectives_that_name_them():
    with pytest.raises(ConfigError, match="per_module is for objectives that name their modules, mae does not"):
        load_config(PretrainConfig, CONFIG, ["optim.clip_grad=3", "optim.clip_mode=per_module"])
    recipes = sorted(CONFIG.parents[1].glob("pretrain/dinov2*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(PretrainConfig, recipe).optim.clip_mode == "per_module"


def test_weight_decay_can_follow_phases_and_a_cosine_can_end_early_in_its_last_step():
    phases = {"start": 0.0, "peak": 0.2, "end": 0.1, "warmup_epochs": 2, "cosine_epochs": 3}
    chosen = settings(
        lr=1.0, min_lr=0.1, total_steps=9, cosine_form="closed", cosine_epochs=4, weight_decay_schedule=phases
    )
    schedules = schedules_of(chosen)
    assert [schedules.weight_decay_at(step) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.15, 0.1, 0.1, 0.1])
    assert [schedules.lr_at(step) for step in (0, 3, 8)] == pytest.approx([1.0, 0.1, 0.1]) and schedules.lr_at(2) > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cosine_extra": 0.2}, "cosine_extra: 0.2, but cosine_form is open"),
        (
            {"cosine_share": 0.8, "cosine_form": "closed"},
            "cosine_share: 0.8 is of an open cosine to the end of the run",
        ),
        (
            {"cosine_epochs": 2, "schedule": "constant"},
            "cosine_epochs: 2.0 with schedule constant; only cosines use it",
        ),
        (
            {"weight_decay_end": 0.1, "weight_decay_schedule": {"start": 0, "peak": 1, "end": 1}},
            "weight_decay_end: 0.1, but weight_decay_schedule has its own",
        ),
    ],
)
def test_settings_of_schedules_without_an_effect_are_named(given: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**BASE | given)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.name=deepspeed", "engine.zero_stage=2"], "optim.sam: not possible with ZeRO-2"),
        (["engine.precision=fp16"], "optim.sam: not possible in fp16"),
        (["optim.sam.rho=0"], "optim.sam.rho"),
    ],
)
def test_sharpness_aware_steps_are_refused_where_they_cannot_be(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(PretrainConfig, CONFIG, ["optim.sam={rho: 0.05}", *overrides])
    load_config(PretrainConfig, CONFIG, ["optim.sam={rho: 2.0, adaptive: true}", "engine.precision=bf16"])
