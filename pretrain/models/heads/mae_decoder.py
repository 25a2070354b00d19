"""MAE's decoder (He et al. 2021, section 3): from the latent of the visible patches to the pixels of the masked ones.

The token order is [class, visible, masked], not that of the image: attention does not depend on order, and each token
has its position embedding. So the last block and the head can be computed for the masked tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import EVERY_TOKEN, Block
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.layers.pos_embed import sincos_2d


class MAEDecoder(nn.Module):
    """Latent tokens of the visible patches -> pixels [b, m, out_dim] of the masked patches.

    Args:
        positions: of the patches: a grid for a 2-D sin-cos table, or a fixed table [N, embed_dim], which is not stored.
        num_class_tokens: tokens before the patches, each with a position. learned: positions are trained (Pixio).
        embed_bias: of the first layer. block: further arguments of `Block` (VideoMAE).
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_dim: int,
        positions: tuple[int, int] | Tensor,
        mlp_ratio: float = 4.0,
        num_class_tokens: int = 1,
        learned: bool = False,
        embed_bias: bool = True,
        block: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.grid_size = None if isinstance(positions, Tensor) else positions
        self.num_class_tokens = num_class_tokens
        self.embed = nn.Linear(in_dim, embed_dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if not isinstance(positions, Tensor):
            positions = sincos_2d(embed_dim, positions, cls_row=False)
        table = positions.float()
        table = torch.cat([table.new_zeros(num_class_tokens, embed_dim), table])[None]
        if self.grid_size is None:
            self.register_buffer("pos_embed", table, persistent=False)
        else:
            self.pos_embed = nn.Parameter(table, requires_grad=learned)
        if learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        of_block: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm_eps": 1e-6, **(block or {})}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, **of_block) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=of_block["norm_eps"])
        self.pred = nn.Linear(embed_dim, out_dim)
        initialize_linears(self, "xavier")
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Pixels [b, m, out_dim] of the masked patches.

        Args:
            latent: class tokens and visible patches [b, P + k, in_dim], in the order of `keep`.
            keep, masked: patch indices int64 [b, k] and [b, m], together every patch once.
        """
        return self._decode(latent, keep, masked, queries=slice(latent.shape[1], None))

    def predict(self, latent: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Pixels [b, k + m, out_dim] of every patch, in image order."""
        pixels = self._decode(latent, keep, masked, queries=slice(self.num_class_tokens, None))
        place = torch.cat([keep, masked], dim=1).argsort(dim=1)
        return pixels.gather(1, place[..., None].expand(-1, -1, pixels.shape[2]))

    def _decode(self, latent: Tensor, keep: Tensor, masked: Tensor, *, queries: slice) -> Tensor:
        of_class, table = self.pos_embed[0].tensor_split([self.num_class_tokens])
        visible = self.embed(latent)
        visible = visible + torch.cat([of_class.expand(len(keep), -1, -1), table[keep]], dim=1)
        x = torch.cat([visible, (self.mask_token + table[masked]).to(visible.dtype)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x, EVERY_TOKEN)
        return self.pred(self.norm(self.blocks[-1](x, queries)))
