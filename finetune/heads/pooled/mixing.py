"""Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019) of a batch, from given uniform random numbers, and their loss.

Partners are neighbours in the batch (0 with 1, 2 with 3): samples are shuffled, so this is a random pairing, and unlike
pairing the first with the last it does not depend on how a batch is divided over ranks. Settings are those of timm and
DeiT. No value is read back from the device.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor, nn

UNIFORMS = 6  # per draw: whether to mix, which of the two, the share, row and column of the centre, one unused
_TABLE = 4096


class ImageMixer(nn.Module):
    """Labels to soft targets, and pairs of images to mixtures.

    Args:
        mixup, cutmix: the Beta distribution's parameter, 0 for none. prob: probability of mixing.
        switch_prob: probability of CutMix if both are enabled. smoothing: of the labels.
        mode: "batch": one draw for the whole step (MAE, BEiT); "pair": one for each pair.
    """

    mixup_quantiles: Tensor
    cutmix_quantiles: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        mode: Literal["batch", "pair"] = "batch",
    ):
        super().__init__()
        self.num_classes, self.smoothing, self.mode = num_classes, smoothing, mode
        self.mixup, self.cutmix, self.prob, self.switch_prob = mixup, cutmix, prob, switch_prob
        for name, alpha in (("mixup_quantiles", mixup), ("cutmix_quantiles", cutmix)):
            self.register_buffer(name, torch.from_numpy(_beta_quantiles(alpha)), persistent=False)

    @property
    def mixes(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def forward(self, images: Tensor, labels: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Images float [b, C, H, W] and labels int64 [b] to mixed images and targets [b, K] that sum to 1.

        Args:
            uniforms: [1 or b, UNIFORMS or more]; a pair uses those of its even member.

        Raises:
            ValueError: an odd number of images, so that one has no partner.
        """
        return self.mix(images, smoothed(labels, self.num_classes, self.smoothing), uniforms)

    def mix(self, images: Tensor, targets: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The same for targets [b, K] of any kind."""
        if not self.mixes:
            return images, targets
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix pair images; a micro-batch of {len(images)} leaves one without partner")
        if len(uniforms) > 1:
            uniforms = uniforms[::2].repeat_interleave(2, 0)
        whether, which, quantile, row, column = uniforms[:, :5].float().unbind(1)
        cuts = which < (self.switch_prob if self.mixup and self.cutmix else float(self.cutmix > 0))
        at = (quantile * _TABLE).long().clamp_(max=_TABLE - 1)
        share = torch.where(cuts, self.cutmix_quantiles[at], self.mixup_quantiles[at])
        share = torch.where(whether < self.prob, share, 1.0)
        inside = _box(share, row, column, images.shape[2], images.shape[3])
        share = torch.where(cuts, 1 - inside.float().mean((1, 2)), share)
        weight = torch.where(cuts[:, None, None], 1 - inside.float(), share[:, None, None])[:, None]
        other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        swapped = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        mixed = (images * weight + other * (1 - weight)).to(images.dtype)
        return mixed, targets * share[:, None] + swapped * (1 - share[:, None])


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels int64 [b] as targets [b, K]: 1 - smoothing for the label, and smoothing spread evenly over all classes."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum(target * log p), in fp32; logits and targets [b, K]."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(1).mean()


def _box(share: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """bool [m, H, W]: the rectangle around a uniform centre that covers 1 - share of the area before clipping."""
    side = (1 - share).clamp(min=0).sqrt()

    def inside(centre: Tensor, size: int) -> Tensor:
        half = torch.floor(torch.floor(side * size) / 2)[:, None]
        middle = torch.floor(centre * size)[:, None]
        places = torch.arange(size, device=share.device)
        return (places >= middle - half) & (places < middle + half)

    return inside(row, height)[:, :, None] & inside(column, width)[:, None, :]


def _beta_quantiles(alpha: float) -> np.ndarray:
    """float32 [_TABLE]: quantiles of Beta(alpha, alpha) at the centres of equal intervals; all 1 for alpha 0."""
    if not alpha:
        return np.ones(_TABLE, np.float32)
    return betaincinv(alpha, alpha, (np.arange(_TABLE) + 0.5) / _TABLE).astype(np.float32)
