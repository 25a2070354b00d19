"""Image classification by fine-tuning a whole backbone.

He et al. 2021 ("MAE", A.1) and Bao et al. 2021 ("BEiT", appendix): the class token through the backbone's last norm, or
the mean of the patches through a new one; a linear classifier that starts near zero; learning rates by layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.models import param_groups
from pretrain.models.layer_decay import layer_decay
from pretrain.models.vit import ViT

HEAD_STD = 2e-5  # MAE; BEiT has 0.02 times a scale of 0.001


class Classifier(nn.Module):
    """Images [b, C, H, W] -> logits [b, num_classes].

    Args:
        backbone: with its pretrained weights; it is changed: pooling "mean" takes its last norm away.
        pool: "token": the normalized class token. "mean": `fc_norm` of the mean of the raw patch tokens.

    Raises:
        ValueError: the pooling needs a class token and there is none, or there are fewer than two classes.
    """

    def __init__(self, backbone: ViT, num_classes: int, *, pool: Literal["token", "mean"] = "token"):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes {num_classes}: a classifier needs at least 2")
        if pool == "token" and not backbone.class_token:
            raise ValueError("pool token: the backbone has no class token; use pool mean")
        self.backbone, self.pool = backbone, pool
        self.fc_norm = None
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=backbone.norm_eps)
            backbone.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, drop))

    def features(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """What the classifier sees, [b, D]. `drop` [b, depth, 2] are the uniforms of the backbone's drop path."""
        if self.fc_norm is None:
            return self.backbone.forward_cls(images, drop)
        tokens = self.backbone(images, drop=drop)
        return self.fc_norm(tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1))

    def param_groups(self, *, decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups as `pretrain.models.param_groups.split` describes them, one per layer.

        Biases, vectors, the class token and the positions do not decay; relative-position tables do.

        Args:
            decay: of the learning rate from layer to layer, towards the input.
        """
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        exempt = trained & {"backbone.cls_token", "backbone.pos_embed"}
        groups = param_groups.split(self, no_decay_names=exempt)
        return layer_decay(groups, decay=decay, depth=self.backbone.depth, prefix="backbone.")

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely class of each image, int64 [b]."""
        return self(images).argmax(dim=1)
