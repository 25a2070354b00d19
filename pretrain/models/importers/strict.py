"""A state into a module by strict matching: what does not fit is listed, and then nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models import pos_embed as positions
from pretrain.models import rel_pos
from pretrain.models.importers.weights import Grid, MatchReport, State

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    grid: Grid | None = None,
    left_out: tuple[str, ...] = (),
) -> MatchReport:
    """Load `state` into `module`; the module is unchanged when it does not fit.

    Position tables of another grid are resampled (bicubic), a shared relative-position table goes into every block
    that has its own, and biases of queries, keys and values are written as the module writes them; all is reported.

    Args:
        allow_missing: prefixes of names that may keep their initial values.
        grid: rows and columns of the state's position tables; None: square.

    Raises:
        ValueError: names are unexpected, or missing and not allowed to be, or shapes differ; all of them are listed.
    """
    own = module.state_dict()
    fitted, converted = _in_the_modules_form(module, dict(state))
    unexpected = [name for name in fitted if name not in own]
    missing = [name for name in own if name not in fitted]
    resized, problems = [], []
    for name in own.keys() & fitted.keys():
        value, wanted = fitted[name], own[name]
        new = _grid_of(module, name)
        if value.shape == wanted.shape and (grid is None or new is None or new == grid):
            continue
        if new is None or value.ndim != wanted.ndim or value.shape[-1] != wanted.shape[-1]:
            problems.append(f"{name}: {list(value.shape)} in the file, {list(wanted.shape)} in the model")
            continue
        try:
            fitted[name], old = _resize(name, value, wanted, grid, new)
        except ValueError as error:
            problems.append(str(error))
        else:
            resized.append(f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}")
    lacking = [name for name in missing if not name.startswith(tuple(allow_missing))]
    problems += [f"{name}: not in the model" for name in unexpected]
    problems += [f"{name}: not in the file" for name in lacking]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    module.load_state_dict(fitted, strict=False)
    return MatchReport(sorted(own.keys() & fitted.keys()), missing, [], sorted(resized), left_out, converted)


def _resize(name: str, value: Tensor, wanted: Tensor, grid: Grid | None, new: Grid) -> tuple[Tensor, Grid]:
    """A position table on another grid, and the grid it had."""
    if name.endswith(TABLE):
        offsets = len(value) - rel_pos.PREFIX_ROWS
        old = grid or _square(math.isqrt(max(offsets, 0)) ** 2 == offsets, (math.isqrt(offsets) + 1) // 2, name)
        return rel_pos.resize_table(value.float(), old, new), old
    class_rows = wanted.shape[1] - new[0] * new[1]
    patches = value.shape[1] - class_rows
    old = grid or _square(math.isqrt(max(patches, 0)) ** 2 == patches, math.isqrt(patches), name)
    if old[0] * old[1] != patches:
        raise ValueError(f"{name}: {value.shape[1]} rows in the file, {class_rows} + {old[0]} x {old[1]} expected")
    return positions.resize(value.float(), old, new), old


def _square(is_square: bool, side: int, name: str) -> Grid:
    if not is_square:
        raise ValueError(f"{name}: its positions are not a square grid, and the file does not say which they are")
    return side, side


def _grid_of(module: nn.Module, name: str) -> Grid | None:
    """The grid of the position table `name`: that of the nearest module around it that has one; None: no table."""
    path, _, leaf = name.rpartition(".")
    if leaf not in ("pos_embed", TABLE):
        return None
    while True:
        grid = getattr(module.get_submodule(path), "grid_size", None)
        if grid is not None or not path:
            return grid
        path = path.rpartition(".")[0]


def _in_the_modules_form(module: nn.Module, state: State) -> tuple[State, list[str]]:
    """The state as the vision transformers in `module` write it, and what was rewritten."""
    done: list[str] = []
    for path, vit in module.named_modules():
        if hasattr(vit, "rel_pos_kind"):
            prefix = f"{path}." if path else ""
            done += _spread_shared_table(vit, prefix, state) + _rewrite_biases(vit, prefix, state)
    return state, done


def _spread_shared_table(vit: Any, prefix: str, state: State) -> list[str]:
    """BEiT fine-tunes with a table in each block, which starts as the one that all shared."""
    shared = prefix + SHARED_TABLE
    if vit.rel_pos_kind != "per_block" or shared not in state:
        return []
    table = state.pop(shared)
    state.update({f"{prefix}blocks.{i}.attn.{TABLE}": table.clone() for i in range(vit.depth)})
    return [f"{shared} -> every block"]


def _rewrite_biases(vit: Any, prefix: str, state: State) -> list[str]:
    """One bias for queries, keys and values, or two of queries and values.

    A bias of the keys adds the same to every score of a query, which softmax does not see; unless positions rotate the
    keys. There it must be zero.
    """
    done = []
    for i in range(vit.depth):
        attn = f"{prefix}blocks.{i}.attn."
        whole, query, value = (f"{attn}{name}" for name in ("qkv.bias", "q_bias", "v_bias"))
        if vit.qkv_bias is True and query in state and value in state and whole not in state:
            q, v = state.pop(query), state.pop(value)
            state[whole] = torch.cat([q, torch.zeros_like(q), v])
            done.append(f"{attn}q_bias, v_bias -> qkv.bias")
        elif vit.qkv_bias == "no_key" and whole in state:
            q, k, v = state[whole].chunk(3)
            if vit.pos_kind == "rope" and k.any():
                continue  # it stays, and is unexpected
            del state[whole]
            state |= {query: q.clone(), value: v.clone()}
            done.append(f"{attn}qkv.bias -> q_bias, v_bias")
    return done
