"""timm's plain vision transformers block by block, so that queries can join their tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.dense.timm_dense import TimmDense
from pretrain.models.backbones.timm_backbone import TimmBackbone


def has_blocks(backbone: TimmBackbone) -> bool:
    """Its tokens can be followed from block to block: timm's `VisionTransformer`, and `Eva` (EVA-02, DINOv3)."""
    return "layers" in backbone.provides and isinstance(backbone.model, VisionTransformer | Eva)


class TimmPlain(TimmDense):
    """The same maps as `TimmDense`; and of the tokens between the blocks, what `plain.PlainDense` gives.

    Tokens are [b, extra + P + N, D]: tokens without a position, such as queries; class token and registers; patches.
    `drop` is never read: timm draws its stochastic depth from torch's generator.
    """

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers, P."""
        return self.backbone.num_prefix_tokens

    def prepare(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [b, C, H, W] -> the tokens [b, P + N, D] before the first block, and their grid (rows, columns)."""
        p, model = self.patch_size, self._model
        images = F.pad(images, (0, -images.shape[3] % p, 0, -images.shape[2] % p))
        found = model._pos_embed(model.patch_embed(images))
        x = found[0] if isinstance(model, Eva) else model.patch_drop(found)
        return model.norm_pre(x), (images.shape[2] // p, images.shape[3] // p)

    def run(
        self, x: Tensor, grid: tuple[int, int], start: int, stop: int, drop: Tensor | None = None, *, extra: int = 0
    ) -> Tensor:
        """Tokens through the blocks from `start` to before `stop`, without a norm."""
        rope = self._rope(grid, extra)
        for index in range(start, stop):
            x = self._block(index, x, rope, None)
        return x

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
        """Tokens through one block; mask: bool [b, 1 or heads, T or 1, T], True where a token may attend."""
        if self.window is not None and index not in self.global_blocks:
            raise ValueError(f"block {index} attends within windows; make it global")
        return self._block(index, x, self._rope(grid, extra), mask)

    def normed(self, x: Tensor) -> Tensor:
        """Tokens through the model's last norm."""
        return self._model.norm(x)

    def as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches of tokens [b, P + N, D] as a map [b, D, rows, columns]."""
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()

    @property
    def _model(self) -> Any:
        return self.backbone.model

    def _rope(self, grid: tuple[int, int], extra: int) -> Tensor | None:
        """Rotations of all tokens but the first P, which timm never rotates: those of `extra` tokens turn nothing."""
        rope: Any = self._model.rope if isinstance(self._model, Eva) else None
        if rope is None:
            return None
        table = rope.get_embed(shape=grid)
        sines, cosines = table.chunk(2, dim=-1)
        still = (*sines.shape[:-2], extra, sines.shape[-1])
        first = torch.cat([sines.new_zeros(still), cosines.new_ones(still)], dim=-1)
        return torch.cat([first, table], dim=-2)

    def _block(self, index: int, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        block = self._model.blocks[index]
        if not isinstance(self._model, Eva):
            return self._recomputed(block, x, mask)
        of_block = rope[index] if rope is not None and getattr(self._model, "rope_mixed", False) else rope
        return self._recomputed(block, x, of_block, mask)

    def _recomputed(self, block: Any, *given: Tensor | None) -> Tensor:
        """The block, its activations recomputed in the backward pass if the model was told to."""
        if self._model.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)  # type: ignore[return-value]
        return block(*given)
