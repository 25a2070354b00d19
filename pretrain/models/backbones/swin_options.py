"""Options of the authors' Swin (Liu et al. 2021, "Swin Transformer", section 3 and table 4) that timm's class lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from pretrain.models.backbones.families import SWIN_OPTIONS
from pretrain.models.layers.pos_embed import resize


def split(family: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that timm takes, and those of this module."""
    ours = {name: value for name, value in arguments.items() if family == "Swin" and name in SWIN_OPTIONS}
    return {name: value for name, value in arguments.items() if name not in ours}, ours


def apply(model: Any, *, ape: bool = False, patch_norm: bool = True, qk_scale: float | None = None) -> None:
    """Give timm's Swin `model` these options, before it is used.

    Args:
        ape: a learned position table is added to the embedded patches, after mask tokens replaced some. It is the
            parameter `layers.0.absolute_pos_embed` [1, N, C], resampled for images of another size.
        patch_norm: a norm after the patch embedding. qk_scale: factor of the products of queries and keys; None:
            1 / sqrt(channels of a head).
    """
    if ape:
        stage, (rows, columns) = model.layers[0], model.patch_embed.grid_size
        channels = model.patch_embed.proj.out_channels
        stage.absolute_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, channels))
        trunc_normal_(stage.absolute_pos_embed, std=0.02)
        stage.absolute_pos_grid = (rows, columns)
        stage.register_forward_pre_hook(_add_positions)
    if not patch_norm:
        model.patch_embed.norm = nn.Identity()
    if qk_scale is not None:
        for module in model.modules():
            if hasattr(module, "relative_position_bias_table"):
                module.scale, module.fused_attn = qk_scale, False  # the fused kernel has a scale of its own


def _add_positions(stage: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook of the first stage, whose input is [b, h, w, C]."""
    (x,) = inputs
    grid = (x.shape[1], x.shape[2])
    table = resize(stage.absolute_pos_embed, stage.absolute_pos_grid, grid)
    return (x + table.unflatten(1, grid).to(x.dtype),)
