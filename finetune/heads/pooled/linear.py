"""A linear classifier on one vector per image: the class token, or the mean of the patches.

He et al. 2021 ("MAE", A.1) and Bao et al. 2021 ("BEiT", appendix): in fine-tuning the mean is of the raw patches and
goes through a norm of its own; in a linear probe the features are standardized by a batch norm without affine
parameters, which makes the learning rate independent of their scale (Doersch et al. 2015).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm

BN_EPS = 1e-6  # MAE's linear probe
Pool = Literal["token", "mean"]


class PooledHead(nn.Module):
    """Images through a backbone to logits [b, K].

    Args:
        backbone: with `own_norm` its last norm is removed.
        pool: "token": the normalized class token. "mean": of the patches; a backbone without blocks pools as timm does.
        own_norm: the mean is of raw patches, and a new norm comes after it; else it is of normalized patches.
        standardize: batch norm over all ranks before the classifier. std: of the classifier's initial weights.

    Raises:
        ValueError: pool is token, and the backbone has no class token.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, pool: Pool, own_norm: bool, standardize: bool, std: float
    ):
        super().__init__()
        if pool == "token" and not backbone.class_token:
            raise ValueError("task.pool: token, but the backbone has no class token; use mean")
        self.pool, dim = pool, backbone.embed_dim
        self.fc_norm = None
        if pool == "mean" and own_norm and "layers" in backbone.provides:
            self.fc_norm = take_norm(backbone)
        self.norm = SyncBatchNorm(dim, affine=False, eps=BN_EPS) if standardize else None
        self.fc = classifier(dim, num_classes, std=std)

    def forward(self, backbone: Backbone, images: Tensor, drop: Tensor | None = None) -> Tensor:
        return self.classify(self.features(backbone, images, drop))

    def features(self, backbone: Backbone, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """[b, D]; `drop` as in `Backbone.forward`."""
        if self.pool == "token" or "layers" not in backbone.provides:
            return backbone.forward_cls(images, drop=drop)
        mean = backbone(images, drop=drop)[:, backbone.num_prefix_tokens :].mean(dim=1)
        return mean if self.fc_norm is None else self.fc_norm(mean)

    def classify(self, features: Tensor) -> Tensor:
        """[b, D] -> [b, K]."""
        return self.fc(features if self.norm is None else self.norm(features))

    @torch.no_grad()
    def as_linear(self) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K] with the same result in evaluation, the batch norm folded in."""
        weight, bias = self.fc.weight, self.fc.bias
        if self.norm is None:
            return weight.clone(), bias.clone()
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        weight = weight * (self.norm.running_var + self.norm.eps).rsqrt()
        return weight, bias - weight @ self.norm.running_mean


def take_norm(backbone: Backbone) -> nn.LayerNorm:
    """A new norm like the backbone's last one, which is removed."""
    norm = nn.LayerNorm(backbone.embed_dim, eps=cast(nn.LayerNorm, backbone.trunk.norm).eps)
    backbone.trunk.norm = nn.Identity()
    return norm


def classifier(embed_dim: int, num_classes: int, *, std: float) -> nn.Linear:
    """A linear layer that starts near zero, so that the first gradients into the backbone are small."""
    fc = nn.Linear(embed_dim, num_classes)
    nn.init.trunc_normal_(fc.weight, std=std)
    nn.init.zeros_(fc.bias)
    return fc
