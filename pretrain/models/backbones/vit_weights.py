"""Initial weights of a vision transformer: those of the papers that use its kind of positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pretrain.models.layers import pos_embed as positions
from pretrain.models.layers.initialize import initialize_linears

if TYPE_CHECKING:
    from pretrain.models.backbones.vit import ViT


def initialize_vit(vit: ViT) -> None:
    """Initialize every weight of `vit`.

    "sincos": as MAE (xavier uniform), without a class token as I-JEPA (truncated normal of 0.02; its code divides the
    outputs of block i by sqrt(2 i) and then draws them anew); "sincos_rows_first": as MoCo v3 (xavier uniform by query,
    key and value, class token 1e-6); "rope" with frequencies as CAPI (the same, bias of the patch embedding of torch's
    default, registers and class token 0.02); "learned", "rope" and "none": as DINO (truncated normal of 0.02), with a
    relative-position bias as BEiT (the same, cut at one deviation, the outputs of block i divided by sqrt(2 i)).
    """
    projection, is_capi = vit.patch_embed.proj, vit.pos_kind == "rope" and vit.rope.frequencies is not None
    if vit.pos_kind == "sincos" and vit.class_token:
        _fill_sincos(vit)
        initialize_linears(vit, "xavier")
        nn.init.xavier_uniform_(projection.weight.data.flatten(1))
        nn.init.normal_(cast(Any, vit.cls_token), std=0.02)
    elif vit.pos_kind == "sincos":
        _fill_sincos(vit)
        initialize_linears(vit, "trunc_normal")
        nn.init.trunc_normal_(projection.weight, std=0.02)
        nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
    elif vit.pos_kind == "sincos_rows_first":
        _fill_sincos(vit, rows_first=True)
        _initialize_moco(vit)
    elif is_capi:
        bias = projection.bias.detach().clone()  # pyright: ignore[reportOptionalMemberAccess]
        _initialize_moco(vit)
        projection.bias.data.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
        vit.initialize_tokens(0.02)
    else:
        bound = 0.02 if vit.rel_pos_kind != "none" else 2.0
        initialize_linears(vit, "trunc_normal", bound=bound)
        if vit.rel_pos_kind != "none":
            nn.init.trunc_normal_(projection.weight, std=0.02, a=-bound, b=bound)
            nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
            divide_outputs(vit)
        for token in (vit.pos_embed, vit.cls_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-bound, b=bound)
    if vit.reg_token is not None and not is_capi:
        nn.init.normal_(vit.reg_token, std=1e-6)


def divide_outputs(vit: ViT) -> None:
    """Divide the output layers of block i by sqrt(2 i), as in BEiT."""
    for i, block in enumerate(cast(Any, vit.blocks), start=1):
        for layer in (block.attn.proj, getattr(block.mlp, "fc2", None)):
            if layer is None:
                continue
            layer.weight.data.div_(math.sqrt(2.0 * i))


def _fill_sincos(vit: ViT, *, rows_first: bool = False) -> None:
    assert vit.pos_embed is not None
    table = positions.sincos_2d(vit.embed_dim, vit.grid_size, cls_row=vit.class_token, rows_first=rows_first)
    vit.pos_embed.data.copy_(table[None])


def _initialize_moco(vit: ViT) -> None:
    """Chen et al. 2021, code: the query, key and value parts of qkv are three matrices of their own."""
    initialize_linears(vit, "xavier")
    for block in cast(Any, vit.blocks):
        if not hasattr(block.attn, "qkv"):
            continue
        qkv = block.attn.qkv.weight
        bound = math.sqrt(6.0 / (len(qkv) // 3 + qkv.shape[1]))
        nn.init.uniform_(qkv, -bound, bound)
    projection = vit.patch_embed.proj
    bound = math.sqrt(6.0 / (projection.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
    if vit.cls_token is not None:
        with torch.no_grad():
            nn.init.normal_(vit.cls_token, std=1e-6)
