"""I-JEPA's predictor (Assran et al. 2023, section 3, appendix A.1): from context tokens to tokens of target blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.layers import pos_embed as positions
from pretrain.models.layers.attention import EVERY_TOKEN, Block
from pretrain.models.layers.initialize import initialize_linears


class JEPAPredictor(nn.Module):
    """A narrow transformer that reads a context and predicts the features of each target block.

    Target blocks do not attend to each other: each is a separate sequence, [context, mask tokens with positions].
    """

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        grid_size: tuple[int, int],
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"objective.predictor_embed_dim: {embed_dim} is not a multiple of the {num_heads} heads")
        self.grid_size = grid_size
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = positions.sincos_2d(embed_dim, grid_size, cls_row=False).float()[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.proj = nn.Linear(embed_dim, in_dim)
        initialize_linears(self, "trunc_normal")
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
        """Predictions [b, t, c, m, in_dim] of every target block from every context.

        Args:
            context: encoded patches [b * c, k, in_dim], the contexts of an image next to each other.
            keep: their positions, int64 [b, c, k].
            targets: positions of the target blocks, int64 [b, t, m].
        """
        (b, contexts, k), (_, blocks, m) = keep.shape, targets.shape
        table = self.pos_embed[0]
        known = self.embed(context).unflatten(0, (b, contexts)) + table[keep]
        asked = (self.mask_token + table[targets]).to(known.dtype)
        x = torch.cat(
            [
                known[:, None].expand(-1, blocks, -1, -1, -1),
                asked[:, :, None].expand(-1, -1, contexts, -1, -1),
            ],
            dim=3,
        ).flatten(0, 2)
        for block in self.blocks[:-1]:
            x = block(x, EVERY_TOKEN)
        x = self.proj(self.norm(self.blocks[-1](x, slice(k, None))))
        return x.reshape(b, blocks, contexts, m, -1)
