"""Names of vision transformers in the official codes and in timm, as ours: timm's plain ViT's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain.models.importers.forms import SHARED_TABLE, TABLE
from pretrain.models.importers.weights import Grid, Source, State
from pretrain.models.layers import rope
from pretrain.models.layers.rel_pos import PREFIX_ROWS, num_rows

CLASSIFIER = ("head.", "fc_norm.", "head_dist.", "pre_logits.", "pooler.", "classifier.")
_PERIODS = ("rope_embed.periods", "rope.periods")
_DERIVED = ("relative_position_index", "bias_mask", "attn_mask", *_PERIODS)
_RENAMED = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 trains large models with blocks in chunks
    (r"^(register_tokens|storage_tokens)$", "reg_token"),
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"\.mlp\.(w12|w1|fc1_g)\.", ".mlp.fc1."),
    (r"\.mlp\.(w2|fc1_x)\.", ".mlp.fc1_value."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


MEAN_POOLED = (
    "fine-tuned with mean pooling: it has fc_norm, and no norm of the backbone's tokens, which every use of a backbone "
    "here needs"
)
STATE_GRID = "where it is not square, state its rows and columns: model.grid, init.grid or --grid"


def is_vit(state: State) -> bool:
    return "patch_embed.proj.weight" in state and any(name.startswith("blocks.") for name in state)


def take(state: State, *prefixes: str) -> State:
    """Remove and return the entries whose name starts with one of the prefixes."""
    return {name: state.pop(name) for name in list(state) if name.startswith(prefixes)}


def to_vit(state: State, source: Source) -> State:
    """A plain, BEiT-style or DINOv2/v3-style transformer in our names and layout, computing the same features.

    Raises:
        ValueError: it is none of these, or rotates by other rates than ours.
    """
    if not is_vit(state):
        raise ValueError(f"{source}: no vision transformer (patch_embed, blocks)")
    _check_rates(state, source)
    masked = [name.removesuffix("_mask") for name in state if name.endswith("qkv.bias_mask")]
    result: State = {}
    for name, tensor in state.items():
        if name.endswith(_DERIVED):
            continue
        new = rename(name)
        if new in result:
            raise ValueError(f"{source}: both {name} and another entry are {new} in our names")
        result[new] = _without_key(tensor) if name in masked else tensor
    for name in [name for name in result if ".mlp.fc1_value." in name]:
        gate = name.replace("fc1_value", "fc1")
        result[gate] = torch.cat([result[gate], result.pop(name)])
    _refuse_eva02(result, source)
    if "reg_token" in result and result["reg_token"].shape[1] == 0:  # DINOv3 without registers keeps an empty tensor
        del result["reg_token"]
    if "reg_token" not in result and "cls_token" in result and result["cls_token"].shape[1] > 1:  # Pixio
        result["cls_token"], result["reg_token"] = result["cls_token"].tensor_split([1], dim=1)
    if "reg_token" not in result and "dist_token" in result:  # DeiT's token of distillation, with its row of positions
        result["reg_token"] = result.pop("dist_token")
    return with_class_row(result, source) if "pos_embed" in result else result


def rename(name: str) -> str:
    """One name of a backbone, in ours."""
    return renamed(name, _RENAMED)


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    """A name after all replacements of a table (pattern, replacement), in order."""
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def with_class_row(backbone: State, source: Source) -> State:
    """A ViT state whose position table has exactly the rows [class, patches], computing the same features.

    timm can leave the class row out (`no_embed_class`) or give the registers positions; the first becomes a zero row,
    the second move into the register tokens. Without a class token the table has the rows of the patches, which are
    those of a square grid unless the source states another.
    """

    def is_grid(count: int) -> bool:
        if source.grid is not None:
            return count == math.prod(source.grid)
        return count > 0 and math.isqrt(count) ** 2 == count

    table, registers = backbone["pos_embed"], backbone.get("reg_token")
    rows, extra = table.shape[1], 0 if registers is None else registers.shape[1]
    if "cls_token" not in backbone:
        if is_grid(rows):
            return backbone
    elif is_grid(rows - 1) and not (extra and is_grid(rows)):
        return backbone
    elif is_grid(rows):
        return backbone | {"pos_embed": torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)}
    elif registers is not None and is_grid(rows - 1 - extra):
        moved = registers + table[:, 1 : 1 + extra]
        return backbone | {"reg_token": moved, "pos_embed": torch.cat([table[:, :1], table[:, 1 + extra :]], dim=1)}
    what = f"a position table of {rows} rows and {extra} registers"
    if source.grid is not None:
        raise ValueError(f"{source}: {what} is not of a grid of {source.grid[0]} x {source.grid[1]} patches")
    raise ValueError(f"{source}: cannot tell the grid of {what}; {STATE_GRID}")


def square_grid(backbone: State) -> Grid | None:
    """Rows and columns of the position tables of a ViT: other projects' checkpoints do not record them, and are square.

    None where there is no table, or one that is not square.
    """
    table = backbone.get(SHARED_TABLE, backbone.get(f"blocks.0.attn.{TABLE}"))
    if "pos_embed" in backbone:
        side = math.isqrt(backbone["pos_embed"].shape[1] - ("cls_token" in backbone))
        return side, side
    if table is None:
        return None
    side = (math.isqrt(max(0, len(table) - PREFIX_ROWS)) + 1) // 2
    return (side, side) if num_rows((side, side)) == len(table) else None


def mask_token(token: Tensor) -> Tensor:
    """[1, D] or [1, 1, D] -> [1, 1, D]."""
    return token.reshape(1, 1, -1)


def swin_to_timm(state: State) -> State:
    """The official Swin's names as timm's, whose stages begin with their downsampling."""

    def stage(found: re.Match[str]) -> str:
        return f"layers.{int(found[1]) + 1}.downsample."

    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_DERIVED)}
    return {re.sub(r"^layers\.(\d+)\.downsample\.", stage, name): tensor for name, tensor in kept.items()}


def blocks_of(state: State) -> Sequence[int]:
    """The indices of the blocks of a ViT state."""
    return sorted({int(name.split(".")[1]) for name in state if name.startswith("blocks.")})


def periods_of(state: Mapping[str, Tensor]) -> Tensor | None:
    """The periods of rotations, [a quarter of a head's channels], which DINOv3 keeps with the weights."""
    return next((tensor for name, tensor in state.items() if name.endswith(_PERIODS)), None)


def _check_rates(state: State, source: Source) -> None:
    if (periods := periods_of(state)) is not None:
        ours = rope.BASE ** (torch.arange(len(periods)) / len(periods))
        if not torch.allclose(periods.float(), ours, rtol=1e-2):  # they are kept in bf16
            raise ValueError(
                f"{source}: its periods of rotary positions are not those of base {rope.BASE:g}, the only one we have"
            )


def _without_key(bias: Tensor) -> Tensor:
    """DINOv3 multiplies the bias by a mask that is zero for the keys."""
    q, k, v = bias.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


def _refuse_eva02(state: State, source: Source) -> None:
    first = state.get("blocks.0.mlp.fc2.weight")
    gated = first is not None and len(state["blocks.0.mlp.fc1.weight"]) == 2 * first.shape[1]
    if "blocks.0.mlp.norm.weight" in state or (gated and "blocks.0.attn.q_bias" in state and "pos_embed" in state):
        raise ValueError(
            f"{source}: EVA-02, which rotates positions in another way than our ViT: its weights are not read"
        )
