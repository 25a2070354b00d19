"""CBAM: a gate per channel from pooled maps, then a gate per place from pooled channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism

# Maps [b, C, H, W] -> [b, C].
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "lp": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "lse": lambda x: x.logsumexp((2, 3)),
}


class CBAM(MapMechanism):
    """y = x * s(sum over pools of MLP(pool(x))), then y * s(BN(conv(max_c y, mean_c y))).

    Woo et al. 2018, eq. 2 and 3. Reads the grid. At the start each of the two gates passes about a half.

    timm's `CbamModule` gives the convolution (mean, max), has another momentum and two of the pools.

    Args:
        dim: channels C. reduction: the MLP has max(1, C // reduction) hidden channels.
        pools: what the MLP reads, of "avg", "max", "lp" (the L2 norm over the places) and "lse" (log of the sum of
            exponentials). The paper's are the first two.
        spatial: whether the second gate is there. Without it, a set is read.
        kernel_size: of the second gate's convolution, odd.

    Raises:
        ValueError: pools that do not exist, none, or an even kernel_size.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        *,
        pools: Sequence[str] = ("avg", "max"),
        spatial: bool = True,
        kernel_size: int = 7,
    ):
        super().__init__()
        unknown = sorted(set(pools) - set(POOLS))
        if unknown or not pools:
            raise ValueError(f"pools of CBAM must be some of {', '.join(POOLS)}, got {list(pools)}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"the kernel_size of CBAM must be odd, got {kernel_size}")
        self.pools = tuple(pools)
        width = max(1, dim // reduction)
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)
        self.conv = self.norm = None
        if spatial:
            self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
            self.norm = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([self.fc2(F.relu(self.fc1(POOLS[pool](x)))) for pool in self.pools]).sum(0)
        x = x * logits.sigmoid()[:, :, None, None]
        if self.conv is None or self.norm is None:
            return x
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return x * self.norm(self.conv(pooled)).sigmoid()
