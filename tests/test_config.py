"""The recipes are the official ones, and a plan follows from a configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, dump, load_config
from pretrain.objectives.configs.capi import CAPIConfig

CONFIGS = Path(__file__).parent.parent / "configs"
PLANS = CONFIGS / "results" / "attention"  # of comparisons, tests/benchmarks
RECIPES = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent != PLANS and "\ntask:" not in path.read_text()
)  # not of fine-tuning
IMAGENET = 1_281_167


def load(name: str, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_opens_with_its_command_and_survives_a_round_trip(path: Path, tmp_path: Path):
    config = load_config(PretrainConfig, path)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_config(PretrainConfig, tmp_path / "resolved.yaml") == config
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("fovea " in line for line in head)


@pytest.mark.parametrize(("size", "patch"), [("base", 16), ("large", 16), ("huge", 14)])
def test_mae_has_the_hyper_parameters_of_table_8(size: str, patch: int):
    config = load(f"pretrain/mae_vit_{size}")
    steps = plan(config, num_samples=IMAGENET, world_size=64)
    assert steps.lr == pytest.approx(2.4e-3) and steps.micro_batch == 64
    assert steps.total_steps == 800 * 312 and steps.warmup_steps == 40 * 312
    assert config.model.patch_size == patch and config.model.pos_embed == "sincos"
    assert (config.objective.mask_ratio, config.objective.decoder_embed_dim, config.objective.decoder_depth) == (
        0.75,
        512,
        8,
    )
    assert config.optim.betas == (0.9, 0.95) and config.optim.weight_decay == 0.05 and config.optim.clip_grad is None


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "temp", "warmup_temp_epochs", "norm_last"),
    [
        ("dino_vit_small", 1e-3, 100, 0.04, 0, True),
        ("dino_vit_small_300ep", 2e-3, 300, 0.07, 30, False),
        ("dino_vit_base", 2e-3, 400, 0.07, 50, True),
    ],
)
def test_dino_has_the_official_hyper_parameters(
    name: str, lr: float, epochs: int, temp: float, warmup_temp_epochs: int, norm_last: bool
):
    config = load(f"pretrain/{name}")
    objective, optim = config.objective, config.optim
    steps = plan(config, num_samples=IMAGENET, world_size=8)
    assert steps.lr == pytest.approx(5e-4 * optim.global_batch_size / 256) == pytest.approx(lr)
    assert steps.total_steps == epochs * steps.steps_per_epoch and steps.warmup_steps == 10 * steps.steps_per_epoch
    assert (objective.teacher_temp, objective.warmup_teacher_temp_epochs) == (temp, warmup_temp_epochs)
    assert (objective.out_dim, objective.momentum_teacher, objective.drop_path_rate) == (65536, 0.996, 0.1)
    assert objective.norm_last_layer is norm_last and objective.local_crops_number == 8
    assert (optim.weight_decay, optim.weight_decay_end, optim.clip_grad, optim.clip_mode) == (
        0.04,
        0.4,
        3,
        "per_tensor",
    )


def test_capi_has_the_official_hyper_parameters():
    config = load("pretrain/capi_vit_large14")
    steps = plan(config, num_samples=14_000_000, world_size=32)
    assert (steps.micro_batch, steps.total_steps, steps.warmup_steps, steps.lr) == (512, 500_000, 50_000, 1e-3)
    objective = config.objective
    assert isinstance(objective, CAPIConfig)
    mask = objective.mask(config.model)
    assert (mask.num_patches, mask.num_hidden, mask.num_predicted) == (256, 166, 8)
    assert objective.clustering_lr_scale * steps.lr == 5e-4
    assert objective.clustering_decay_scale * config.optim.weight_decay == pytest.approx(0.01)
    assert config.optim.betas == (0.9, 0.95) and config.optim.cosine_share == objective.momentum_share == 0.8


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 4096), st.integers(1, 10_000))
def test_a_batch_is_divided_without_remainder_or_refused(world: int, accumulation: int, batch: int, samples: int):
    config = load(
        "debug/mae",
        f"optim.global_batch_size={batch}",
        f"engine.accumulation_steps={accumulation}",
        "optim.warmup_steps=0",
    )
    if batch % (world * accumulation) or batch > samples:
        with pytest.raises(ConfigError, match=r"optim\.global_batch_size"):
            plan(config, num_samples=samples, world_size=world)
    else:
        steps = plan(config, num_samples=samples, world_size=world)
        assert steps.micro_batch * world * accumulation == batch
        assert steps.steps_per_epoch == samples // batch


def test_what_does_not_fit_together_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load("debug/dino", "model.img_size=65", "engine.name=deepspeed", "engine.zero_stage=3", "model.in_chans=4")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.img_size",
        "model.img_size",
        "data.mean",
        "data.std",
        "engine.zero_stage",
        "optim.clip_mode",
    ]


def test_keys_of_deepspeed_that_are_ours_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"train_batch_size, zero_optimization\.stage: set by optim and engine"):
        load("debug/mae", "engine.deepspeed={train_batch_size: 4, zero_optimization: {stage: 2}}")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("deepspeed={zero_optimization: 2}", "engine.deepspeed: zero_optimization: is a section, got the value 2"),
        ("deepspeed={zero_optimization: {offload_optimizer: cpu}}", "got the value 'cpu' (device: cpu)"),
        ("deepspeed={zero_optimization: {offload_param: {device: cpu}}}", "offload the optimizer only"),
        ("deepspeed={zero_optimization: {zenflow: {}, round_robin_gradients: true}}", "round_robin_gradients: not"),
        ("deepspeed=zero2.json", "engine.deepspeed: Input should be a valid dictionary, got 'zero2.json'"),
        ("compile=true", "engine: compile: not possible with zero_stage 3"),
    ],
)
def test_what_the_deepspeed_engine_cannot_do_is_found_before_it_starts(override: str, problem: str):
    with pytest.raises(ConfigError) as caught:
        load("debug/mae", "engine.name=deepspeed", "engine.zero_stage=3", f"engine.{override}")
    assert len(caught.value.problems) == 1 and problem in caught.value.problems[0]


def test_a_name_of_another_type_is_a_problem_like_any_other():
    with pytest.raises(ConfigError) as caught:
        load("debug/mae", "model.name=[vit_base]")
    assert caught.value.problems == ["model.name: Input should be a valid string, got ['vit_base']"]


def test_colours_need_rgb():
    with pytest.raises(ConfigError) as caught:
        load("debug/dino", "model.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "objective.color_jitter",
        "objective.grayscale_prob",
    ]
