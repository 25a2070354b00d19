"""What the ranks of test_objectives.py do: steps of every objective of the table under one engine after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain.core.distributed import World
from pretrain.core.tensorfile import write_tensors
from pretrain.engine.build import build_engine
from tests.engine.scenarios import ENGINES, whole_state
from tests.engine.settings import settings
from tests.objectives import tiny

STEPS, IMAGES = 5, 8
# What makes a loss depend on how the batch is divided over ranks is switched off, or set to count over all of them.
WHOLE: dict[str, dict[str, Any]] = {
    "dinov2": {
        **{"koleo_scope": "all", "drop_path_subset": False, "prototypes": "linear", "local_norm": True},
        **{"rope_rescale": 2.0, "local_weight_schedule": {"start": 1.0, "peak": 1.0, "end": 0.5}},
    },
    "vqkd": {"kmeans_init": True},
}


def train(world: World, out: Path, *, cases: list[list[str]]) -> dict[str, Any]:
    """Losses by (objective, engine); the final state is written to `out`."""
    found = {}
    for name, engine_name in cases:
        objective: Any = tiny.objective(name, **WHOLE.get(name, {}))
        if name == "dinov2":
            # From a class token near 0 the features of a tiny network are nearly one: KoLeo's gradient is rounding.
            torch.manual_seed(0)
            token = 0.02 * torch.randn_like(objective.student.backbone.cls_token)
            for branch in (objective.student, objective.teacher.average):
                branch.backbone.cls_token.data.copy_(token)
        share = IMAGES // world.world_size
        # SGD: AdamW turns the rounding of a gradient that is zero into a step of full size.
        sgd = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}
        chosen = settings(
            total_steps=STEPS,
            micro_batch=share,
            world_size=world.world_size,
            engine=ENGINES[engine_name],
            **sgd,
        )
        engine: Any = build_engine(objective, **chosen, world=world, seed=3)
        mine = slice(world.rank * share, (world.rank + 1) * share)
        losses = []
        for step in range(STEPS):
            batch = tiny.part(tiny.batch(objective, images=IMAGES, seed=step), mine)
            batch |= {"position": torch.arange(IMAGES)[mine]}
            result = engine.train_step(iter([batch]), step)
            assert not result.skipped
            objective.after_step(step + 1)
            losses.append(result.losses["loss"])
        found[f"{name}-{engine_name}"] = losses
        state = whole_state(engine)
        if world.rank == 0:
            write_tensors(out / f"{name}-{engine_name}.safetensors", state)
    return found
