"""What the blocks of a vision transformer read next to the tokens: above all relative positions, as biases of the
scores or rotations of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from pretrain.models.layers import free_rope, rel_pos, rope
from pretrain.models.layers.mixer import Layout

if TYPE_CHECKING:
    from pretrain.models.backbones.vit import ViT


@dataclass(frozen=True)
class Given:
    """What the blocks read in addition to the tokens; drops are the uniform random numbers of the stochastic depth."""

    drops: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    rotations: Sequence[Tensor | None]
    layout: Layout


def prepare(vit: ViT) -> None:
    """Give the blocks their frequencies, where these are weights.

    Raises:
        ValueError: the width does not suit the positions.
    """
    if vit.pos_kind == "rope" and vit.rope.frequencies is not None:
        for block in vit.blocks:
            attention = cast(Any, block).attn
            attention.rope = free_rope.FreeRope(attention.head_dim, vit.rope.frequencies)
    rotations(vit, vit.grid_size, None)


def biases(vit: ViT, grid: tuple[int, int], tokens: Tensor | None) -> Sequence[Tensor | None]:
    """The relative bias of every block, [1 or b, heads, s, s], of all tokens or of `tokens` int64 [b, s]."""
    if vit.rel_pos_kind == "none":
        return [None] * vit.depth
    tables: list[Tensor] = []
    if vit.rel_pos_kind in rel_pos.PER_BLOCK:
        tables = [cast(Any, block).attn.relative_position_bias_table for block in vit.blocks]
    if vit.rel_pos_bias is not None:
        shared = vit.rel_pos_bias.relative_position_bias_table
        tables = [shared + table for table in tables] or [shared]
    index = rel_pos.relative_index(grid, vit.num_prefix_tokens, device=tables[0].device)
    index = index if tokens is None else rel_pos.keep_pairs(index, tokens)
    found = [rel_pos.bias_of(rel_pos.resize_table(table, vit.grid_size, grid), index) for table in tables]
    return found * (vit.depth // len(found))


def rotations(
    vit: ViT, grid: tuple[int, int], tokens: Tensor | None, axes: Tensor | None = None
) -> Sequence[Tensor | None]:
    """The rotations of queries and keys in every block, [2, 1 or b, 1, s, head dimension]; where their frequencies are
    weights of the block, the coordinates of the tokens, [1, 1 or b, 1, s, 2].

    Args:
        axes: offsets and factors of the coordinates in each block, [depth, 2, 2], see `rope.moved_axes`.
    """
    if vit.pos_kind != "rope":
        return [None] * vit.depth
    device, head_dim = vit.patch_embed.proj.weight.device, vit.embed_dim // vit.num_heads
    if vit.rope.frequencies is not None and tokens is not None:
        prefix = vit.num_prefix_tokens
        return [free_rope.coordinates(grid, prefix, keep=tokens[:, prefix:] - prefix, device=device)] * vit.depth
    tables = [
        vit.rope.table(grid, head_dim, num_prefix=vit.num_prefix_tokens, axes=of_block, device=device)
        for of_block in ([None] if axes is None else axes)
    ]
    tables = tables if tokens is None else [rope.keep_tokens(table, tokens) for table in tables]
    return tables * (vit.depth // len(tables))
