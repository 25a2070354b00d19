from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks import sparsity
from benchmarks.compare import Comparison, compare, gflops
from benchmarks.paired import difference
from pretrain.core.configlib import ConfigError, load_config
from tests.runs import ROOT, SHARDS

PLANS = sorted((ROOT / "configs" / "results" / "attention").glob("*.yaml"))
TINY: dict[str, Any] = {
    "config": {
        "objective": {"name": "mae", "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
        "model": {"name": "vit_tiny", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
        "data": {"shards": str(SHARDS / "train"), "num_workers": 0},
        "optim": {"lr": 1e-3, "global_batch_size": 16, "total_steps": 6, "warmup_steps": 2},
        "checkpoint": {"release_graphs": False},
        "log": {"tensorboard": False},
        "doctor": None,
    },
    "arms": {"plain": [], "again": ["model.depth=1"], "deep": ["model.depth=4"]},
    "pairs": [["again", "plain"], ["deep", "plain"]],
    "seeds": 2,
    "train": str(SHARDS / "train"),
    "val": str(SHARDS / "val"),
    "feature": "cls",
}


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 5))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    found = difference(ours.tolist(), theirs.tolist())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_only_an_interval_that_excludes_zero_is_a_claim():
    assert difference([2, 2.1, 2.2], [1, 1, 1]).verdict == "better"
    assert difference([1, 1, 1], [2, 2.1, 2.2]).verdict == "worse"
    assert difference([1, 3, 1], [2, 1, 1]).verdict == "no difference seen"
    assert difference([3], [1]).verdict == "no difference seen"
    assert difference([3, 3], [1, 1]).verdict == "no difference seen", "equal steps of an accuracy, not certainty"


@pytest.mark.slow
def test_equal_arms_are_equal_and_what_costs_more_gets_fewer_steps(tmp_path: Path):
    plan, out = load_config(Comparison, TINY), tmp_path / "out"
    first = next(compare(plan, out))
    assert (
        "| again - plain | +0.0 [-inf, +inf] | no difference seen | +0.0 [-inf, +inf] | no difference seen |" in first
    )
    *_, last = compare(plan, out)
    assert f"| again - plain | {' | '.join(['+0.0 [+0.0, +0.0] | no difference seen'] * 2)} |" in last
    for score in (out / "steps").rglob("score.json"):
        cost = 9.0 if "deep" in score.parts else 3.0
        score.write_text(json.dumps(json.loads(score.read_text()) | {"cpu_seconds": cost}))
    shutil.rmtree(out / "cpu")
    again = list(compare(plan, out))
    scores = list((out / "cpu").rglob("score.json"))
    assert [json.loads(score.read_text())["steps"] for score in scores] == [2, 2]
    assert {score.parent.parent.name for score in scores} == {"deep"}
    assert list(compare(plan, out)) == again
    only_steps = load_config(Comparison, TINY | {"budgets": ["steps"]})
    assert list(compare(only_steps, out)) == again[:2]
    _the_share_of_active_units_is_drawn_beside_the_accuracy(out)


def _the_share_of_active_units_is_drawn_beside_the_accuracy(comparison: Path) -> None:
    found = sparsity.read(comparison)
    assert list(found) == ["again", "deep", "plain"]
    rows = [json.loads(path.read_text()) for path in sorted((comparison / "steps" / "plain").glob("*/score.json"))]
    assert found["plain"]["active"].tolist() == [100 * row["active"] for row in rows]
    assert all(50 < value <= 100 for value in found["plain"]["active"])  # GELU has no zeros
    means = [sum(100 * row[name] for row in rows) / 2 for name in ("active", "hoyer", "knn", "linear")]
    assert f"| plain | {' | '.join(f'{mean:.1f}' for mean in means)} |" in sparsity.table(found)
    figure = sparsity.picture(found)
    arms = sorted(found, key=lambda arm: found[arm]["active"].mean())
    assert [text.get_text().split()[0] for text in figure.legends[0].get_texts()] == arms
    for axes in figure.axes:
        points = [bars[0].get_xdata()[0] for bars in axes.containers]
        assert points == [found[arm]["active"].mean() for arm in arms]


def test_a_folder_without_scores_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no scores of a comparison"):
        sparsity.read(tmp_path)
    (tmp_path / "steps/plain/0").mkdir(parents=True)
    (tmp_path / "steps/plain/0/score.json").write_text('{"knn": 0.5, "linear": 0.5}')
    with pytest.raises(ValueError, match="have no active and hoyer"):
        sparsity.read(tmp_path)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_wider_arm_of_a_plan_has_the_operations_of_what_it_stands_for(path: Path):
    plan = load_config(Comparison, path)
    assert f"python -m benchmarks.compare {path.relative_to(ROOT)} --out" in path.read_text()
    for arm, against in plan.pairs:
        if against.startswith("wider"):
            assert math.isclose(gflops(plan, arm), gflops(plan, against), rel_tol=0.02)


def test_a_pair_of_unknown_arms_is_refused():
    with pytest.raises(ConfigError, match="deeper is no arm"):
        load_config(Comparison, TINY | {"pairs": [["deeper", "plain"]]})
