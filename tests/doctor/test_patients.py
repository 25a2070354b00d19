"""Runs made to fail on purpose are named within 50 steps; healthy runs of every objective are left in peace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import PretrainConfig
from pretrain.core.configlib import load_config
from tests.doctor.patients import (
    CAPI_TINY,
    DINO_TINY,
    GENERAL,
    MAE_TINY,
    STEPS,
    Copied,
    OneImage,
    PositionsAlone,
    Uncentred,
    Unstopped,
    become,
    deaden,
    decide,
    hold_router,
    hold_strength,
    settings,
    treat,
)
from tests.objectives.released import reads
from tests.runs import ROOT, SHARDS

pytestmark = pytest.mark.slow

HOT = {"teacher_temp": 10.0, "warmup_teacher_temp": 10.0}
COLD = {"teacher_temp": 1e-4, "warmup_teacher_temp": 1e-4}


@pytest.mark.parametrize(
    ("objective", "changes", "infect", "first"),
    [
        pytest.param(DINO_TINY, {}, become(Unstopped), "teacher_one_prototype", id="no stop-gradient"),
        pytest.param(DINO_TINY | COLD, {}, None, "teacher_one_hot", id="teacher temperature near 0"),
        pytest.param(DINO_TINY | HOT, {}, None, "teacher_uniform", id="teacher temperature 10"),
        pytest.param(DINO_TINY, {"optim": {"lr": 0.1}}, None, "learning_rate_too_high", id="DINO, lr x100"),
        pytest.param(MAE_TINY, {"optim": {"lr": 0.1}}, None, "learning_rate_too_high", id="MAE, lr x100"),
        pytest.param(MAE_TINY, {"optim": {"lr": 1e-9}}, None, "weights_still", id="lr near 0"),
        pytest.param(DINO_TINY | {"momentum_teacher": 1.0}, {}, None, "teacher_still", id="momentum 1"),
        pytest.param(CAPI_TINY, {}, become(PositionsAlone), "teacher_uniform", id="clusters alike"),
        pytest.param(
            CAPI_TINY | {"positionwise": False},
            {},
            become(PositionsAlone),
            "teacher_uninformative",
            id="clusters of positions",
        ),
        pytest.param(CAPI_TINY | {"teacher_temp": 20.0}, {}, None, "teacher_uniform", id="CAPI, temperature 20"),
        pytest.param(CAPI_TINY | {"momentum_teacher": 1.0}, {}, None, "teacher_still", id="CAPI, momentum 1"),
        pytest.param(DINO_TINY, {}, become(OneImage), "features_constant", id="one image"),
        pytest.param(MAE_TINY, {}, deaden, "dead_gradients", id="a block without gradients"),
    ],
)
def test_a_planted_failure_is_named_within_50_steps(objective, changes, infect, first: str, tmp_path: Path):
    report = treat(settings(objective, tmp_path, **changes), infect, until_named=True)
    assert report.rules, f"not noticed; the last row is {report.rows[STEPS]}"
    assert report.rules[0] == first, report.verdicts
    assert report.verdicts[0].step <= STEPS


def test_a_router_that_decided_before_training_is_named_at_once(tmp_path: Path):
    report = treat(settings(MAE_TINY, tmp_path, model=GENERAL), decide, until_named=True)
    assert report.rules == ["router_dead"] and report.verdicts[0].step <= STEPS


@pytest.mark.parametrize(
    ("infect", "rules"),
    [(hold_router, ["router_idle"]), (hold_strength, ["branches_unused"]), (None, [])],
    ids=["routers held", "strengths held", "healthy"],
)
def test_a_general_block_that_does_not_choose_is_named_after_its_warm_up(infect, rules: list[str], tmp_path: Path):
    changes: dict[str, Any] = {"optim": {"total_steps": 240, "warmup_steps": 5}, "doctor": {"every_steps": 20}}
    report = treat(settings(MAE_TINY, tmp_path, model=GENERAL, **changes), infect)
    assert report.rules == rules, report.rows[240]


def test_a_teacher_that_is_the_student_is_named_beside_the_collapse(tmp_path: Path):
    assert {"teacher_one_prototype", "teacher_identical"} <= set(
        treat(settings(DINO_TINY, tmp_path), become(Copied)).rules
    )


def test_without_centering_the_collapse_is_named_and_then_its_reason(tmp_path: Path):
    rules = treat(settings(DINO_TINY, tmp_path), become(Uncentred)).rules
    assert rules[0] == "teacher_one_prototype" and "center_still" in rules


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "debug").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_healthy_debug_run_gives_no_alarm(path: Path, tmp_path: Path):
    """The debug configurations as they are, but for 16 images a step and 15 steps."""
    name = path.stem
    changes = ["data.num_workers=0", "optim.global_batch_size=16", "optim.total_steps=15", "optim.warmup_steps=5"]
    changes += [f"data.shards={SHARDS / 'train'}", f"run_dir={tmp_path}", "doctor.every_steps=3"]
    changes += [f"objective.{key}={value}" for key, value in reads(name, (64, 64), 3).items()]
    report = treat(load_config(PretrainConfig, path, changes))
    assert len(report.rows) == 15 and not report.verdicts, report.verdicts


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("objective", [DINO_TINY, MAE_TINY], ids=["dino", "mae"])
def test_healthy_runs_of_other_seeds_give_no_alarm(objective, seed: int, tmp_path: Path):
    assert treat(settings(objective, tmp_path, seed=seed)).verdicts == []
