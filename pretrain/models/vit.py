"""The vision transformer (Dosovitskiy et al. 2020) from timm's parts and with timm's parameter names.

What timm's own class does not do, and pretraining needs: encode any subset of the patches, compute only the class
token in the last block, other sizes at every call, and registers beside a position table that has a class row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models import pos_embed as positions
from pretrain.models.attention import Block
from pretrain.models.patches import gather_pixels, grid_of

CLS_ONLY = slice(0, 1)


class ViT(nn.Module):
    """Images to normalized tokens: the class token, the registers, the patches.

    Args:
        img_size: (height, width) in pixels that the position table is made for; other sizes resample it.
        num_registers: extra tokens without a position (Darcet et al. 2023).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 in the first (Huang et al. 2016).
        pos_embed: "sincos" is a fixed table, kept in the state dict, and starts the weights as MAE does (xavier
            uniform); "learned" is trained, and starts them as DINO does (truncated normal, 0.02).
        pos_resize: how the table is resampled, see `pos_embed.resize`.

    Attributes:
        embed_dim, depth, num_heads, mlp_ratio, patch_size, in_chans, img_size, grid_size (rows, columns),
        num_registers, num_prefix_tokens (1 + registers), pos_kind, pos_resize, qkv_bias.

    Raises:
        ValueError: the image is smaller than a patch, or the heads do not divide the width.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        num_registers: int = 0,
        drop_path_rate: float = 0.0,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        pos_resize: positions.PosResize = "exact",
        qkv_bias: bool = True,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        if min(img_size) < patch_size:
            raise ValueError(f"img_size {img_size[0]} x {img_size[1]} is smaller than one patch of {patch_size} pixels")
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = tuple(img_size), patch_size, in_chans, embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.num_registers, self.num_prefix_tokens = num_registers, 1 + num_registers
        self.pos_kind, self.qkv_bias = pos_embed, qkv_bias
        self.pos_resize: positions.PosResize = pos_resize
        self.checkpointing = False

        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        rows = 1 + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim), requires_grad=pos_embed == "learned")
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias) for _ in range(depth)
        )
        self.set_drop_path(drop_path_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._initialize()

    def forward(self, x: Tensor, keep: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Images [b, C, H, W] -> normalized tokens [b, 1 + R + N, D].

        Args:
            keep: int64 [b, k]: encode only these patches (row-major index), in this order; k replaces N.
            drop: uniforms [b, depth, 2] that decide which branches a sample skips; training with drop path needs them.
        """
        return self.norm(self._run(self.prepare_tokens(x, keep), self.blocks, self._drops(drop)))

    def forward_cls(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """Images [b, C, H, W] -> the normalized class token [b, D], equal to `forward(x, drop=drop)[:, 0]`.

        The last block computes its query, projection and MLP for this token only.
        """
        drops = self._drops(drop)
        x = self._run(self.prepare_tokens(x), self.blocks[:-1], drops[:-1])
        return self.norm(self._apply_block(self.blocks[-1], x, CLS_ONLY, drops[-1]))[:, 0]

    def intermediate(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens [b, 1 + R + N, D] after each of the last `n` blocks, in block order."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n must be between 1 and the depth {len(self.blocks)}, got {n}")
        x = self._run(self.prepare_tokens(x), self.blocks[:-n], self._drops(None)[:-n])
        outputs = []
        for block in self.blocks[-n:]:
            x = self._apply_block(block, x)
            outputs.append(self.norm(x))
        return outputs

    def last_attention(self, x: Tensor) -> Tensor:
        """The attention probabilities of the last block, fp32 [b, heads, T, T] with T = 1 + R + N."""
        x = self._run(self.prepare_tokens(x), self.blocks[:-1], self._drops(None)[:-1])
        block: Any = self.blocks[-1]
        return block.attn.probabilities(block.norm1(x))

    def prepare_tokens(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Class token, registers and embedded patches with their positions, before the first block."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be [b, {self.in_chans}, H, W], got {list(x.shape)}")
        table = self.position_table(grid_of(x, self.patch_size))
        pixels = gather_pixels(x, self.patch_size, keep)
        # A strided convolution as one product: only the kept patches are touched.
        projection = self.patch_embed.proj
        patches = F.linear(pixels.flatten(2), projection.weight.flatten(1), projection.bias)
        patches = patches + (table[:, 1:] if keep is None else table[0, 1:][keep])
        prefix = self.cls_token + table[:, :1]
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        return torch.cat([prefix.expand(len(x), -1, -1), patches], dim=1)

    def position_table(self, grid_size: tuple[int, int]) -> Tensor:
        """The position table [1, 1 + N, D] for a grid of patches."""
        return positions.resize(self.pos_embed, self.grid_size, grid_size, how=self.pos_resize)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.checkpointing = enabled

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth rising linearly from 0 in the first block to `rate` in the last."""
        for i, block in enumerate(self._blocks()):
            block.drop_rate = rate * i / max(len(self.blocks) - 1, 1)

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def _drops(self, drop: Tensor | None) -> Sequence[Tensor | None]:
        """The uniforms of each block, [b, 2]."""
        if drop is not None:
            return drop.unbind(1)
        if self.training and any(block.drop_rate for block in self._blocks()):
            raise ValueError(f"drop path in training needs its random numbers: drop [b, {len(self.blocks)}, 2]")
        return [None] * len(self.blocks)

    def _run(self, x: Tensor, blocks: Iterable[nn.Module], drops: Iterable[Tensor | None]) -> Tensor:
        for block, drop in zip(blocks, drops, strict=True):
            x = self._apply_block(block, x, drop=drop)
        return x

    def _apply_block(
        self, block: nn.Module, x: Tensor, queries: slice = slice(None), drop: Tensor | None = None
    ) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, queries, drop, use_reentrant=False)  # type: ignore[return-value]
        return block(x, queries, drop)

    def _initialize(self) -> None:
        projection = self.patch_embed.proj.weight
        if self.pos_kind == "sincos":
            table = positions.sincos_2d(self.embed_dim, self.grid_size)
            self.pos_embed.data.copy_(table[None])
            initialize_linears(self, "xavier")
            nn.init.xavier_uniform_(projection.data.flatten(1))
            nn.init.normal_(self.cls_token, std=0.02)
        else:
            initialize_linears(self, "trunc_normal")
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)


def initialize_linears(module: nn.Module, how: Literal["xavier", "trunc_normal"]) -> None:
    """Start every Linear below `module` xavier-uniform (MAE) or from a truncated normal of 0.02 (DINO), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if how == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
