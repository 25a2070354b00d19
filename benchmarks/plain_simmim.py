"""A SimMIM step written plainly from the paper (Xie et al. 2021), the baseline of `benchmarks.step`.

Every choice is the obvious one: a bias added to every head's scores, every pixel predicted by a 1 x 1 convolution and a
pixel shuffle, and the error of the full image multiplied by the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_blocks import PlainBlock, plain_index


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
        self.register_buffer("index", plain_index(self.grid), persistent=False)
        blocks = [PlainBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder = nn.Sequential(nn.Conv2d(embed_dim, patch_size**2 * 3, 1), nn.PixelShuffle(patch_size))

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
        """The weights of `pretrain.objectives.simmim.SimMIM` over a `pretrain.models.backbones.vit.ViT`."""
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
