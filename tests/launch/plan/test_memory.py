"""The memory estimate: counted on shapes alone, it is what the same step keeps alive with real numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.plan.memory import LiveBytes, empty_batch, footprint, fused_attention
from pretrain.config import PretrainConfig
from pretrain.core.configlib import load_config
from pretrain.objectives.base import Horizon
from pretrain.start import build_objective
from tests.runs import ROOT

IMAGES = 4


def debug(name: str, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, ROOT / "configs" / "debug" / f"{name}.yaml", overrides)


def real_peak(config: PretrainConfig) -> int:
    """Bytes that a real step keeps alive in addition to state and gradients."""
    with fused_attention(), LiveBytes(real=True) as memory:
        objective: Any = build_objective(config, Horizon(1000, 100))
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        batch = {
            name: torch.rand_like(t) if t.is_floating_point() else t for name, t in empty_batch(config, IMAGES).items()
        }
        start = memory.peak = memory.live
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16"):
            loss = objective(batch, 0)["loss"]
        loss.backward()
        return memory.peak - start


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mae", "dino"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_what_a_real_step_keeps_alive(objective: str, precision: str):
    config = debug(objective, f"engine.precision={precision}")
    found = footprint(config)
    assert found.per_batch + IMAGES * found.per_image == pytest.approx(real_peak(config), rel=0.05)


@pytest.mark.slow
def test_trained_and_fixed_state_are_those_of_the_objective():
    objective: Any = build_objective(debug("dino"), Horizon(1000, 100))
    found = footprint(debug("dino"))
    assert found.trained == sum(p.numel() * 4 for p in objective.parameters() if p.requires_grad)
    total = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    assert found.fixed == total - found.trained


@pytest.mark.slow
def test_each_zero_stage_divides_more():
    found = footprint(debug("mae"))
    sizes = [found.total(images=8, zero_stage=stage, world_size=64) for stage in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
