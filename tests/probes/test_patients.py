"""Runs made to fail on purpose are named within 50 steps; healthy runs of every objective are left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

from .patients import (
    DINO_TINY,
    MAE_TINY,
    STEPS,
    Copied,
    OneImage,
    Uncentred,
    Unstopped,
    become,
    deaden,
    settings,
    treat,
)

HOT = {"teacher_temp": 10.0, "warmup_teacher_temp": 10.0}
COLD = {"teacher_temp": 1e-4, "warmup_teacher_temp": 1e-4}


@pytest.mark.parametrize(
    ("objective", "changes", "infect", "first"),
    [
        pytest.param(DINO_TINY, {}, become(Uncentred), "center_still", id="no centering"),
        pytest.param(DINO_TINY, {}, become(Unstopped), "teacher_one_prototype", id="no stop-gradient"),
        pytest.param(DINO_TINY | COLD, {}, None, "teacher_one_hot", id="teacher temperature near 0"),
        pytest.param(DINO_TINY | HOT, {}, None, "teacher_uniform", id="teacher temperature 10"),
        pytest.param(DINO_TINY, {"optim": {"lr": 0.1}}, None, "learning_rate_too_high", id="DINO, lr x100"),
        pytest.param(MAE_TINY, {"optim": {"lr": 0.1}}, None, "learning_rate_too_high", id="MAE, lr x100"),
        pytest.param(MAE_TINY, {"optim": {"lr": 1e-9}}, None, "weights_still", id="lr near 0"),
        pytest.param(DINO_TINY | {"momentum_teacher": 1.0}, {}, None, "teacher_still", id="momentum 1"),
        pytest.param(DINO_TINY, {}, become(Copied), "teacher_identical", id="momentum 0"),
        pytest.param(DINO_TINY, {}, become(OneImage), "features_constant", id="one image"),
        pytest.param(MAE_TINY, {}, deaden, "dead_gradients", id="a block without gradients"),
    ],
)
def test_a_planted_failure_is_named_within_50_steps(objective, changes, infect, first: str, tmp_path: Path):
    report = treat(settings(objective, tmp_path, **changes), infect)
    assert report.rules, f"not noticed; the last row is {report.rows[STEPS]}"
    assert report.rules[0] == first, report.verdicts
    assert report.verdicts[0].step <= STEPS


def test_without_centering_the_collapse_itself_is_named_too(tmp_path: Path):
    assert "teacher_one_prototype" in treat(settings(DINO_TINY, tmp_path), become(Uncentred)).rules
