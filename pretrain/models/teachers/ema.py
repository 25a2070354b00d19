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
    but leaves buffers as they are. The copy keeps its own BatchNorm statistics; they are not averaged.

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
        own = {name for name, _ in source.named_parameters()}
        self._names = [name for name, _ in (follows or source).named_parameters() if name in own]
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
        """average = momentum * average + (1 - momentum) * source, for every parameter of `source`
        that the average has.

        Raises:
            ValueError: momentum is not in [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        buffers, parameters = dict(self.average.named_buffers()), dict(source.named_parameters())
        averages: list[Tensor] = [buffers[name] for name in self._names]
        values = [parameters[name].detach().float() for name in self._names]
        torch._foreach_lerp_(averages, values, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
