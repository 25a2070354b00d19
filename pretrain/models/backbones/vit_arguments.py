"""The arguments of a vision transformer, from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.models.layers import rel_pos

NO_HEADS = (
    "its weights do not show how many heads its attention has; state them: model.args.num_heads, "
    "objective.teacher_heads, heads of a teacher"
)
_SHARED, _PER_BLOCK = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"


def vit_arguments(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, grid: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Arguments of `ViT` for a state in its names, with a position table (given as a learned one) or relative biases.

    Args:
        num_heads: only relative-position tables show them; see `importers.facts`.
        grid: rows and columns of its positions; default: square.

    Raises:
        ValueError: it is not the state of such a ViT, or its heads are not known.
    """
    first = state.get("patch_embed.proj.weight")
    if first is not None and first.ndim == 5:
        raise ValueError(
            "the weights of a model of clips: start pretraining from them (init.official) with model.num_frames, and "
            "use its release"
        )
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        inner = state["blocks.0.mlp.fc2.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of a ViT: {error}") from error
    rows, columns = grid or _square_grid(state)
    table = state.get(_SHARED, state.get(_PER_BLOCK))
    num_heads = num_heads or (None if table is None else table.shape[1])
    if num_heads is None:
        raise ValueError(NO_HEADS)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    arguments = {
        "img_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / dim,
        "pos_embed": "learned" if "pos_embed" in state else "none",
    }
    if "cls_token" not in state:
        arguments["class_token"] = False
    if _SHARED in state or _PER_BLOCK in state:
        one = "shared" if _SHARED in state else "per_block"
        arguments["rel_pos_bias"] = "both" if _SHARED in state and _PER_BLOCK in state else one
    if "blocks.0.attn.q_bias" in state:
        arguments["qkv_bias"] = "no_key"
    elif "blocks.0.attn.qkv.bias" not in state:
        arguments["qkv_bias"] = False
    if "blocks.0.ls1.gamma" in state:
        arguments["layer_scale"] = 1.0
    if "blocks.0.attn.proj.bias" not in state:
        arguments["proj_bias"] = False
    if "blocks.0.mlp.fc1.bias" not in state:
        arguments["ffn_bias"] = False
    if "norm.bias" not in state:
        arguments["norm_layer"] = "rms"
    if "cls_norm.weight" in state:
        arguments["cls_norm"] = True
    if "reg_token" in state:
        arguments["num_registers"] = state["reg_token"].shape[1]
    if inner != hidden:  # the first layer of a SwiGLU gives gate and value, of two thirds of an MLP's width
        arguments |= {"ffn": "swiglu", "mlp_ratio": inner * 1.5 / dim}
    return arguments


def _square_grid(state: Mapping[str, Tensor]) -> tuple[int, int]:
    table = state.get(_SHARED, state.get(_PER_BLOCK))
    if "pos_embed" in state:
        patches = state["pos_embed"].shape[1] - ("cls_token" in state)
        side, is_square = math.isqrt(patches), math.isqrt(patches) ** 2 == patches
        what = f"a position table of {patches} patches"
    elif table is not None:
        offsets = len(table) - rel_pos.PREFIX_ROWS
        root = math.isqrt(max(0, offsets))
        side, is_square = (root + 1) // 2, root % 2 == 1 and root * root == offsets
        what = f"a relative-position table of {offsets} offsets"
    else:
        raise ValueError("not the weights of a ViT with a position table or relative biases: its grid is unknown")
    if not is_square:
        raise ValueError(f"{what} is not of a square grid; state its rows and columns: model.grid, init.grid or --grid")
    return side, side
