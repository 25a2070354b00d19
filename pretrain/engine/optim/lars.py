"""LARS (You et al. 2017) as MAE's linear probe and MoCo v3 use it: a trust ratio per tensor, then SGD with momentum.

The ratio is multiplied into the gradients, then torch's SGD updates, so the optimizer state is that of SGD. Where a
rank holds only a partition of a tensor (ZeRO), the norms are first summed over ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import (
    Tensor,
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
)

from pretrain.core import distributed
from pretrain.engine.optim.fragments import Fragment


@torch.no_grad()
def adapt(
    gradients: Sequence[tuple[Fragment, Tensor]],
    *,
    weight_decays: Sequence[float],
    names: Sequence[str],
    vectors: Collection[str],
    coefficient: float,
    partitioned: bool,
    device: torch.device,
) -> None:
    """In place, for each tensor with two or more dimensions: g + wd * p, times coefficient * |p| / |g + wd * p|.

    The factor is 1 where a norm is 0. Biases and other vectors are unchanged: no decay and no ratio.

    Args:
        weight_decays: by group. names: of all trained parameters, in the same order on each rank.
        vectors: names of parameters with at most one dimension.
        partitioned: fragments are partitions; their norms are summed over ranks, on `device`.
    """
    chosen = [(fragment, gradient) for fragment, gradient in gradients if fragment.name not in vectors]
    index = {name: at for at, name in enumerate(names)}
    squares = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    if chosen:
        weights = [fragment.of(fragment.owner) for fragment, _ in chosen]
        for (fragment, gradient), weight in zip(chosen, weights, strict=True):
            if weight_decays[fragment.group]:
                gradient.add_(weight.view_as(gradient), alpha=weight_decays[fragment.group])
        places = torch.tensor([index[fragment.name] for fragment, _ in chosen], device=device)
        for row, tensors in enumerate((weights, [gradient for _, gradient in chosen])):
            norms = torch.stack(_foreach_norm(tensors)).to(device, torch.float64)
            squares[row].index_add_(0, places, norms.square())
    if partitioned:
        squares = distributed.all_reduce_sum(squares)
    weight_norm, update_norm = squares.sqrt()
    ratios = torch.where((weight_norm > 0) & (update_norm > 0), coefficient * weight_norm / update_norm, 1.0)
    for fragment, gradient in chosen:
        gradient.mul_(ratios[index[fragment.name]].to(gradient.device, gradient.dtype))
