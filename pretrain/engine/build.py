"""The engines by name; one is imported when it is chosen, so that nobody needs the other's libraries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.distributed import World
    from pretrain.engine.optim import OptimSettings
    from pretrain.engine.trainable import Engine, EngineSettings, Trainable

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
