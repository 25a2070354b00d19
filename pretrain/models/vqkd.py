"""The parts of VQ-KD that its tokenizer needs too (Peng et al. 2022, "BEiT v2", section 2.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initialize import initialize_linears


def task_layer(in_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, Tanh, Linear: from the features of a transformer to codes, or to those of the teacher."""
    layer = nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, out_dim))
    initialize_linears(layer, "trunc_normal")
    return layer


def code_features(encoder: Any, task: nn.Module, images: Tensor, *, drop: Tensor | None = None) -> Tensor:
    """Normalized images [b, C, H, W] -> what is quantized: fp32 [b, N, code_dim]. The projection is not autocast.

    `drop` are the uniforms of the drop path [b, depth, 2].
    """
    tokens = encoder(images) if drop is None else encoder(images, drop=drop)
    with torch.autocast(images.device.type, enabled=False):
        return task(tokens[:, encoder.num_prefix_tokens :].float())


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of vectors along the last dimension, fp32, mean over all."""
    return (1 - (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)).mean()
