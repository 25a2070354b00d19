"""The engines by name; each is imported only when chosen, so that the other's libraries need not be installed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.core.distributed import World
    from pretrain.core.trainable import Trainable
    from pretrain.engine.config import EngineConfig, OptimConfig
    from pretrain.engine.optim.head_warmup import HeadWarmup
    from pretrain.engine.plan import Plan
    from pretrain.engine.protocol import Engine

ENGINES = {
    "accelerate": ("pretrain.engine.accelerate", "AccelerateEngine"),
    "deepspeed": ("pretrain.engine.deepspeed", "DeepSpeedEngine"),
}


def build_engine(
    trainable: Trainable,
    *,
    optim: OptimConfig,
    config: EngineConfig,
    plan: Plan,
    world: World,
    seed: int,
    head_warmup: HeadWarmup | None = None,
) -> Engine:
    """The engine `config.name`, with `trainable` (an nn.Module) moved to the device.

    Args:
        seed: of the random numbers drawn on the device (drop path).
        head_warmup: first steps, which train only the heads; default: none.

    Raises:
        ValueError: the engine cannot train this model.
    """
    module, name = ENGINES[config.name]
    engine = getattr(import_module(module), name)
    return engine(trainable, optim=optim, config=config, plan=plan, world=world, seed=seed, head_warmup=head_warmup)
