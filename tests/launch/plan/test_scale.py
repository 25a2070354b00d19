"""The recipe scaler: every duration stays the same in samples, every average covers as many samples as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.plan.scale import main, scale
from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, load_config, read_values, validate

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "pretrain").glob("*.yaml"))
DINO: dict[str, Any] = {
    "run_dir": "runs/x",
    "objective": {"name": "dino", "momentum_teacher": 0.996},
    "model": {"pos_embed": "learned"},
    "data": {"shards": "shards/train"},
    "optim": {"lr": 1e-3, "min_lr": 1e-6, "global_batch_size": 512, "total_steps": 1000, "warmup_steps": 100},
}


def config_of(values: dict[str, Any]) -> PretrainConfig:
    return validate(PretrainConfig, values, source="test")


@given(gpus=st.integers(1, 64), batch=st.sampled_from([8, 16, 32, 64]), accumulation=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_samples_seen_and_the_memory_of_the_average_stay(gpus: int, batch: int, accumulation: int):
    scaled = config_of(scale(DINO, gpus=gpus, batch_per_gpu=batch, accumulation=accumulation).values)
    old, new = config_of(DINO), scaled
    k = new.optim.global_batch_size / old.optim.global_batch_size
    assert new.optim.global_batch_size == gpus * batch * accumulation
    assert new.optim.lr == pytest.approx(old.optim.peak_lr * k)
    for key in ("total_steps", "warmup_steps"):
        samples = [getattr(c.optim, key) * c.optim.global_batch_size for c in (old, new)]
        assert samples[1] == pytest.approx(samples[0], abs=new.optim.global_batch_size)
    assert isinstance(new.objective.name, str) and 0 < new.objective.momentum_teacher < 1  # type: ignore[union-attr]
    assert new.objective.momentum_teacher == pytest.approx(0.996**k)  # type: ignore[union-attr]


@pytest.mark.parametrize(("gpus", "batch", "accumulation"), [(1, 512, 1), (3, 64, 3), (5, 64, 2), (64, 64, 1)])
def test_as_few_micro_batches_are_summed_as_reach_the_batch_of_the_recipe(gpus: int, batch: int, accumulation: int):
    assert config_of(scale(DINO, gpus=gpus, batch_per_gpu=batch).values).engine.accumulation_steps == accumulation


def test_steps_inside_a_part_of_the_objective_are_scaled_too_and_a_checkpoint_never_comes_later():
    recipe = next(path for path in RECIPES if path.stem == "dinov2_vit_large_gram_highres")
    values = read_values(recipe) | {"checkpoint": {"every_steps": 500}}
    batch = values["optim"]["global_batch_size"]
    smaller, larger = (
        scale(values, gpus=1, batch_per_gpu=size, accumulation=1).values for size in (batch // 4, batch * 4)
    )
    refresh = values["objective"]["gram"]["refresh_steps"]
    assert smaller["objective"]["gram"]["refresh_steps"] == refresh * 4
    assert larger["objective"]["gram"]["refresh_steps"] == refresh // 4
    assert smaller["checkpoint"]["every_steps"] == 500 and larger["checkpoint"]["every_steps"] == 125
    assert values["objective"]["gram"]["refresh_steps"] == refresh, "the recipe itself is left alone"


def test_scaling_there_and_back_gives_the_recipe_again():
    there = scale(DINO, gpus=8, batch_per_gpu=128, accumulation=1).values
    back = config_of(scale(there, gpus=8, batch_per_gpu=64, accumulation=1).values)
    old = config_of(DINO)
    assert back.optim.lr == pytest.approx(old.optim.lr)
    assert back.objective.momentum_teacher == pytest.approx(0.996)  # type: ignore[union-attr]
    assert back.optim.total_steps == old.optim.total_steps


def test_a_base_learning_rate_is_left_to_its_own_formula():
    values = copy.deepcopy(DINO) | {"objective": {"name": "mae"}}
    values["optim"] = {"blr": 1.5e-4, "global_batch_size": 512, "epochs": 10}
    scaled = scale(values, gpus=16, batch_per_gpu=64, accumulation=1)
    assert scaled.values["optim"]["blr"] == 1.5e-4
    assert config_of(scaled.values).optim.peak_lr == pytest.approx(2 * config_of(values).optim.peak_lr)


def test_another_rule_than_the_recipe_s_changes_the_base_learning_rate():
    values = copy.deepcopy(DINO) | {"objective": {"name": "mae"}}
    values["optim"] = {"blr": 1.5e-4, "global_batch_size": 512, "epochs": 10}
    for rule, factor in (("sqrt", 2**0.5), ("none", 1.0), ("linear", 2.0)):
        scaled = config_of(scale(values, gpus=16, batch_per_gpu=64, accumulation=1, lr_rule=rule).values)  # type: ignore[arg-type]
        assert scaled.optim.peak_lr == pytest.approx(factor * config_of(values).optim.peak_lr), rule


def test_the_same_batch_changes_nothing_but_the_micro_batches():
    scaled = scale(DINO, gpus=4, batch_per_gpu=32)
    assert [change.key for change in scaled.changes] == ["engine.accumulation_steps"]
    assert scaled.values["engine"]["accumulation_steps"] == 4
    assert not scaled.untested


def test_settings_that_no_rule_covers_are_listed():
    text = " ".join(scale(DINO, gpus=64, batch_per_gpu=64, accumulation=1).untested)
    assert "8-fold" in text and "optim.lr" in text and "teacher_temp" in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_scales_to_two_gpus_and_lists_the_changes(recipe: Path, tmp_path: Path, capsys):
    out = tmp_path / "scaled.yaml"
    assert main([str(recipe), "--gpus", "2", "--batch-per-gpu", "32", "--out", str(out), "--no-memory"]) == 0
    printed = capsys.readouterr().out
    batch = read_values(recipe)["optim"]["global_batch_size"]
    assert ("optim.global_batch_size" in printed) == (batch % 64 != 0)
    scaled = load_config(PretrainConfig, out)
    plan(scaled, num_samples=1_281_167, world_size=2)
    assert yaml.safe_load(out.read_text())["optim"]["global_batch_size"] == scaled.optim.global_batch_size


def test_a_wrong_count_and_a_wrong_recipe_end_with_two(tmp_path: Path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(DINO))
    assert main([str(path), "--gpus", "0", "--batch-per-gpu", "8"]) == 2
    assert "gpus must be at least 1, got 0" in capsys.readouterr().err
    assert main([str(path), "objective.momentum_teacherr=0.9", "--gpus", "1", "--batch-per-gpu", "8"]) == 2
    assert "did you mean momentum_teacher" in capsys.readouterr().err
    assert main([str(path), "--gpus", "1", "--batch-per-gpu", "8", "--out", f"{tmp_path}/none/x.yaml"]) == 2
    assert "none/x.yaml: cannot be written: No such file or directory" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        scale({"run_dir": "x"}, gpus=1, batch_per_gpu=1)


def test_with_a_missing_tokenizer_the_recipe_is_written_without_the_memory(tmp_path: Path, capsys):
    out = tmp_path / "scaled.yaml"
    recipe = next(path for path in RECIPES if path.stem == "beit_vit_base")
    assert main([str(recipe), "--gpus", "2", "--batch-per-gpu", "32", "--out", str(out)]) == 0
    assert "memory not estimated" in capsys.readouterr().out
    assert load_config(PretrainConfig, out).optim.global_batch_size == 2048
