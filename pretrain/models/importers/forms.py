"""State dicts rewritten for another module that computes the same: shared tables, split biases, timm's names; and
weights of images for clips."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers.weights import Grid, State

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"


def in_the_form_of(
    module: nn.Module, own: Mapping[str, Tensor], state: State, grid: Grid | None = None
) -> tuple[State, list[str]]:
    """The state in the form of the backbones in `module`, and what was rewritten.

    Args:
        own: the state of `module`. grid: rows and columns of the state's position tables; None: square.

    Raises:
        ValueError: positions of an image would be repeated in time and stay equal, as those of the module are fixed.
    """
    done: list[str] = []
    for path, inner in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(inner, VideoViT):
            done += _fit_clips(inner, prefix, own, state, grid)
        if isinstance(inner, ViT):
            done += _spread_shared_table(inner, prefix, state)
            done += _rewrite_biases(prefix, own, state, rotates=inner.pos_kind == "rope")
        elif isinstance(inner, TimmBackbone):
            _name_as_timm(prefix, own, state)
            done += _fold_class_row(f"{prefix}model.", own, state)
            done += _rewrite_biases(f"{prefix}model.", own, state, rotates=True)
    return state, done


def _spread_shared_table(vit: ViT, prefix: str, state: State) -> list[str]:
    """BEiT fine-tunes with a table in each block, which starts as the one that all shared."""
    shared = prefix + SHARED_TABLE
    if vit.rel_pos_kind != "per_block" or shared not in state:
        return []
    table = state.pop(shared)
    state.update({f"{prefix}blocks.{i}.attn.{TABLE}": table.clone() for i in range(vit.depth)})
    return [f"{shared} -> every block"]


def _rewrite_biases(prefix: str, own: Mapping[str, Tensor], state: State, *, rotates: bool) -> list[str]:
    """One bias for queries, keys and values, or two of queries and values.

    A bias of the keys adds the same to every score of a query, which does not change the softmax; unless positions
    rotate the keys. There it must be zero.
    """
    done = []
    for name in [name for name in state if name.startswith(prefix) and name.endswith((".q_bias", ".qkv.bias"))]:
        stem = name.removesuffix("q_bias").removesuffix("qkv.bias")
        whole, query, value = (f"{stem}{leaf}" for leaf in ("qkv.bias", "q_bias", "v_bias"))
        if name in own:
            continue
        if name == query and whole in own and value in state:
            q, v = state.pop(query), state.pop(value)
            state[whole] = torch.cat([q, torch.zeros_like(q), v])
            done.append(f"{stem}q_bias, v_bias -> qkv.bias")
        elif name == whole and query in own:
            q, k, v = state[whole].chunk(3)
            if rotates and k.any():
                continue  # it stays, and is unexpected
            del state[whole]
            state |= {query: q.clone(), value: v.clone()}
            done.append(f"{stem}qkv.bias -> q_bias, v_bias")
    return done


def _name_as_timm(prefix: str, own: Mapping[str, Tensor], state: State) -> None:
    """Below `model`, and with the names of BEiT's and EVA's classes where the model is one."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}model.")]:
        new = f"{prefix}model.{name.removeprefix(prefix)}"
        if new not in own:
            scaled = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", new)
            new = scaled if scaled in own else new
        gate, value = (new.replace(".mlp.fc1.", f".mlp.fc1_{part}.") for part in "gx")
        tensor = state.pop(name)
        if new != gate and new not in own and gate in own:
            state[gate], state[value] = (half.clone() for half in tensor.chunk(2))
        else:
            state[new] = tensor


def _fold_class_row(prefix: str, own: Mapping[str, Tensor], state: State) -> list[str]:
    """A model whose position table has no class row adds it to its class token: the same first layer."""
    table, token = f"{prefix}pos_embed", f"{prefix}cls_token"
    if table not in own or table not in state or token not in state or state[table].shape[1] != own[table].shape[1] + 1:
        return []
    rows = state[table]
    state |= {token: state[token] + rows[:, :1], table: rows[:, 1:]}
    return [f"{table}: class row -> {token}"]


def _fit_clips(vit: VideoViT, prefix: str, own: Mapping[str, Tensor], state: State, grid: Grid | None) -> list[str]:
    """Weights of images inflated, and positions of another grid resampled at every time.

    The first layer of images is divided among the frames of a tube, so that equal frames give the token of the image
    (Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?", section 2.2); its positions are repeated at all times.
    """
    done: list[str] = []
    first, table = f"{prefix}patch_embed.proj.weight", f"{prefix}pos_embed"
    if first not in state:
        return done
    is_of_images, frames = state[first].ndim == 4, vit.tubelet_size
    if is_of_images:
        state[first] = state[first][:, :, None].repeat(1, 1, frames, 1, 1) / frames
        done.append(f"{first}: of an image, divided among {frames} frames")
    if table in own and table not in state and not is_of_images and vit.pos_kind == "sincos_flat":
        state[table] = own[table]
        done.append(f"{table}: fixed, computed anew")
        return done
    if table not in state or table not in own:
        return done
    if is_of_images and vit.slices > 1 and vit.pos_kind != "learned":
        raise ValueError(
            "the positions of an image are repeated at all times of a clip, and fixed ones would never tell the "
            "times apart; give model.pos_embed=learned"
        )
    of_class, patches = state[table].tensor_split([int(vit.class_token)], dim=1)
    if is_of_images:
        patches = patches.repeat(1, vit.slices, 1)
    at_one_time, rest = divmod(patches.shape[1], vit.slices)
    old = grid or (math.isqrt(at_one_time), math.isqrt(at_one_time))
    if rest or math.prod(old) != at_one_time:
        return done  # its shape does not fit, which is reported
    state[table] = vit.resized_table(torch.cat([of_class, patches], dim=1), old, vit.frame_grid)
    if is_of_images or old != vit.frame_grid:
        done.append(f"{table}: {vit.slices} x {old[0]}x{old[1]} -> {vit.frame_grid[0]}x{vit.frame_grid[1]}")
    return done
