"""A SimMIM step written plainly from the paper (Xie et al. 2021), the baseline of `benchmarks.step`.

Every choice is the obvious one: a bias added to every head's scores, every pixel predicted by a 1 x 1 convolution and a
pixel shuffle, and the error of the whole picture multiplied by the mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """A block of BEiT's: no bias of the keys, a factor on both branches, relative positions from outside."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, layer_scale: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.attn.q_bias, self.attn.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((dim,), layer_scale)}) for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.ls1["gamma"] * self.attend(self.norm1(x), bias)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        b, s, dim = x.shape
        attn: Any = self.attn
        qkv_bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
        qkv = F.linear(x, attn["qkv"].weight, qkv_bias).reshape(b, s, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return attn["proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, dim))


class PlainSimMIM(nn.Module):
    """A ViT with class token and shared relative positions; `forward` takes images and a mask of patches [b, N]."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.grid = patch_size, img_size // patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, embed_dim)) for _ in range(2))
        self.table = nn.Parameter(torch.zeros((2 * self.grid - 1) ** 2 + 3, num_heads))
        self.register_buffer("index", self.pairs(), persistent=False)
        blocks = [PlainBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder = nn.Sequential(nn.Conv2d(embed_dim, patch_size**2 * 3, 1), nn.PixelShuffle(patch_size))

    def pairs(self) -> Tensor:
        """The row of the table for each pair of tokens."""
        places = torch.stack(torch.meshgrid(*[torch.arange(self.grid)] * 2, indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + self.grid - 1
        last = (2 * self.grid - 1) ** 2 + 2
        index = torch.full((1 + self.grid**2, 1 + self.grid**2), last)
        index[1:, 1:] = offsets[0] * (2 * self.grid - 1) + offsets[1]
        index[0, 1:], index[1:, 0] = last - 2, last - 1
        return index

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2)
        weight = mask[..., None].to(x.dtype)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        index: Any = self.index
        bias = self.table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)
        for block in self.blocks:
            x = block(x, bias)
        z = self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        drawn = self.decoder(z).float()
        pixels = mask.unflatten(1, (self.grid, self.grid)).repeat_interleave(self.patch, 1)
        pixels = pixels.repeat_interleave(self.patch, 2)[:, None].float()
        return ((images - drawn).abs() * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.simmim.SimMIM` over a `pretrain.models.vit.ViT`."""
        renamed = {
            "mask_token": "mask_token",
            "encoder.cls_token": "cls_token",
            "encoder.rel_pos_bias.relative_position_bias_table": "table",
            "encoder.patch_embed.proj.weight": "proj.weight",
            "encoder.patch_embed.proj.bias": "proj.bias",
            "decoder.bias": "decoder.0.bias",
        }
        mapped = {renamed.get(name, name.removeprefix("encoder.")): value for name, value in state.items()}
        mapped["decoder.0.weight"] = mapped.pop("decoder.weight")[..., None, None]
        self.load_state_dict(mapped)
