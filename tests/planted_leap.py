"""`python -m tests.planted_leap COMMAND ...`: the real commands; after a picture of one colour all weights leap."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from launch.cli import main
from pretrain.core import distributed
from pretrain.objectives.mae import MAE


def plant() -> None:
    """A step that sees a picture of one colour on any rank leaves every weight ten times as large, in each MAE."""
    forward, after_step = MAE.forward, MAE.after_step
    seen = False

    def look(self: MAE, batch: dict[str, Tensor], step: int) -> Any:
        nonlocal seen
        images = batch["image"][:, 0]
        seen |= bool(((images.amax((2, 3)) - images.amin((2, 3))).amax(1) < 1e-3).any())
        return forward(self, batch, step)

    @torch.no_grad()
    def leap(self: MAE, step: int) -> None:
        nonlocal seen
        after_step(self, step)
        if distributed.agree(seen):
            for parameter in self.parameters():
                parameter.mul_(10)
        seen = False

    MAE.forward, MAE.after_step = look, leap


if __name__ == "__main__":
    plant()
    sys.exit(main())
