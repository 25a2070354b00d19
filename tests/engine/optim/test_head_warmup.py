"""Fresh heads train first, on a frozen backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.engine.build import build_engine
from pretrain.engine.optim.head_warmup import HeadWarmup, freeze_backbone
from tests.engine.settings import settings
from tests.engine.toys import batches, tiny_dino

WARMUP = 3


def train(steps: int, *, head_warmup_steps: int) -> list[dict[str, Tensor]]:
    """The student's parameters before the first step and after each."""
    objective: Any = tiny_dino()
    engine = build_engine(
        objective,
        **settings(lr=1e-2, total_steps=10, micro_batch=8),
        world=World(0, 1, 0, torch.device("cpu")),
        seed=0,
        head_warmup=HeadWarmup(objective.head_prefixes, head_warmup_steps),
    )
    feed = batches("dino", start=0, accumulation=1, world=1, rank=0)
    states = [{name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}]
    for step in range(steps):
        engine.train_step(feed, step)
        objective.after_step(step + 1)
        states.append({name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad})
    return states


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_heads_move_during_the_warm_up_and_everything_after_it():
    states = train(WARMUP + 1, head_warmup_steps=WARMUP)
    during = moved(states[0], states[WARMUP])
    assert during and all(name.startswith("student.head.") for name in during)
    after = moved(states[WARMUP], states[WARMUP + 1])
    assert any(name.startswith("student.backbone.") for name in after)


def test_without_a_warm_up_the_backbone_is_trained_at_once():
    states = train(1, head_warmup_steps=0)
    assert any(name.startswith("student.backbone.") for name in moved(states[0], states[1]))


def test_a_group_that_is_frozen_for_longer_stays_so():
    groups: Any = tiny_dino().param_groups()
    for group in groups:
        group["frozen_steps"] = 7
    assert {group["frozen_steps"] for group in freeze_backbone(groups, HeadWarmup(("student.head.",), 3))} == {7}


def test_an_objective_without_heads_is_refused():
    groups: Any = tiny_dino().param_groups()
    with pytest.raises(ValueError, match="nothing would be trained"):
        freeze_backbone(groups, HeadWarmup(("decoder.",), 3))
