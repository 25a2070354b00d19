"""Many linear classifiers on one frozen network, trained in one pass, each with its own features and learning rate.

The linear evaluation of DINOv2 (Oquab et al. 2023, section 7.1 and official code): class tokens of the last 1 or 4
blocks, alone or with the last mean patch, times thirteen learning rates; the best one on the validation images is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone


@dataclass(frozen=True)
class Cell:
    """One classifier of the grid: number of last blocks that it reads, their pooling, its learning rate."""

    blocks: int
    pool: str
    lr: float

    def __str__(self) -> str:
        return f"blocks {self.blocks} {self.pool} lr {self.lr:g}"


class GridHead(nn.Module):
    """Images through a backbone to logits [G, b, K] of all classifiers, which train independently.

    Attributes:
        cells: the settings of each. best: int64 [], the classifier that predicts; part of the state.

    Raises:
        ValueError: the backbone lacks blocks, patches or a class token that the grid reads.
    """

    best: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        blocks: Sequence[int],
        pools: Sequence[str],
        lrs: Sequence[float],
        std: float,
    ):
        super().__init__()
        needs = {"patches"} | ({"layers"} if max(blocks) > 1 else set())
        if not needs <= backbone.provides:
            raise ValueError(f"task.grid: the backbone lacks {', '.join(sorted(needs - backbone.provides))}")
        if max(blocks) > backbone.depth:
            raise ValueError(f"task.grid.blocks: {max(blocks)}, but the backbone has {backbone.depth} blocks")
        if not backbone.class_token and set(pools) - {"mean"}:
            raise ValueError("task.grid.pools: the backbone has no class token; set task.grid.pools=[mean]")
        self.cells = [Cell(*cell) for cell in product(blocks, pools, lrs)]
        self.heads = nn.ModuleList()
        for cell in self.cells:
            width = cell.blocks + (cell.pool == "token_mean")
            fc = nn.Linear(width * backbone.embed_dim, num_classes)
            nn.init.normal_(fc.weight, std=std)
            nn.init.zeros_(fc.bias)
            self.heads.append(fc)
        self.register_buffer("best", torch.tensor(len(lrs) // 2))  # until one is chosen

    def choose(self, number: int) -> None:
        """Set the classifier that predicts."""
        self.best.fill_(number)

    def forward(self, backbone: Backbone, images: Tensor, drop: Tensor | None = None) -> Tensor:
        layers = backbone.intermediate(images, max(cell.blocks for cell in self.cells))
        inputs = {
            (blocks, pool): features(layers[-blocks:], pool, backbone.num_prefix_tokens)
            for blocks, pool in {(cell.blocks, cell.pool) for cell in self.cells}
        }
        return torch.stack(
            [fc(inputs[cell.blocks, cell.pool]) for cell, fc in zip(self.cells, self.heads, strict=True)]
        )


def features(layers: Sequence[Tensor], pool: str, num_prefix: int) -> Tensor:
    """Normalized tokens [b, P + N, D] of some blocks, the last one last, as one vector for an image."""
    if pool == "mean":
        return torch.cat([tokens[:, num_prefix:].mean(dim=1) for tokens in layers], dim=1)
    parts = [tokens[:, 0] for tokens in layers]
    if pool == "token_mean":
        parts.append(layers[-1][:, num_prefix:].mean(dim=1))
    return torch.cat(parts, dim=1)
