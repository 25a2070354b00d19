"""Exponential moving average of a module: the teacher of DINO and related methods (Tarvainen & Valpola 2017)."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module, covariant=True)


class EMA(nn.Module, Generic[ModuleT]):
    """A frozen copy of `source`, updated by EMA; called like it, without gradients.

    The average is kept in fp32 buffers, not parameters. A bf16 weight cannot hold it: at momentum 0.999 the step is
    below bf16 resolution and rounds to 0. And DeepSpeed's bf16 mode casts every parameter of the module it is given,
    but leaves buffers as they are. The copy keeps its own BatchNorm statistics; they are not averaged. Other buffers
    are, if their module names them in `averaged`.

    Args:
        source: module to copy.
        follows: module that `update` will receive, if another; parameters that only the copy has stay unchanged.

    Attributes:
        average: the copy, a module of the class of `source` with buffers in place of parameters.
    """

    average: ModuleT

    def __init__(self, source: ModuleT, *, follows: nn.Module | None = None):
        super().__init__()
        self.average = copy.deepcopy(source)
        own = set(_averaged(source))
        self._names = [name for name in _averaged(follows or source) if name in own]
        for module in self.average.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach().float().clone())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.average(*args, **kwargs)

    @torch.no_grad()
    def update(self, source: nn.Module, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * source, for every parameter (and buffer
        in `averaged`) of `source` that the average has.

        Raises:
            ValueError: momentum is not in [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        buffers, given = dict(self.average.named_buffers()), _averaged(source)
        averages: list[Tensor] = [buffers[name] for name in self._names]
        values = [given[name].detach().float() for name in self._names]
        torch._foreach_lerp_(averages, values, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged, by name: the parameters, and the buffers that a module names in its `averaged`."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        for name in getattr(part, "averaged", ()):
            found[f"{path}.{name}" if path else name] = part.get_buffer(name)
    return found
