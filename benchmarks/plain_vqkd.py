"""VQ-KD as its official code trains it, in plain PyTorch: distances to all codes at once, one-hot products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_blocks import PlainBlock


class PlainEncoder(nn.Module):
    """A ViT with a learned position table: maps [b, C, h, w] -> patch tokens [b, N, D]."""

    def __init__(
        self, *, side: int, patch_size: int, in_chans: int, dim: int, depth: int, num_heads: int, mlp_ratio: float
    ):
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(in_chans, dim, patch_size, patch_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(PlainBlock(dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x, torch.zeros((), device=x.device))
        return self.norm(x)[:, 1:]


class PlainVQKD(nn.Module):
    """Takes the teacher's features; the state is that of our objective, without what it reads from files."""

    def __init__(
        self,
        encoder: PlainEncoder,
        decoder: PlainEncoder,
        *,
        num_codes: int,
        code_dim: int,
        target_dim: int,
        decay: float,
    ):
        super().__init__()
        self.encoder, self.decoder, self.decay = encoder, decoder, decay
        dim, decoder_dim = encoder.cls_token.shape[-1], decoder.cls_token.shape[-1]
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.decode_task_layer = nn.Sequential(
            nn.Linear(decoder_dim, decoder_dim), nn.Tanh(), nn.Linear(decoder_dim, target_dim)
        )
        self.quantize: Any = nn.Module()
        self.quantize.register_buffer("codebook", F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.quantize.register_buffer("cluster_size", torch.zeros(num_codes))
        self.quantize.register_buffer("initted", torch.ones(1))

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Images [b, C, H, W] and features [b, N, D] -> loss; the codebook moves."""
        z = F.normalize(self.encode_task_layer(self.encoder(images)).float(), dim=-1)
        side, book = round(z.shape[1] ** 0.5), self.quantize.codebook
        flat = z.reshape(-1, z.shape[-1])
        distance = flat.pow(2).sum(1, keepdim=True) + book.pow(2).sum(1) - 2 * flat @ book.T
        ids = distance.argmin(1)
        codes, chosen = book[ids].view_as(z), F.one_hot(ids, len(book)).to(z.dtype)
        loss = F.mse_loss(codes, z)
        with torch.no_grad():
            counts = chosen.sum(0)
            self.quantize.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            means = F.normalize((flat.T @ chosen).T / counts.clamp(min=1)[:, None], dim=-1)
            means = torch.where(counts[:, None] == 0, book, means)
            self.quantize.codebook = F.normalize(book * self.decay + means * (1 - self.decay), dim=-1)
        codes = z + (codes - z).detach()
        rec = self.decode_task_layer(self.decoder(codes.transpose(1, 2).unflatten(2, (side, side))))
        return loss + (1 - (F.normalize(rec.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)).mean()
