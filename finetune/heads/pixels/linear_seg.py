"""Semantic segmentation by one linear layer on the patches: batch norm and a 1 x 1 convolution.

Oquab et al. 2023 ("DINOv2", section 7.4, "linear": the last block; "+ms": the last four, concatenated) and Siméoni et
al. 2025 ("DINOv3"), on a frozen backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.heads.pixels.dense_parts import MapReader, drop_channels, linear_classes, resize
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm


class LinearHead(MapReader):
    """Maps of one or more blocks -> logits [b, num_classes, h, w] on the grid of the first map.

    Args:
        channels: of each map; they are resized to the first and concatenated.
        dropout: rate of channel dropout before the classifier.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.noise = sum(channels) if dropout else 0
        self.norm = SyncBatchNorm(sum(channels))
        self.classify = linear_classes(sum(channels), num_classes)

    def forward(self, maps: Sequence[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """Maps [b, C_i, h_i, w_i] -> logits [b, num_classes, h_0, w_0]; `uniforms` [b, noise]."""
        joined = torch.cat([resize(one, maps[0].shape[2:]) for one in maps], dim=1)
        return self.classify(drop_channels(self.norm(joined), uniforms, self.dropout))
