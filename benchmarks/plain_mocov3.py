"""A MoCo v3 step written plainly from the paper (Chen et al. 2021, algorithm 1), the baseline of `benchmarks.step`.

Every choice is the obvious one: all tokens in every block, torch's batch norm, the momentum encoder updated per
parameter inside the forward pass, before the keys.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.plain import plain_ema, plain_tokens


def plain_mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with batch norm and ReLU; the last norm has neither scale nor shift."""
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(pairwise(widths)):
        last = index == len(widths) - 2
        layers += [nn.Linear(width, following, bias=False), nn.BatchNorm1d(following, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PlainEncoder(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: VisionTransformer, *, hidden_dim: int, out_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = plain_mlp([backbone.embed_dim, hidden_dim, hidden_dim, out_dim])

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(plain_tokens(self.backbone, images)[:, 0])


class PlainMoCoV3(nn.Module):
    """`forward` takes both views [b, C, H, W] and gives the loss; the momentum encoder moves in it."""

    def __init__(
        self, backbone: VisionTransformer, *, hidden_dim: int, out_dim: int, temperature: float, momentum: float
    ):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        assert backbone.pos_embed is not None
        for parameter in (*backbone.patch_embed.proj.parameters(), backbone.pos_embed):
            parameter.requires_grad_(False)
        self.base = PlainEncoder(backbone, hidden_dim=hidden_dim, out_dim=out_dim)
        self.predictor = plain_mlp([out_dim, hidden_dim, out_dim])
        self.momentum_encoder = copy.deepcopy(self.base).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        queries = [self.predictor(self.base(images)) for images in (first, second)]
        with torch.no_grad():
            plain_ema(list(self.momentum_encoder.parameters()), list(self.base.parameters()), self.momentum)
            keys = [self.momentum_encoder(images) for images in (first, second)]
        return self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0])

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query.float(), dim=1) @ F.normalize(key.float(), dim=1).T / self.temperature
        labels = torch.arange(len(query), device=query.device)
        return F.cross_entropy(logits, labels) * (2 * self.temperature)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.mocov3.MoCoV3` over a `pretrain.models.backbones.vit.ViT`."""
        self.load_state_dict(
            {name.replace("momentum_encoder.average.", "momentum_encoder."): v for name, v in state.items()}
        )
