"""The engines by name; one is imported when it is chosen, so that nobody needs the other's libraries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.core.distributed import World
    from pretrain.core.trainable import Trainable
    from pretrain.engine.config import EngineConfig, OptimConfig
    from pretrain.engine.optim.optimizer import OptimSettings
    from pretrain.engine.plan import Plan
    from pretrain.engine.trainable import Engine, EngineSettings

ENGINES = {
    "accelerate": ("pretrain.engine.accelerate", "AccelerateEngine"),
    "deepspeed": ("pretrain.engine.deepspeed", "DeepSpeedEngine"),
}


def build_engine(
    trainable: Trainable, *, optim: OptimSettings, settings: EngineSettings, world: World, seed: int
) -> Engine:
    """The engine `settings.name`, with `trainable` moved to the device.

    Raises:
        ValueError: no such engine, or settings it cannot honour.
    """
    if settings.name not in ENGINES:
        raise ValueError(f"engine {settings.name!r}: expected one of {', '.join(ENGINES)}")
    module, name = ENGINES[settings.name]
    return getattr(import_module(module), name)(trainable, optim=optim, settings=settings, world=world, seed=seed)


def engine_of(
    trainable: Any,
    *,
    optim: OptimConfig,
    engine: EngineConfig,
    steps: Plan,
    world: World,
    seed: int,
    head_prefixes: tuple[str, ...] = (),
    head_warmup_steps: int = 0,
) -> Engine:
    """The engine of a configuration; `build_engine` says what may be wrong with it."""
    from pretrain.engine.optim.optimizer import OptimSettings
    from pretrain.engine.trainable import EngineSettings

    plain = optim.model_dump(
        include={"name", "min_lr", "schedule", "gamma", "power", "warmup_lr", "warmup_form", "first_step"}
        | {"weight_decay", "weight_decay_end", "betas", "eps", "momentum", "trust_coefficient"}
    )
    schedule = OptimSettings(
        lr=steps.lr,
        total_steps=steps.total_steps,
        warmup_steps=steps.warmup_steps,
        milestones=optim.milestones(steps.steps_per_epoch),
        clip_grad=optim.clip_grad or 0.0,
        clip_mode=optim.clip_mode if optim.clip_grad else "none",
        head_prefixes=head_prefixes,
        head_warmup_steps=head_warmup_steps,
        **plain,
    )
    settings = EngineSettings(
        micro_batch=steps.micro_batch,
        **engine.model_dump(include={"name", "precision", "accumulation_steps", "compile", "zero_stage", "deepspeed"}),
    )
    return build_engine(trainable, optim=schedule, settings=settings, world=world, seed=seed)
