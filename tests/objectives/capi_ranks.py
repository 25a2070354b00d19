"""What the ranks do in the tests of CAPI: two steps of fixed batches, in micro-batches or whole, under one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.engine.build import build_engine
from tests.engine.scenarios import ENGINES, whole_state
from tests.engine.settings import settings
from tests.objectives.tiny import Shape, batch, objective, part

IMAGES = 16


def outcome(engine_name: str, accumulation: int, world: World) -> dict[str, Tensor]:
    """Logged losses of the second step and the state after it; the state is complete on rank 0 only."""
    shape = Shape(class_token=False)
    of: Any = objective("capi", shape, registers=2, drop_path_rate=0.3, drop_path_subset=False)
    pieces = world.world_size * accumulation
    chosen = settings(
        name="sgd", lr=0.1, total_steps=4, micro_batch=IMAGES // pieces, world_size=world.world_size,
        engine=ENGINES[engine_name] | {"accumulation_steps": accumulation},
    )  # fmt: skip
    engine = build_engine(of, **chosen, world=world, seed=0)
    each, first, losses = IMAGES // pieces, world.rank * accumulation, {}
    for step in range(2):
        whole = batch(of, shape, images=IMAGES, seed=step)
        parts = [part(whole, slice(each * i, each * (i + 1))) for i in range(first, first + accumulation)]
        losses = engine.train_step(iter(parts), step).losses
        of.after_step(step + 1)
    found = {f"state.{name}": value.contiguous() for name, value in whole_state(engine).items()}
    return found | {name: torch.tensor(losses[name]) for name in ("loss", "loss_clustering", "teacher_entropy")}


def steps(world: World, out: Path, *, cases: list[list[Any]]) -> None:
    for name, accumulation in cases:
        found = outcome(name, accumulation, world)
        if world.rank == 0:
            save_file(found, out / f"{name}-{accumulation}.safetensors")
