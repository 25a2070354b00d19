"""Backbones of dense tasks: images of any size to maps, whatever the backbone is.

A dense backbone has

channels, strides       of its maps, lists of equal length; strides in pixels
embed_dim, depth        of the backbone; patch_size: pixels per place of its last map
backbone                the backbone itself, whose parameters keep their names

and forward(images [b, C, H, W], drop=None) -> [maps [b, channels, ceil(H / stride), ceil(W / stride)]], with `drop` the
uniforms [b, depth, 2] of our own ViT's drop path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.dense.plain import PlainDense, four_blocks
from finetune.dense.timm_dense import TimmDense
from finetune.dense.timm_plain import TimmPlain, has_blocks
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

__all__ = ["dense", "four_blocks"]


def dense(
    backbone: Any,
    *,
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    rel_pos: bool = False,
    indices: Sequence[int] | None = None,
    norm: bool = True,
) -> PlainDense | TimmDense:
    """A dense backbone of `backbone`, with its weights. For the arguments see `PlainDense` and `TimmDense`.

    Raises:
        ValueError: the backbone gives no maps, or cannot do what is asked for.
    """
    if isinstance(backbone, ViT):
        return PlainDense(
            backbone, window=window, global_blocks=global_blocks, rel_pos=rel_pos, indices=indices, norm=norm
        )
    if isinstance(backbone, TimmBackbone):
        if rel_pos:
            raise ValueError(
                f"rel_pos on timm/{backbone.name}: decomposed positions are of our own ViT; leave them out"
            )
        made = TimmPlain if has_blocks(backbone) else TimmDense
        return made(backbone, window=window, global_blocks=global_blocks, indices=indices, norm=norm)
    raise ValueError(f"a {type(backbone).__name__} gives no maps: a dense task needs our ViT or a model of timm's")
