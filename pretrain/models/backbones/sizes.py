"""Sizes of the vision transformers, by timm's names. No torch here: a wrong name is reported before its import."""

from __future__ import annotations

from typing import TypedDict


class ViTSize(TypedDict):
    """Width, depth, heads and MLP ratio; patch size and image size are chosen separately."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


def _size(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> ViTSize:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}


# Dosovitskiy et al. 2020, table 1; tiny and small: Touvron et al. 2020 (DeiT); giant: Zhai et al. 2021, table 2.
SIZES: dict[str, ViTSize] = {
    "vit_tiny": _size(192, 12, 3),
    "vit_small": _size(384, 12, 6),
    "vit_base": _size(768, 12, 12),
    "vit_large": _size(1024, 24, 16),
    "vit_huge": _size(1280, 32, 16),
    "vit_giant": _size(1408, 40, 16, 48 / 11),
}
