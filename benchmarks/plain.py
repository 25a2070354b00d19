"""MAE and DINO steps written plainly from the papers: the baseline that `benchmarks.step` measures against.

Every choice is the obvious one: convolution over all patches, attention as two matrix products and a softmax, a
decoder that puts the tokens back in order, logits of every crop pair, EMA and clipping parameter by parameter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def plain_vit(*, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> VisionTransformer:
    """timm's ViT without fused attention."""
    vit = VisionTransformer(
        img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        num_classes=0, dynamic_img_size=True, global_pool="token",
    )  # fmt: skip
    return without_fused_attention(vit)


def without_fused_attention(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module


class PlainMAE(nn.Module):
    """He et al. 2021, section 3, step by step."""

    def __init__(self, encoder: VisionTransformer, *, decoder_dim: int, decoder_depth: int, decoder_heads: int):
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
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
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
        hidden = self.mask_token.expand(batch, length - kept, -1)
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


def plain_dino_loss(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, *, student_temp: float, teacher_temp: float
) -> Tensor:
    """Cross-entropy of every student crop against every other global crop (Caron et al. 2021, algorithm 1)."""
    terms = []
    for i, t in enumerate(teacher):
        target = F.softmax((t - center) / teacher_temp, dim=-1).detach()
        for j, s in enumerate(student):
            if i != j:
                terms.append((-target * F.log_softmax(s / student_temp, dim=-1)).sum(-1).mean())
    return torch.stack(terms).mean()


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
