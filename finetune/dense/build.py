"""The dense backbone for each kind of backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.dense.contract import DenseBackbone
from finetune.dense.plain import PlainDense
from finetune.dense.timm_dense import TimmDense
from finetune.dense.timm_plain import TimmPlain, TimmRotary
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

# timm's classes whose tokens can be followed from block to block; `Eva` is that of EVA-02 and DINOv3.
BLOCKWISE = {"VisionTransformer": TimmPlain, "Eva": TimmRotary}


def dense_backbone(
    backbone: Backbone,
    *,
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    rel_pos: bool = False,
    indices: Sequence[int] | None = None,
    norm: bool = True,
) -> DenseBackbone:
    """A dense backbone of `backbone`, with its weights. For the arguments see `PlainDense` and `TimmDense`.

    Raises:
        ValueError: the backbone gives no maps, or cannot do what is requested.
    """
    builder = BUILDERS.get(type(backbone))
    if builder is None:
        raise ValueError(f"a {type(backbone).__name__} gives no maps: a dense task needs our ViT or a model of timm's")
    arguments: dict[str, Any] = {"window": window, "global_blocks": global_blocks, "indices": indices, "norm": norm}
    return builder(backbone, rel_pos=rel_pos, **arguments)


def _of_timm(backbone: TimmBackbone, *, rel_pos: bool, **arguments: Any) -> TimmDense:
    if rel_pos:
        raise ValueError(f"rel_pos on timm/{backbone.name}: decomposed positions are of our own ViT; leave them out")
    return BLOCKWISE.get(backbone.family.class_name, TimmDense)(backbone, **arguments)


BUILDERS: dict[type[Backbone], Any] = {ViT: PlainDense, TimmBackbone: _of_timm}
