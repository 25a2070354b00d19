"""BEiT and BEiT v2 as their official code trains them, in plain PyTorch: the baseline of `benchmarks.step`.

Every patch passes the transformer and its last norm, the relative bias is looked up in each forward pass, and the
logits of the masked patches are selected from all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_blocks import PlainBlock, plain_index


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
        self.blocks = nn.ModuleList(
            PlainBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=init_values) for _ in range(depth)
        )
        extra = head_layers if early_layers else 0
        self.cls_pt_layers = nn.ModuleList(
            PlainBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=init_values) for _ in range(extra)
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


def from_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `PlainBEiT` from that of our objective."""
    names = {
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
