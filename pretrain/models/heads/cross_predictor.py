"""CAPI's predictor (Darcet et al. 2025, section 3.3): features of asked patches from encoded tokens, by cross-attention
alone. A patch does not see the other ones that are asked, so that any part of the hidden patches can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.layers import free_rope
from pretrain.models.layers.attention import Norm, new_norm
from pretrain.models.layers.cross_attention import CrossBlock
from pretrain.models.layers.initialize import initialize_linears

FREQUENCIES = (7e-4, 7.0)


class CrossPredictor(nn.Module):
    """Mask tokens, alike but for their places, which attend to the tokens of an encoder in every block.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim` into multiples of 4 channels.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        norm_layer: Norm = "rms",
        norm_eps: float = 1e-5,
        frequencies: tuple[float, float] = FREQUENCIES,
    ):
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"objective.predictor_embed_dim: {embed_dim} is not {num_heads} heads of a multiple of 4 channels"
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            CrossBlock(embed_dim, in_dim, num_heads, frequencies=frequencies, norm_layer=norm_layer, norm_eps=norm_eps)
            for _ in range(depth)
        )
        self.norm = new_norm(norm_layer, embed_dim, norm_eps)
        initialize_linears(self, "xavier")
        for block in self.blocks:  # keys and values are matrices of their own
            for part in block.attn.kv.weight.data.chunk(2):  # pyright: ignore
                nn.init.xavier_uniform_(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        keep: Tensor,
        asked: Tensor,
        *,
        grid: tuple[int, int],
        drop: Tensor | None = None,
    ) -> Tensor:
        """Normalized features [b, m, D] of the patches `asked`.

        Args:
            tokens: normalized tokens of the encoder [b, P + k, in_dim], of which k are patches.
            keep: their places, int64 [b, k]. asked: int64 [b, m].
            grid: rows and columns of all patches. drop: uniform random numbers [b, depth, 2].
        """
        prefix = tokens.shape[1] - keep.shape[1]
        context_places = free_rope.coordinates(grid, prefix, keep=keep, device=tokens.device)
        places = free_rope.coordinates(grid, 0, keep=asked, device=tokens.device)
        x = self.mask_token.to(tokens.dtype).expand(*asked.shape, -1)
        for index, block in enumerate(self.blocks):
            x = block(x, tokens, places, context_places, None if drop is None else drop[:, index])
        return self.norm(x)

    def set_drop_path(self, rate: float, *, subset: bool) -> None:
        """Stochastic depth of this rate in every block. `subset`: spend it by subset (see `drop_path`)."""
        for block in self.blocks:
            block.drop_rate, block.drop_subset = rate, subset  # pyright: ignore
