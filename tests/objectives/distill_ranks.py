"""What the ranks do in the tests of DINOv2 over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.core.distributed import World
from tests.objectives.tiny import batch, objective, part

IMAGES = 6
WHOLE: dict[str, Any] = {"koleo_scope": "all", "centering": "sinkhorn_knopp", "drop_path_subset": False}


def outcome(share: slice) -> dict[str, Tensor]:
    """Losses and gradients of a training pass over a share of one fixed batch.

    All hidden patches are in the first half of the batch, and two images are the same.
    """
    of: Any = objective("dinov2", **WHOLE).train()
    whole = batch(of, images=IMAGES)
    whole["mask"][: IMAGES // 2, :, ::3], whole["mask"][IMAGES // 2 :] = True, False
    whole["global"][IMAGES - 1] = whole["global"][0]
    whole["mask"][0] = False
    losses = of(part(whole, share), 0)
    losses["loss"].backward()
    gradients = {f"grad.{name}": p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items() if name.startswith("loss")} | gradients


def share_of_a_batch(world: World, out: Path) -> None:
    torch.set_num_threads(1)
    each = IMAGES // world.world_size
    result = outcome(slice(world.rank * each, (world.rank + 1) * each))
    save_file({name: value.contiguous() for name, value in result.items()}, out / f"rank{world.rank}.safetensors")
