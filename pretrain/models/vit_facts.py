"""The widths of a vision transformer, read from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD_DIM = 64  # of every published ViT below Huge


def vit_arguments(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of `ViT` for a state in its names, with a square learned position table or none.

    Args:
        num_heads: what weights do not show; default: as many as have 64 channels.

    Raises:
        ValueError: it is not the state of such a ViT.
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        rows = state["pos_embed"].shape[1] - 1
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of a ViT with a position table: {error}") from error
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"a position table of {rows} patches is not a square grid")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    arguments = {
        "img_size": (side * patch, side * patch),
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads or max(1, dim // HEAD_DIM),
        "mlp_ratio": hidden / dim,
        "pos_embed": "learned",
    }
    if "blocks.0.attn.q_bias" in state:
        arguments["qkv_bias"] = "no_key"
    elif "blocks.0.attn.qkv.bias" not in state:
        arguments["qkv_bias"] = False
    if "blocks.0.ls1.gamma" in state:
        arguments["layer_scale"] = 1.0
    if "reg_token" in state:
        arguments["num_registers"] = state["reg_token"].shape[1]
    inner = state["blocks.0.mlp.fc2.weight"].shape[1]
    if inner != hidden:  # the first layer of a SwiGLU gives gate and value, of two thirds of an MLP's width
        arguments |= {"ffn": "swiglu", "mlp_ratio": inner * 1.5 / dim}
    return arguments
