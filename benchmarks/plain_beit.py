"""BEiT and BEiT v2 as their official code trains them, in plain PyTorch: the baseline of `benchmarks.step`.

Every patch passes the transformer and its last norm, the relative bias is looked up anew for each forward pass, and the
logits of the hidden patches are taken from all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Attention with a bias on queries and values only."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, dim = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (dim // self.num_heads) ** -0.5, qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, t, dim))


class PlainBlock(nn.Module):
    """Pre-norm block with layer scale."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, init_values: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, num_heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PlainBEiT(nn.Module):
    """`early_layers` 0: BEiT. Above 0: BEiT v2 with `head_layers` blocks on the last class token and early patches."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0,
        init_values: float = 0.1, vocab_size: int = 8192, early_layers: int = 0, head_layers: int = 2,
    ):  # fmt: skip
        super().__init__()
        side = img_size // patch_size
        self.early_layers = early_layers
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))
        self.blocks = nn.ModuleList(PlainBlock(embed_dim, num_heads, mlp_ratio, init_values) for _ in range(depth))
        extra = head_layers if early_layers else 0
        self.cls_pt_layers = nn.ModuleList(
            PlainBlock(embed_dim, num_heads, mlp_ratio, init_values) for _ in range(extra)
        )
        self.norm, self.lm_head = nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, vocab_size)
        self.register_buffer("index", plain_index(side), persistent=False)

    def forward(self, images: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Images [b, 3, H, W], bool mask [b, N], tokens of every patch [b, N] -> loss."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        hidden = mask.unsqueeze(-1).to(x.dtype)
        x = x * (1 - hidden) + self.mask_token * hidden
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        tokens = x.shape[1]
        index: Any = self.index
        bias = self.table[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        early = x
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, bias)
            if i == self.early_layers:
                early = x[:, 1:]
        labels = targets[mask]
        loss = F.cross_entropy(self.lm_head(self.norm(x)[:, 1:][mask]), labels)
        if self.early_layers:
            x = torch.cat([x[:, :1], early], 1)
            for block in self.cls_pt_layers:
                x = block(x, bias)
            loss = loss + F.cross_entropy(self.lm_head(self.norm(x)[:, 1:][mask]), labels)
        return loss


def plain_index(side: int) -> Tensor:
    """The row of the table for every pair of tokens, [1 + side^2, 1 + side^2]."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offset = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + side - 1
    rows = (2 * side - 1) ** 2
    index = torch.full((1 + side * side,) * 2, rows + 2)
    index[1:, 1:] = offset[..., 0] * (2 * side - 1) + offset[..., 1]
    index[0, 1:], index[1:, 0] = rows, rows + 1
    return index


def from_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `PlainBEiT` from that of our objective."""
    names = {
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
        "patch_embed.proj": "patch_embed",
        "rel_pos_bias.relative_position_bias_table": "table",
        "encoder.": "",
    }
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(("tokenizer.", "fingerprint.", "teacher.")):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


class PlainDVAE(nn.Module):
    """The discrete VAE of BEiT's code."""

    def __init__(self, *, patch_size: int, num_tokens: int, codebook_dim: int, hidden_dim: int):
        super().__init__()
        halvings = int(math.log2(patch_size))
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for i in range(halvings):
            down = nn.Conv2d(hidden_dim if i else 3, hidden_dim, 4, 2, 1)
            up = nn.ConvTranspose2d(hidden_dim if i else codebook_dim, hidden_dim, 4, 2, 1)
            encoder += [nn.Sequential(down, nn.ReLU()), PlainResBlock(hidden_dim)]
            decoder += [nn.Sequential(up, nn.ReLU()), PlainResBlock(hidden_dim)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden_dim, num_tokens, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(hidden_dim, 3, 1))
        self.codebook = nn.Embedding(num_tokens, codebook_dim)

    def forward(self, images: Tensor, uniform: Tensor, *, temperature: float = 0.9, kl_weight: float = 0.0) -> Tensor:
        logits = self.encoder(images)
        noise = -torch.log(-torch.log1p(-uniform))
        weights = F.softmax((logits + noise) / temperature, 1)
        out = self.decoder(torch.einsum("bkhw,kd->bdhw", weights, self.codebook.weight))
        log_q = torch.log(F.softmax(logits, 1) + 1e-10)
        divergence = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum()
        return F.mse_loss(images, out) + kl_weight * divergence


def dvae_from_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `PlainDVAE` from that of our objective."""
    last = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    renamed = {}
    for name, tensor in state.items():
        name = (
            name.replace("codes.to_logits", f"encoder.{last}")
            .replace("codes.", "")
            .replace("encoder.layers", "encoder")
        )
        renamed[name] = tensor
    return renamed


class PlainResBlock(nn.Module):
    """Three convolutions around an identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x
