"""Hugging Face's names of ViT (and MAE's encoder), DeiT, MSN, I-JEPA, BEiT, data2vec-vision, DINOv2 and DINOv3, as the
official ones, with the facts of the config.json next to them.

Queries, keys and values are apart there and one product here; where the keys have no bias, they are BEiT's.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from pretrain.models.importers.huggingface.config import CONFIG, described, read_config
from pretrain.models.importers.names import MEAN_POOLED, blocks_of, renamed, square_grid, to_vit
from pretrain.models.importers.weights import Facts, Grid, Source, State, Weights

_PREFIX = r"^(vit|beit|data2vec_vision|dinov2|dinov2_with_registers|dinov3_vit|deit|ijepa|model)\."
_RENAMED = (
    (_PREFIX, ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.|proj\.)?(weight|bias)$", r"patch_embed.proj.\2"),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.weights_in|mlp\.gate_proj)\.", ".mlp.fc1."),
    (r"\.(mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^(blocks\.\d+)\.lambda_([12])$", r"\1.ls\2.gamma"),
    (r"^layernorm\.", "norm."),
)
_PARTS = ("query", "key", "value")


def huggingface(state: State, source: Source) -> Weights | None:
    """A backbone; heads have no counterpart here and are left out by name.

    Raises:
        ValueError: config.json describes a function that our ViT does not compute.
    """
    if not any("embeddings.patch_embeddings." in name for name in state):
        return None
    named = {renamed(name, _RENAMED): (name, tensor) for name, tensor in state.items()}
    gated = any(name.endswith(".mlp.gate_proj.weight") for name in state)
    wanted = ("cls_token", "dist_token", "register_tokens", "pos_embed", "patch_embed.", "blocks.", "norm.")
    result: State = {}
    left_out = []
    for name, (original, tensor) in named.items():
        if name.startswith((*wanted, "rel_pos_bias.")):
            result[_up(name, gated=gated)] = tensor
        elif not name.startswith("rope_embeddings."):
            left_out.append(original)
    if "patch_embed.proj.weight" not in result:
        return None  # below another prefix
    if "norm.weight" not in result and any(name.endswith("pooler.layernorm.weight") for name in left_out):
        raise ValueError(f"{source}: {MEAN_POOLED}")
    widths = result["patch_embed.proj.weight"].shape[0], len(blocks_of(result))
    facts, grid = _facts(source, widths)
    source = replace(source, grid=source.grid or grid)
    backbone = to_vit(_merge(result), source)
    return Weights(
        "vit", backbone, {}, grid=source.grid or square_grid(backbone), left_out=tuple(left_out), facts=facts
    )


def _facts(source: Source, widths: tuple[int, int]) -> tuple[Facts, Grid | None]:
    config = None if source.folder is None else read_config(source.folder)
    if config is None:
        return Facts(*widths, source=f"{CONFIG}, which holds them, is not next to the weights"), None
    try:
        return described(config, embed_dim=widths[0], depth=widths[1])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _up(name: str, *, gated: bool) -> str:
    """DINOv3's `up_proj` is the first layer of an MLP, or the second half of a gated one's."""
    return name.replace(".mlp.up_proj.", ".mlp.fc1_x." if gated else ".mlp.fc1.")


def _merge(state: State) -> State:
    """One weight, and one bias or BEiT's two, of queries, keys and values."""
    short = {"q": "query", "k": "key", "v": "value"}
    state = {re.sub(r"\.attn\.([qkv])\.", lambda m: f".attn.{short[m[1]]}.", name): t for name, t in state.items()}
    for stem in [name.removesuffix("query.weight") for name in state if name.endswith(".attn.query.weight")]:
        state[f"{stem}qkv.weight"] = torch.cat([state.pop(f"{stem}{part}.weight") for part in _PARTS])
        biases = [state.pop(f"{stem}{part}.bias", None) for part in _PARTS]
        query, key, value = biases
        if query is not None and key is not None and value is not None:
            state[f"{stem}qkv.bias"] = torch.cat([query, key, value])
        elif query is not None and value is not None:
            state |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
    return state
