"""timm's plain vision transformers block by block, so that queries can join their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.dense import windows
from finetune.dense.contract import BlockwiseBackbone, Grid
from finetune.dense.timm_dense import TimmDense


class TimmPlain(TimmDense, BlockwiseBackbone):
    """A `VisionTransformer` of timm's. `drop` is never read: timm draws its own random numbers."""

    takes_windows = True

    def prepare(self, images: Tensor) -> tuple[Tensor, Grid]:
        images, p, model = self.padded(images), self.patch_size, self._model
        return model.norm_pre(self._positioned(images)), (images.shape[2] // p, images.shape[3] // p)

    def run(
        self, x: Tensor, grid: Grid, start: int, stop: int, drop: Tensor | None = None, *, extra: int = 0
    ) -> Tensor:
        rotations = self._rotations(grid, extra)
        for index in range(start, stop):
            x = self._block(index, x, rotations, None)
        return x

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
        if self.window is not None and index not in self.global_blocks:
            raise ValueError(f"block {index} attends within windows; make it global")
        return self._block(index, x, self._rotations(grid, extra), mask)

    @property
    def _model(self) -> Any:
        return self.timm.model

    def _positioned(self, images: Tensor) -> Tensor:
        """Class token, registers and embedded patches with their positions."""
        return self._model.patch_drop(self._model._pos_embed(self._model.patch_embed(images)))

    def _rotations(self, grid: Grid, extra: int) -> Tensor | None:
        """Of all tokens but the first P; None: the model has none."""
        del grid, extra
        return None

    def _block(self, index: int, x: Tensor, rotations: Tensor | None, mask: Tensor | None) -> Tensor:
        return self._recomputed(self._model.blocks[index], x, mask)

    def _recomputed(self, block: Any, *given: Tensor | None) -> Tensor:
        """The block; its activations are recomputed in the backward pass if the model was set to do so."""
        if self._model.grad_checkpointing and block.training and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)  # type: ignore[return-value]
        return block(*given)

    def _maps(self, images: Tensor) -> list[Tensor]:
        return super()._maps(images) if self.window is None else self._windowed(images, self.window)

    def _windowed(self, images: Tensor, side: int) -> list[Tensor]:
        """The maps, with attention in windows of `side` tokens in the local blocks, as in `PlainDense`."""
        prefix, (x, grid) = self.num_prefix_tokens, self.prepare(images)
        window = windows.fit(grid, side)
        empty = windows.empty_places(grid, window, num_prefix=prefix, device=images.device)
        hidden = None if empty is None else empty.repeat(len(images), 1)[:, None, None]
        maps = []
        for index in range(self.indices[-1] + 1):
            local = index not in self.global_blocks
            x = windows.split(x, grid, window, num_prefix=prefix) if local else x
            mask = None if hidden is None or not local else windows.hide_keys(x.new_zeros(()), hidden)
            x = self._recomputed(self._model.blocks[index], x, mask)
            x = windows.join(x, grid, window, num_prefix=prefix) if local else x
            if index in self.indices:
                maps.append(self.as_map(self.normed(x), grid))
        return maps


class TimmRotary(TimmPlain):
    """An `Eva` of timm's (EVA-02, DINOv3), which rotates queries and keys."""

    takes_windows = False

    def _positioned(self, images: Tensor) -> Tensor:
        return self._model._pos_embed(self._model.patch_embed(images))[0]

    def _rotations(self, grid: Grid, extra: int) -> Tensor | None:
        """The rotations of further tokens are by an angle of 0."""
        if self._model.rope is None:
            return None
        table = self._model.rope.get_embed(shape=grid)
        sines, cosines = table.chunk(2, dim=-1)
        further = (*sines.shape[:-2], extra, sines.shape[-1])
        first = torch.cat([sines.new_zeros(further), cosines.new_ones(further)], dim=-1)
        return torch.cat([first, table], dim=-2)

    def _block(self, index: int, x: Tensor, rotations: Tensor | None, mask: Tensor | None) -> Tensor:
        mixed = rotations is not None and getattr(self._model, "rope_mixed", False)
        of_block = rotations[index] if mixed and rotations is not None else rotations
        return self._recomputed(self._model.blocks[index], x, of_block, mask)
