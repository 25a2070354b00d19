"""Our vision transformer as a backbone of dense tasks: maps of any image size, attention in windows.

Li et al. 2022 ("ViTDet"). Windows are laid around whole blocks: the parameters keep their names, and weights of any
pretraining load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.dense import decomposed, windows
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers import rel_pos, rope
from pretrain.models.layers.attention import EVERY_TOKEN, Bias


@dataclass(frozen=True)
class _GridGeometry:
    """What the blocks of one kind (local or global) share in a forward pass.

    Attributes:
        window: rows and columns of the windows; None: attention is global.
        num_prefix: tokens without a position in front of the patches.
        shared: the relative bias that all blocks share, [1, h, s, s].
        turns: rotations, [2, 1 or b * n, 1, s, head dimension].
        hidden: keys that may not be attended to, bool [b * n, 1, 1, s].
    """

    grid: tuple[int, int]
    window: tuple[int, int] | None
    num_prefix: int
    shared: Tensor | None
    turns: Tensor | None
    hidden: Tensor | None


class PlainDense(nn.Module):
    """Images [b, C, H, W] of any size -> a map [b, D, ceil(H / p), ceil(W / p)] after each of the blocks `indices`.

    Images are padded with zeros at the right and below to whole patches.

    Args:
        backbone: with its weights. What is never computed of it (the blocks after the last index, a norm) is frozen.
        window: rows and columns of tokens that attend to each other in local blocks; None: every block is global.
        global_blocks: the blocks that attend to the whole image; None: four, at even distances, the last among them.
        rel_pos: add decomposed relative positions to every block (see `decomposed`), which start at zero.
        indices: ascending; None: the last block.
        norm: put the backbone's last norm on every map.

    Attributes:
        channels, strides: of each map. embed_dim, depth, patch_size, num_prefix_tokens: of the backbone.

    Raises:
        ValueError: an index is no block, or `window` and `global_blocks` do not fit.
    """

    def __init__(
        self,
        backbone: ViT,
        *,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = False,
        indices: Sequence[int] | None = None,
        norm: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.embed_dim, self.depth, self.patch_size = backbone.embed_dim, backbone.depth, backbone.patch_size
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.indices = ascending("indices", (self.depth - 1,) if indices is None else indices, self.depth)
        if window is not None and window < 1:
            raise ValueError(f"window {window}: expected at least 1 token")
        if window is None and global_blocks is not None:
            raise ValueError("global_blocks without a window: every block is global already; give window too")
        self.window = window
        self.global_blocks = tuple(range(self.depth))
        if window is not None:
            given = four_blocks(self.depth) if global_blocks is None else global_blocks
            self.global_blocks = ascending("global_blocks", given, self.depth)
        self.rel_pos = rel_pos
        if rel_pos:
            for index, block in enumerate(backbone.blocks):
                side = cast(int, window)
                sizes = backbone.grid_size if index in self.global_blocks else (side, side)
                decomposed.add_tables(cast(Any, block).attn, sizes)
        self.channels = [self.embed_dim] * len(self.indices)
        self.strides = [self.patch_size] * len(self.indices)
        self.norm = norm
        backbone.blocks[self.indices[-1] + 1 :].requires_grad_(False)
        if not norm:
            backbone.norm.requires_grad_(False)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """The maps, in block order. `drop`: uniforms [b, depth, 2] of the drop path, which training with it needs."""
        x, grid = self.prepare(images)
        maps, start = [], 0
        kinds = self._geometries(grid, x.shape[0], 0)
        for index in self.indices:
            x = self._run(x, kinds, start, index + 1, drop)
            maps.append(self.as_map(self.normed(x), grid))
            start = index + 1
        return maps

    def tokens(self, images: Tensor, drop: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """The tokens [b, P + N, D] after the last of `indices`, normalized if `norm`, and their grid."""
        x, grid = self.prepare(images)
        return self.normed(self.run(x, grid, 0, self.indices[-1] + 1, drop)), grid

    def prepare(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens [b, P + N, D] before the first block, and their grid (rows, columns)."""
        p = self.patch_size
        images = F.pad(images, (0, -images.shape[3] % p, 0, -images.shape[2] % p))
        return self.backbone.prepare_tokens(images), (images.shape[2] // p, images.shape[3] // p)

    def run(
        self, x: Tensor, grid: tuple[int, int], start: int, stop: int, drop: Tensor | None = None, *, extra: int = 0
    ) -> Tensor:
        """Tokens [b, extra + P + N, D] through the blocks from `start` to before `stop`, without a norm.

        Args:
            drop: as in `forward`. extra: tokens without a position before those of the backbone, such as queries.
        """
        return self._run(x, self._geometries(grid, x.shape[0], extra), start, stop, drop)

    def block(
        self,
        index: int,
        x: Tensor,
        grid: tuple[int, int],
        *,
        extra: int = 0,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [b, extra + P + N, D] through one block.

        Args:
            extra: as in `run`. drop: uniforms [b, 2] of this block.
            mask: bool [b, 1 or heads, T or 1, T], True where a token (third axis) may attend to another (fourth).

        Raises:
            ValueError: a mask for a block of windows.
        """
        kind = self._geometry(grid, x.shape[0], extra, is_global=index in self.global_blocks)
        if mask is not None and kind.window is not None:
            raise ValueError(f"block {index} attends within windows: a mask of attention needs a global block")
        return self._through(index, x, kind, drop, mask)

    def as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches of tokens [b, P + N, D] as a map [b, D, rows, columns]."""
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()

    def normed(self, x: Tensor) -> Tensor:
        """Tokens through the backbone's last norm, if `norm`."""
        return self.backbone.norm(x) if self.norm else x

    def _run(self, x: Tensor, kinds: dict[bool, _GridGeometry], start: int, stop: int, drop: Tensor | None) -> Tensor:
        for index in range(start, stop):
            x = self._through(
                index, x, kinds[index in self.global_blocks], None if drop is None else drop[:, index], None
            )
        return x

    def _through(self, index: int, x: Tensor, kind: _GridGeometry, drop: Tensor | None, mask: Tensor | None) -> Tensor:
        backbone, block = self.backbone, cast(Any, self.backbone.blocks[index])
        if drop is None and block.training and block.drop_rate:
            raise ValueError(f"drop path in training needs its random numbers: drop [b, {self.depth}, 2]")
        if kind.window is not None:
            x = windows.split(x, kind.grid, kind.window, num_prefix=kind.num_prefix)
            drop = None if drop is None else drop.repeat_interleave(windows.count(kind.grid, kind.window), 0)
        given = (x, EVERY_TOKEN, drop, self._bias(block, kind, mask), kind.turns)
        if backbone.checkpointing and block.training and torch.is_grad_enabled():
            x = cast(Tensor, checkpoint(block, *given, use_reentrant=False))
        else:
            x = block(*given)
        if kind.window is not None:
            x = windows.join(x, kind.grid, kind.window, num_prefix=kind.num_prefix)
        return x

    def _geometries(self, grid: tuple[int, int], batch: int, extra: int) -> dict[bool, _GridGeometry]:
        """That of the global blocks (True) and of the local ones (False), as far as there are any."""
        kinds = {index in self.global_blocks for index in range(self.depth)}
        return {kind: self._geometry(grid, batch, extra, is_global=kind) for kind in kinds}

    def _geometry(self, grid: tuple[int, int], batch: int, extra: int, *, is_global: bool) -> _GridGeometry:
        backbone, num_prefix = self.backbone, extra + self.num_prefix_tokens
        device = backbone.patch_embed.proj.weight.device
        window = None if is_global else windows.fit(grid, cast(int, self.window))
        shared = turns = hidden = None
        if backbone.rel_pos_bias is not None:
            table = backbone.rel_pos_bias.relative_position_bias_table
            shared = self._table_bias(table, grid, window, num_prefix)
        if backbone.pos_kind == "rope":
            head_dim = self.embed_dim // backbone.num_heads
            turns = rope.rope_table(grid, head_dim, num_prefix=num_prefix, device=device)
            if window is not None:
                turns = windows.split(turns[:, 0, 0], grid, window, num_prefix=num_prefix)
                turns = turns.unflatten(0, (2, -1)).repeat(1, batch, 1, 1)[:, :, None]
        if window is not None:
            empty = windows.empty_places(grid, window, num_prefix=num_prefix, device=device)
            hidden = None if empty is None else empty.repeat(batch, 1)[:, None, None]
        return _GridGeometry(grid, window, num_prefix, shared, turns, hidden)

    def _table_bias(
        self, table: Tensor, grid: tuple[int, int], window: tuple[int, int] | None, num_prefix: int
    ) -> Tensor:
        """The bias [1, h, s, s] of a table of `rel_pos`; an offset within a window has that of the whole image."""
        table = rel_pos.resize_table(table, self.backbone.grid_size, grid)
        if window is not None:
            table = rel_pos.crop_table(table, grid, window)
        return rel_pos.bias_of(table, rel_pos.relative_index(window or grid, num_prefix, device=table.device))

    def _bias(self, block: Any, kind: _GridGeometry, mask: Tensor | None) -> Bias | None:
        """All that is added to the scores of a block, as a function of its queries where it has to be computed."""
        own = getattr(block.attn, "relative_position_bias_table", None)
        hidden = kind.hidden if mask is None else ~mask
        if own is None and hidden is None and not self.rel_pos:
            return kind.shared

        def added(q: Tensor) -> Tensor:
            total = q.new_zeros(()) if kind.shared is None else kind.shared
            if own is not None:
                total = total + self._table_bias(own, kind.grid, kind.window, kind.num_prefix)
            if self.rel_pos:
                tables, local = (block.attn.rel_pos_h, block.attn.rel_pos_w), kind.window is not None
                sizes = kind.window or kind.grid
                total = total + decomposed.scores(q, tables, sizes, num_prefix=kind.num_prefix, crop=local)
            return total if hidden is None else with_mask(total.to(q.dtype), hidden)

        return added


def four_blocks(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of `depth` blocks (ViTDet: 2, 5, 8, 11 of 12)."""
    return tuple(sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}))


def with_mask(bias: Tensor, hidden: Tensor) -> Tensor:
    """A bias of scores that keeps everybody from the keys that are `hidden`, bool, broadcast to each other."""
    return bias.masked_fill(hidden, -torch.inf)


def ascending(what: str, indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """`indices` of blocks as a tuple.

    Raises:
        ValueError: they do not ascend within the `depth`, or there are none; `what` is what they are called.
    """
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
        raise ValueError(f"{what} must ascend within 0 to {depth - 1}, got {list(indices)}")
    return tuple(indices)
