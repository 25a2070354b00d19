"""An I-JEPA step written plainly from the paper (Assran et al. 2023), the baseline of `benchmarks.step`.

Every choice is the obvious one: every patch is embedded and the context selected from them, the predictor computes all
its tokens in every block, and the EMA is updated parameter by parameter.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class PlainIJEPA(nn.Module):
    """Takes the batch and, by `load`, the weights of ours; `forward` gives the loss, `follow` moves the average."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        predictor_dim: int,
        predictor_depth: int,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        encoder: Any = VisionTransformer(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, num_classes=0, class_token=False, global_pool="avg", fc_norm=False,
        )  # fmt: skip
        encoder.pos_embed.requires_grad_(False)
        rows = encoder.pos_embed.shape[1]
        self.encoder = without_fused_attention(encoder)
        predictor: Any = nn.Module()
        predictor.embed = nn.Linear(embed_dim, predictor_dim)
        predictor.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        predictor.pos_embed = nn.Parameter(torch.zeros(1, rows, predictor_dim), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        predictor.blocks = nn.Sequential(
            *(Block(predictor_dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(predictor_depth))
        )
        predictor.norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        predictor.proj = nn.Linear(predictor_dim, embed_dim)
        self.predictor = without_fused_attention(predictor)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def load(self, ours: dict[str, Tensor]) -> None:
        """Take the state of our objective."""
        self.load_state_dict({name.replace("teacher.average.", "teacher."): value for name, value in ours.items()})

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        images = batch["image"][:, 0]
        contexts, blocks = batch["mask_context"].unbind(1), batch["mask_targets"].unbind(1)
        with torch.no_grad():
            h = self.tokens(self.teacher, images)
            h = F.layer_norm(h.float(), h.shape[-1:])
        losses = []
        for keep in contexts:
            z = self.tokens(self.encoder, images, keep)
            losses += [F.smooth_l1_loss(self.predict(z, keep, block).float(), pick(h, block)) for block in blocks]
        return torch.stack(losses).mean()

    def tokens(self, vit: Any, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed
        return vit.norm(vit.blocks(x if keep is None else pick(x, keep)))

    def predict(self, z: Tensor, keep: Tensor, block: Tensor) -> Tensor:
        predictor: Any = self.predictor
        table = predictor.pos_embed.expand(len(z), -1, -1)
        asked = predictor.mask_token + pick(table, block)
        x = torch.cat([predictor.embed(z) + pick(table, keep), asked], dim=1)
        return predictor.proj(predictor.norm(predictor.blocks(x))[:, keep.shape[1] :])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for average, value in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            average.mul_(momentum).add_(value, alpha=1 - momentum)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [b, N, D] at `index` [b, k] -> [b, k, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def without_fused_attention(module: Any) -> Any:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.__dict__["fused_attn"] = False
    return module
