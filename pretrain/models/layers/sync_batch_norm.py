"""Batch normalization over the samples of all ranks (Ioffe & Szegedy 2015), on any backend and device.

torch's own needs a GPU. This one gives, on any number of processes, the values and gradients of one process that holds
the whole batch: the statistics are combined in the forward pass, and the two sums that couple samples in the backward
pass are added over ranks. Gradients of weight and bias stay local, as those of every other parameter do.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.core import distributed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm for inputs [b, C, ...] whose training statistics are those of the batches of all ranks together.

    Alone, or in evaluation, it is torch's. Every rank must take part in every training call.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[b, C, ...] -> the same shape and dtype.

        Raises:
            ValueError: one value per channel in all, which has no variance.
        """
        if distributed.is_alone() or not self.training:
            return self._activated(super().forward(input))
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        with torch.autocast(x.device.type, enabled=False):
            mean, var, count = _statistics(x.detach())
            if count <= 1:
                raise ValueError(f"batch norm in training needs more than one value per channel, got {list(x.shape)}")
            self._track(mean, var * (count / (count - 1)))
            out: Any = _Normalize.apply(x, mean, (var + self.eps).rsqrt(), count)
            if self.affine:
                out = out * _per_channel(self.weight, x) + _per_channel(self.bias, x)
        return self._activated(out.to(input.dtype))

    def _activated(self, x: Tensor) -> Tensor:
        """What timm's fused layer does after the norm, where this was one."""
        for part in (getattr(self, name, None) for name in ("drop", "act")):
            x = x if part is None else part(x)
        return x

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs [b, C, ...], got {list(input.shape)}")


def synchronized(module: ModuleT) -> ModuleT:
    """`module` with every batch norm below it, or itself, made a `SyncBatchNorm`.

    In place: names, tensors, hooks and what was added to a norm (a mechanism that is placed there) stay.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = SyncBatchNorm
    return module


class BatchStatistics:
    """Undoes what the forward passes of a skipped step did to the running statistics of the batch norms in `module`."""

    def __init__(self, module: nn.Module):
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self._buffers = [
            (norm, name)
            for norm in norms
            for name in ("running_mean", "running_var", "num_batches_tracked")
            if getattr(norm, name) is not None
        ]
        self._before: list[Tensor] | None = None

    def remember(self) -> None:
        """Before a forward pass: keep the statistics, unless an earlier pass of this step has."""
        if self._before is None:
            self._before = [getattr(norm, name).clone() for norm, name in self._buffers]

    def keep(self) -> None:
        """The step was taken: the new statistics stay."""
        self._before = None

    def restore(self) -> None:
        """The step was skipped: back to the statistics before it."""
        if self._before is not None:
            for (norm, name), before in zip(self._buffers, self._before, strict=True):
                getattr(norm, name).copy_(before)
        self._before = None


class _Normalize(torch.autograd.Function):
    """(x - mean) / std where mean and std depend on x of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse_std: Tensor, count: float) -> Tensor:  # type: ignore[override]
        out = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        ctx.save_for_backward(out, inverse_std)
        ctx.count = count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        out, inverse_std = ctx.saved_tensors
        dims = _reduced(out)
        sums = torch.stack([gradient.sum(dims), (gradient * out).sum(dims)])
        mean, slope = distributed.all_reduce_sum(sums) / ctx.count
        centred = gradient - _per_channel(mean, out) - out * _per_channel(slope, out)
        return centred * _per_channel(inverse_std, out), None, None, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance per channel over all ranks, and how many values each channel has in all.

    Deviations from each rank's own mean are combined (Chan et al. 1979), which does not cancel as E[x^2] - E[x]^2 does.
    """
    dims = _reduced(x)
    mean = x.mean(dims)
    squares = (x - _per_channel(mean, x)).square().sum(dims)
    counts = x.new_full((1,), x.numel() // x.shape[1])
    every = distributed.all_gather(torch.cat([counts, mean, squares])[None])
    counts, (means, squares) = every[:, :1], every[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return mean, var, float(total)


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))
