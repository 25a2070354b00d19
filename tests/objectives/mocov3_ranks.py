"""What the ranks do in the tests of MoCo v3 over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pretrain.core.distributed import World
from tests.objectives.tiny import batch, objective, part

IMAGES = 6


def outcome(share: slice) -> dict[str, Tensor]:
    """Loss, gradients and statistics of a training pass over a share of one fixed batch, in float64."""
    of: Any = objective("mocov3").double().train()
    whole = {name: value.double() for name, value in batch(of, images=IMAGES).items()}
    losses = of(part(whole, share), 0)
    losses["loss"].backward()
    gradients = {f"grad.{name}": p.grad for name, p in of.named_parameters() if p.grad is not None}
    statistics = {name: value for name, value in of.state_dict().items() if "running" in name}
    return {**{name: losses[name].detach() for name in ("loss", "accuracy")}, **gradients, **statistics}


def share_of_a_batch(world: World, out: Path) -> None:
    each = IMAGES // world.world_size
    result = outcome(slice(world.rank * each, (world.rank + 1) * each))
    save_file({name: value.contiguous() for name, value in result.items()}, out / f"rank{world.rank}.safetensors")
