"""Backbones of dense tasks: `dense` makes one of any backbone that pretraining knows; pyramids sit on their maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from finetune.backbones.plain import PlainDense
from pretrain.models.vit import ViT


def dense(
    backbone: nn.Module,
    *,
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    rel_pos: bool = False,
    indices: Sequence[int] | None = None,
    norm: bool = True,
) -> PlainDense:
    """A module that turns images [b, C, H, W] of any size into a list of maps [b, D, ceil(H / s), ceil(W / s)].

    See `plain.PlainDense` for the arguments.

    Raises:
        ValueError: the backbone does not give maps, or cannot do what is asked for.
    """
    if isinstance(backbone, ViT):
        return PlainDense(
            backbone, window=window, global_blocks=global_blocks, rel_pos=rel_pos, indices=indices, norm=norm
        )
    raise ValueError(f"{type(backbone).__name__} gives no maps: a dense task needs our ViT or timm's")
