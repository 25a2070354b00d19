"""The configuration objects that an engine takes, for tests that give steps and rates instead of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.optim.schedules import Schedules
from pretrain.engine.plan import Plan, plan_steps


class Settings(TypedDict):
    """`AccelerateEngine(model, **settings, ...)`."""

    optim: OptimConfig
    config: EngineConfig
    plan: Plan


def settings(
    *,
    lr: float,
    total_steps: int,
    micro_batch: int = 1,
    world_size: int = 1,
    milestones: tuple[int, ...] = (),
    weight_decay: float = 0.0,
    engine: Mapping[str, Any] | None = None,
    **optim: Any,
) -> Settings:
    """An epoch is one step. engine, optim: keys of the two sections.

    A start of the warm-up is left out where there is none, as in the official schedules.
    """
    if not optim.get("warmup_steps"):
        optim.pop("warmup_lr", None)
    config = EngineConfig(**engine or {})
    batch = micro_batch * config.accumulation_steps * world_size
    section = OptimConfig(
        lr=lr,
        total_steps=total_steps,
        global_batch_size=batch,
        milestone_epochs=milestones,
        weight_decay=weight_decay,
        **optim,
    )
    plan, problems = plan_steps(section, config, num_samples=batch, world_size=world_size)
    assert not problems, problems
    return Settings(optim=section, config=config, plan=plan)


def schedules_of(chosen: Settings) -> Schedules:
    return Schedules(chosen["optim"], chosen["plan"])
