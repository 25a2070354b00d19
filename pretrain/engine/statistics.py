"""The running statistics of batch norms, which a forward pass changes: passes that do not count leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms in `module` that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def kept(norms: Sequence[nn.Module]) -> Callable[[], None]:
    """What it returns sets the running statistics back to what they are now."""
    before: list[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return restore
