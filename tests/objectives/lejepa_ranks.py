"""What the ranks do in the tests of LeJEPA: one step of one fixed batch, in micro-batches or whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.engine.build import build_engine
from tests.engine.scenarios import ENGINES, whole_state
from tests.engine.settings import settings
from tests.objectives.tiny import Shape, batch, objective, part

IMAGES = 16


class Recording(AccelerateEngine):
    """Keeps the gradients of the step."""

    gradients: dict[str, Tensor]

    def _gradients(self) -> Any:
        found = super()._gradients()
        self.gradients = {fragment.name: gradient.clone() for fragment, gradient in found}
        return found


def outcome(form: str, accumulation: int, world: World) -> dict[str, Tensor]:
    """Logged losses, averaged over micro-batches and ranks, gradients and state after a step of SGD."""
    shape = Shape(drop_path_rate=0.2)
    of: Any = objective("lejepa", shape, form=form)
    of.encoder.set_drop_path(0.2)
    pieces = world.world_size * accumulation
    engine = Recording(
        of,
        **settings(
            name="sgd", lr=0.1, total_steps=2, micro_batch=IMAGES // pieces, world_size=world.world_size,
            engine={"accumulation_steps": accumulation},
        ),
        world=world,
        seed=0,
    )  # fmt: skip
    whole, each = batch(of, shape, images=IMAGES), IMAGES // pieces
    first = world.rank * accumulation
    micro_batches = [part(whole, slice(each * i, each * (i + 1))) for i in range(first, first + accumulation)]
    result = engine.train_step(iter(micro_batches), 0)
    of.after_step(1)
    state = {f"state.{name}": value for name, value in of.state_dict().items() if "num_batches" not in name}
    losses = {name: torch.tensor(value) for name, value in result.losses.items()}
    return losses | {f"grad.{name}": value for name, value in engine.gradients.items()} | state


def steps(world: World, out: Path) -> None:
    for form in ("multicrop", "minimal"):
        for accumulation in (1, 2, 4):
            found = {name: value.contiguous() for name, value in outcome(form, accumulation, world).items()}
            save_file(found, out / f"{form}-{accumulation}-rank{world.rank}.safetensors")


def under_engines(world: World, out: Path, *, cases: list[list[Any]]) -> None:
    """The weights after two steps under (engine, micro-batches of a step); complete on rank 0 only under ZeRO-3."""
    for name, accumulation in cases:
        of: Any = objective("lejepa")
        pieces = world.world_size * accumulation
        chosen = settings(
            name="sgd", lr=0.1, total_steps=2, micro_batch=IMAGES // pieces, world_size=world.world_size,
            engine=ENGINES[name] | {"accumulation_steps": accumulation},
        )  # fmt: skip
        engine = build_engine(of, **chosen, world=world, seed=0)
        whole, each, first = batch(of, images=IMAGES), IMAGES // pieces, world.rank * accumulation
        for step in range(2):
            parts = [part(whole, slice(each * i, each * (i + 1))) for i in range(first, first + accumulation)]
            engine.train_step(iter(parts), step)
            of.after_step(step + 1)
        names = dict(of.named_parameters())
        weights = {key: value.contiguous() for key, value in whole_state(engine).items() if key in names}
        if world.rank == 0:
            save_file(weights, out / f"{name}-{accumulation}.safetensors")
