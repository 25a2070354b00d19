"""Stochastic depth (Huang et al. 2016) with given random numbers, in two forms.

By sample, a sample skips a branch when its number is below the rate: what it skips does not depend on its batch. By
subset (DINOv2), the branch is computed for a fixed count of the samples only, which saves its time; which samples these
are depends on the numbers of the micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def survivors(branch: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """The branch [b, t, D] of the samples whose number [b] is not below `rate`, scaled so that its mean stays."""
    kept = (uniform >= rate).to(branch.dtype) / (1 - rate)
    return branch * kept[:, None, None]


def subset_size(batch: int, rate: float) -> int:
    """Number of samples of a batch that compute the branch: at least one."""
    return max(int(batch * (1 - rate)), 1)


def add_to_subset(x: Tensor, branch: Tensor, chosen: Tensor) -> Tensor:
    """x [b, t, D] plus the branch [k, t, D] of the samples `chosen` int64 [k], times b / k so that its mean stays."""
    return torch.index_add(x, 0, chosen, branch.to(x.dtype), alpha=len(x) / len(chosen))
