"""MAE and DINO steps written plainly from the papers: the baseline that `benchmarks.step` measures against.

Every choice is the obvious one: convolution over all patches, attention as two matrix products and a softmax, a
decoder that puts the tokens back in order, logits of every crop pair, EMA and clipping parameter by parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def plain_vit(*, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> Any:
    """timm's ViT without fused attention."""
    vit = VisionTransformer(
        img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        num_classes=0, dynamic_img_size=True, global_pool="token",
    )  # fmt: skip
    for part in vit.modules():
        if hasattr(part, "fused_attn"):
            part.__dict__["fused_attn"] = False
    return vit


class PlainMAE(nn.Module):
    """He et al. 2021, section 3, step by step."""

    def __init__(self, encoder: Any, *, decoder_dim: int, decoder_depth: int, decoder_heads: int):
        super().__init__()
        patch = encoder.patch_embed.patch_size[0]
        decoder = plain_vit(
            img_size=encoder.patch_embed.img_size[0], patch_size=patch, embed_dim=decoder_dim, depth=decoder_depth,
            num_heads=decoder_heads,
        )  # fmt: skip
        self.encoder, self.patch = encoder, patch
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.decoder_blocks, self.decoder_norm = decoder.blocks, decoder.norm
        self.decoder_pos_embed = nn.Parameter(decoder.pos_embed.detach().clone(), requires_grad=False)
        self.decoder_mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * 3)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> Tensor:
        encoder = self.encoder
        x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        batch, length, dim = x.shape
        kept = int(length * (1 - mask_ratio))
        shuffle = noise.argsort(1)
        restore = shuffle.argsort(1)
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, dim))
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(batch, -1, -1)
        x = encoder.norm(encoder.blocks(torch.cat([cls, x], 1)))
        x = self.decoder_embed(x)
        hidden = self.decoder_mask_token.expand(batch, length - kept, -1)
        patches = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = plain_patchify(images, self.patch)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (pred - target).square().mean(-1)
        mask = torch.ones(batch, length, device=x.device)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        return (loss * mask).sum() / mask.sum()


def plain_patchify(images: Tensor, patch: int) -> Tensor:
    """[b, c, h, w] to [b, patches, patch * patch * c], colours fastest."""
    b, c, h, w = images.shape
    tiles = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


class PlainHead(nn.Module):
    """Caron et al. 2021, appendix C, with PyTorch's weight normalization."""

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, bottleneck_dim: int):
        super().__init__()
        layers = [nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainBranch(nn.Module):
    """Backbone and head of the student or of the teacher; one pass per resolution."""

    def __init__(self, backbone: VisionTransformer, head: PlainHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *resolutions: Tensor) -> Tensor:
        return self.head(torch.cat([plain_tokens(self.backbone, crops)[:, 0] for crops in resolutions]))


def plain_tokens(vit: Any, images: Tensor, *, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
    """All tokens of timm's ViT, its position table resampled as the official DINO code does.

    Where `mask` [b, N] is true, `mask_token` [1, 1, D] replaces the embedded patch.
    """
    x = vit.patch_embed.proj(images)
    rows, columns = x.shape[2:]
    table = vit.pos_embed[:, 1:]
    side = round(table.shape[1] ** 0.5)
    if (rows, columns) != (side, side):
        grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        table = grid.permute(0, 2, 3, 1).flatten(1, 2)
    x = x.flatten(2).transpose(1, 2)
    if mask is not None and mask_token is not None:
        x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
    x = x + table
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return vit.norm(vit.blocks(torch.cat([cls, x], 1)))


@torch.no_grad()
def plain_ema(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    for average, value in zip(teacher, student, strict=True):
        average.mul_(momentum).add_(value, alpha=1 - momentum)


@torch.no_grad()
def plain_clip(parameters: list[nn.Parameter], limit: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            coefficient = limit / (parameter.grad.norm() + 1e-6)
            if coefficient < 1:
                parameter.grad.mul_(coefficient)
