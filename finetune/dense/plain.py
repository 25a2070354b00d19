"""Our vision transformer as a backbone of dense tasks: maps of any image size, attention in windows.

Li et al. 2022 ("ViTDet"). Windows are formed around complete blocks: the parameters keep their names, and weights of
any pretraining load unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.dense import blocks, decomposed, windows
from finetune.dense.contract import BlockwiseBackbone, Grid
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers import rel_pos
from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout


@dataclass(frozen=True)
class _GridGeometry:
    """What blocks of the same kind (local or global) share in a forward pass.

    Attributes:
        window: rows and columns of the windows; None: attention is global.
        num_prefix: tokens without a position in front of the patches.
        shared: the relative bias that all blocks share, [1, h, s, s].
        rotations: of queries and keys, [2, 1 or b * n, 1, s, head dimension].
        hidden: keys that must not be attended to, bool [b * n, 1, 1, s].
    """

    grid: Grid
    window: tuple[int, int] | None
    num_prefix: int
    shared: Tensor | None
    rotations: Tensor | None
    hidden: Tensor | None


class PlainDense(BlockwiseBackbone):
    """Images [b, C, H, W] of any size -> a map [b, D, ceil(H / p), ceil(W / p)] after each of the blocks `indices`.

    Args:
        backbone: with its weights. The parts that are never computed (blocks after the last index, a norm) are frozen.
        window: rows and columns of the windows in which local blocks attend; None: every block is global.
        global_blocks: the blocks that attend to the complete image; None: four, evenly spaced, including the last.
        rel_pos: add decomposed relative positions to every block (see `decomposed`), initially zero.
        indices: ascending; None: the last block.
        norm: apply the backbone's last norm to every map.

    Raises:
        ValueError: an index is not a block, or `window` and `global_blocks` do not fit.
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
        if window is not None and backbone.attention:
            kinds = ", ".join(dict.fromkeys(entry.kind for entry in backbone.attention))
            raise ValueError(f"window {window}: {kinds} of this backbone reads whole images; set task.window=null")
        self.backbone = backbone
        self.patch_size, self.window = backbone.patch_size, window
        self.indices = blocks.ascending("indices", (self.depth - 1,) if indices is None else indices, self.depth)
        self.global_blocks = blocks.global_blocks(self.depth, window, global_blocks)
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

    @property
    def vit(self) -> ViT:
        return cast(ViT, self.backbone)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        x, grid = self.prepare(images)
        maps, start = [], 0
        kinds = self._geometries(grid, x.shape[0], 0)
        for index in self.indices:
            x = self._run(x, kinds, start, index + 1, drop)
            maps.append(self.as_map(self.normed(x), grid))
            start = index + 1
        return maps

    def prepare(self, images: Tensor) -> tuple[Tensor, Grid]:
        images, p = self.padded(images), self.patch_size
        return self.vit.prepare_tokens(images), (images.shape[2] // p, images.shape[3] // p)

    def run(
        self, x: Tensor, grid: Grid, start: int, stop: int, drop: Tensor | None = None, *, extra: int = 0
    ) -> Tensor:
        return self._run(x, self._geometries(grid, x.shape[0], extra), start, stop, drop)

    def block(
        self,
        index: int,
        x: Tensor,
        grid: Grid,
        *,
        extra: int = 0,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        kind = self._geometry(grid, x.shape[0], extra, is_global=index in self.global_blocks)
        if mask is not None and kind.window is not None:
            raise ValueError(f"block {index} attends within windows: an attention mask needs a global block")
        return self._through(index, x, kind, drop, mask)

    def _run(self, x: Tensor, kinds: dict[bool, _GridGeometry], start: int, stop: int, drop: Tensor | None) -> Tensor:
        for index in range(start, stop):
            x = self._through(
                index, x, kinds[index in self.global_blocks], None if drop is None else drop[:, index], None
            )
        return x

    def _through(self, index: int, x: Tensor, kind: _GridGeometry, drop: Tensor | None, mask: Tensor | None) -> Tensor:
        backbone, block = self.vit, cast(Any, self.vit.blocks[index])
        if drop is None and block.training and block.drop_rate:
            raise ValueError(f"drop path in training needs its random numbers: drop [b, {self.depth}, 2]")
        if kind.window is not None:
            x = windows.split(x, kind.grid, kind.window, num_prefix=kind.num_prefix)
            drop = None if drop is None else drop.repeat_interleave(windows.count(kind.grid, kind.window), 0)
        layout = Layout(kind.window or kind.grid, kind.num_prefix)
        given = (x, EVERY_TOKEN, drop, self._bias(block, kind, mask), kind.rotations, layout)
        if backbone.checkpointing and block.training and torch.is_grad_enabled():
            x = cast(Tensor, checkpoint(block, *given, use_reentrant=False))
        else:
            x = block(*given)
        if kind.window is not None:
            x = windows.join(x, kind.grid, kind.window, num_prefix=kind.num_prefix)
        return x

    def _geometries(self, grid: Grid, batch: int, extra: int) -> dict[bool, _GridGeometry]:
        """Of the global blocks (True) and of the local ones (False), if there are any."""
        kinds = {index in self.global_blocks for index in range(self.depth)}
        return {kind: self._geometry(grid, batch, extra, is_global=kind) for kind in kinds}

    def _geometry(self, grid: Grid, batch: int, extra: int, *, is_global: bool) -> _GridGeometry:
        backbone, num_prefix = self.vit, extra + self.num_prefix_tokens
        device = backbone.patch_embed.proj.weight.device
        window = None if is_global else windows.fit(grid, cast(int, self.window))
        shared = rotations = hidden = None
        if backbone.rel_pos_bias is not None:
            table = backbone.rel_pos_bias.relative_position_bias_table
            shared = self._table_bias(table, grid, window, num_prefix)
        if backbone.pos_kind == "rope":
            head_dim = self.embed_dim // backbone.num_heads
            own = self.num_prefix_tokens
            rotations = backbone.rope.table(grid, head_dim, num_prefix=own, extra=extra, device=device)
            if window is not None:
                tables = len(rotations)
                rotations = windows.split(rotations[:, 0, 0], grid, window, num_prefix=num_prefix)
                rotations = rotations.unflatten(0, (tables, -1)).repeat(1, batch, 1, 1)[:, :, None]
        if window is not None:
            empty = windows.empty_places(grid, window, num_prefix=num_prefix, device=device)
            hidden = None if empty is None else empty.repeat(batch, 1)[:, None, None]
        return _GridGeometry(grid, window, num_prefix, shared, rotations, hidden)

    def _table_bias(self, table: Tensor, grid: Grid, window: tuple[int, int] | None, num_prefix: int) -> Tensor:
        """The bias [1, h, s, s] from a table of `rel_pos`; an offset has the same bias in a window as in the image."""
        table = rel_pos.resize_table(table, self.vit.grid_size, grid)
        if window is not None:
            table = rel_pos.crop_table(table, grid, window)
        return rel_pos.bias_of(table, rel_pos.relative_index(window or grid, num_prefix, device=table.device))

    def _bias(self, block: Any, kind: _GridGeometry, mask: Tensor | None) -> Bias | None:
        """All biases of the scores of a block, as a function of its queries if they depend on them."""
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
            return total if hidden is None else windows.hide_keys(total.to(q.dtype), hidden)

        return added
