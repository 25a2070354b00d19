"""Boxes from queries that attend to one complete feature map: a DETR decoder for plain backbones.

Every layer corrects the boxes of the previous one (Deformable DETR, Zhu et al. 2020), the position of a query is that
of its box (DAB-DETR, Liu et al. 2022), and its attention is biased by the distances of patches to the sides of that box
("DETR Doesn't Need Multi-Scale or Locality Design", Lin et al. 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from finetune.heads.queries import point_sample

_TEMPERATURE = 20.0
_NEAREST = 1e-3


class QueryDecoder(nn.Module):
    """A map [b, C, h, w] -> boxes and class logits of `num_queries` queries, from each layer.

    Args:
        in_channels: of the map. num_logits: of the classes, see `BoxSetLoss`.
        prior: initial probability of a class, under the focal loss; None: under cross-entropy.

    Raises:
        ValueError: the heads do not divide the width, or it is not a multiple of 8.
    """

    def __init__(
        self,
        in_channels: int,
        num_logits: int,
        *,
        num_queries: int = 300,
        width: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        prior: float | None = 0.01,
    ):
        super().__init__()
        if width % num_heads or width % 8:
            raise ValueError(f"width {width} of the decoder: a multiple of 8 and of its {num_heads} heads is needed")
        self.width = width
        self.project = nn.Sequential(nn.Linear(in_channels, width), nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(1, num_queries, width))
        self.anchors = nn.Parameter(_first_boxes(num_queries).logit())
        self.place = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(_Layer(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_logits)
        last = nn.Linear(width, 4)
        self.correct = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if prior is not None:
            nn.init.constant_(self.classify.bias, math.log(prior / (1 - prior)))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(boxes [b, q, 4], class logits [b, q, num_logits]) of each layer, the last the result.

        Boxes are (center x, center y, width, height) in parts of what the map covers.
        """
        grid = (x.shape[2], x.shape[3])
        memory = self.project(x.flatten(2).transpose(1, 2))
        keys = memory + sine_of(grid_centers(grid, x.device), self.width // 2).to(memory.dtype)
        queries = self.queries.expand(x.shape[0], -1, -1).to(memory.dtype)
        boxes = self.anchors.sigmoid()[None].expand(x.shape[0], -1, -1)
        outputs = []
        for layer in self.layers:
            # The next layer starts from these boxes, without a gradient to them.
            boxes = boxes.detach() if outputs else boxes
            place = self.place(sine_of(boxes, self.width // 2).to(memory.dtype))
            queries = layer(queries, place, keys, memory, boxes, grid)
            read = self.norm(queries)
            boxes = (self.correct(read).float() + boxes.logit(eps=_NEAREST)).sigmoid()
            outputs.append((boxes, self.classify(read)))
        return outputs


class _Layer(nn.Module):
    """Queries attend to each other, then to the map near their boxes; norms come before each."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.bias = BoxBias(num_heads)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: Tensor, place: Tensor, keys: Tensor, values: Tensor, boxes: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y + place, y + place, y, need_weights=False)[0]
        bias = self.bias(boxes, grid).flatten(0, 1).to(x.dtype)
        query = self.norm2(x) + place
        x = x + self.cross_attn(query, keys, values, attn_mask=bias, need_weights=False)[0]
        return x + self.mlp(self.norm3(x))


class BoxBias(nn.Module):
    """The bias of the attention from a box to the cells of a grid: a part by column and a part by row.

    Each is a small network of the distances to both sides of the box, on a logarithmic scale (Lin et al. 2023, 3.1).
    """

    def __init__(self, num_heads: int, *, hidden: int = 64):
        super().__init__()
        self.columns, self.rows = (
            nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, num_heads)) for _ in range(2)
        )

    def forward(self, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Boxes [b, q, 4] in parts of the image, grid (rows, columns) -> [b, heads, q, rows * columns]."""
        rows, columns = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in grid)
        left, top, right, bottom = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
        across = self.columns(_log_distances(left, right, columns))
        down = self.rows(_log_distances(top, bottom, rows))
        return (down[:, :, :, None] + across[:, :, None]).flatten(2, 3).permute(0, 3, 1, 2)


def _log_distances(low: Tensor, high: Tensor, places: Tensor) -> Tensor:
    """Signed log distances of sides [b, q] to positions [n] -> [b, q, n, 2]; 8 times the image's side is 1."""
    distances = torch.stack([low[..., None] - places, high[..., None] - places], dim=-1) * 8
    return distances.sign() * torch.log2(distances.abs() + 1) / 3


def grid_centers(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The centers (x, y) of a grid's cells, row-major, in parts of the image: [rows * columns, 2]."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) / n for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1).flip(-1)


def sine_of(coordinates: Tensor, width: int) -> Tensor:
    """Sines and cosines [..., n * width] of n coordinates [..., n] in [0, 1], `width` channels for each."""
    rates = _TEMPERATURE ** -(torch.arange(width // 2, device=coordinates.device) / (width // 2))
    angles = coordinates[..., None].float() * 2 * math.pi * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def _first_boxes(count: int) -> Tensor:
    """Boxes of a fifth of the image's sides, evenly spread: [count, 4]."""
    centers = point_sample.spread(torch.full((2,), 0.5), count) * 0.98 + 0.01
    return torch.cat([centers, torch.full_like(centers, 0.2)], dim=1)
